"""The command line: Kubernetes' own tests on a kind cluster with nodeproxy or kube-proxy, and the table of them."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click

from hack.conformance import results, selection, table
from hack.conformance.cluster import Subject, facts
from hack.conformance.runner import Run, RunError
from hack.controlplane.build import BuildError, say, version
from hack.kind import parts
from hack.kind.cluster import Cluster
from hack.kind.config import IP_FAMILIES
from hack.kind.places import REPOSITORY, KindError
from nodeproxy.sandbox.pace import scaled

KEPT: Final = REPOSITORY / "e2e" / "conformance"
_RUN_LIMIT: Final = 45 * 60.0
_SERIAL_LIMIT: Final = 25 * 60.0
_FAILED, _BROKEN = 1, 2


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--mode", type=click.Choice(["iptables", "ipvs"]), default="iptables", help="nodeproxy's mode")
@click.option(
    "--kube-proxy",
    "peer",
    type=click.Choice(["iptables", "nftables", "ipvs"]),
    help="run the tests with kube-proxy in this mode instead of nodeproxy, for comparison",
)
@click.option("--name", default="conformance", help="of the kind cluster; one that exists and fits is taken")
@click.option("--workers", default=3, help="nodes besides the control plane; one of the tests needs three")
@click.option("--all-nodes", is_flag=True, help="pods of tests may be on the control plane's node, too")
@click.option(
    "--ip-family", type=click.Choice(IP_FAMILIES), default="ipv4", help="of the cluster; dual adds a group of tests"
)
@click.option("--procs", default=6, help="tests that run at the same time")
@click.option("--groups", default=",".join(selection.GROUPS), help="of [sig-network], by commas")
@click.option("--all", "further", is_flag=True, help="also the groups that a service proxy has a part in")
@click.option("--focus", default="", help="only tests whose name has this regular expression; nothing is kept then")
@click.option("--serial/--no-serial", default=True, help="afterwards those that must run alone")
@click.option("--keep/--no-keep", default=False, envvar="E2E_KEEP", help="leave the cluster running")
@click.option("--into", type=click.Path(path_type=Path), default=KEPT, help="directory of the kept tables")
@click.option(
    "--artifacts",
    type=click.Path(path_type=Path),
    default=REPOSITORY / "e2e-logs" / "conformance",
    help="logs, ginkgo's JSON, JUnit",
)
def main(
    *,
    mode: str,
    peer: str | None,
    name: str,
    workers: int,
    all_nodes: bool,
    ip_family: str,
    procs: int,
    groups: str,
    further: bool,
    focus: str,
    serial: bool,
    keep: bool,
    into: Path,
    artifacts: Path,
) -> None:
    """Run Kubernetes' own [sig-network] tests against a kind cluster, and keep a table of what came of them.

    The status is 1 if a test failed, 2 if the tests could not be run.
    """
    subject = Subject(name, workers, all_nodes, ip_family, mode, peer)
    both_families = (selection.DUAL_STACK,) if ip_family == "dual" else ()
    chosen = [*groups.split(","), *both_families, *(selection.FURTHER if further else ())]
    directory = artifacts.resolve() / subject.label
    begin = time.monotonic()
    try:
        with subject.running(directory / "cluster", keep=keep) as cluster:
            told = facts(cluster)
            runs = _runs(cluster, subject.usable_nodes, selection.pattern(chosen, focus), directory, procs, serial=serial)
            outcome = results.merge([results.read(run.run(), chosen, run.exclusions) for run in runs])
    except (BuildError, KindError, RunError) as error:
        say(f"conformance: {error}")
        sys.exit(_BROKEN)
    took = time.monotonic() - begin
    setting = table.Setting(f"Kubernetes {version()}: {subject.title}", _facts(told, procs, took))
    # Some of the tests are no table to keep.
    where = directory / "table.md" if focus else into / f"{version()}-{subject.label}.md"
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(table.markdown(setting, outcome))
    for test in outcome.tests:
        if test.state is results.State.FAILED:
            say(f"FAILED {test.group} {test.name} ({test.place}): {test.reason}")
    for trouble in outcome.trouble:
        say(f"TROUBLE {trouble}")
    say(f"conformance: {subject.title}: {table.summary(outcome)}; {took / 60:.1f} minutes; {where}; logs in {directory}")
    sys.exit(_FAILED if outcome.failed else 0)


def _runs(cluster: Cluster, usable_nodes: int, focus: str, directory: Path, procs: int, *, serial: bool) -> Sequence[Run]:
    """What runs side by side, and then what has to run alone."""
    parallel = Run(
        kubeconfig=cluster.kubeconfig,
        kubectl=parts.kubernetes_programs() / "kubectl",
        usable_nodes=usable_nodes,
        focus=focus,
        exclusions=(*selection.EXCLUSIONS, selection.SERIAL),
        processes=procs,
        seconds=scaled(_RUN_LIMIT),
        directory=directory / "parallel",
    )
    alone = replace(
        parallel,
        focus=f"{focus}.*{selection.SERIAL.pattern}",
        exclusions=selection.EXCLUSIONS,
        processes=1,
        seconds=scaled(_SERIAL_LIMIT),
        directory=directory / "serial",
    )
    return (parallel, alone) if serial else (parallel,)


def _facts(told: dict[str, str], procs: int, seconds: float) -> dict[str, str]:
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        **told,
        "tests at the same time": str(procs),
        "took": f"{seconds / 60:.1f} minutes, with the cluster's start",
        "command": f"`{shlex.join(['python', '-m', 'hack.conformance', *sys.argv[1:]])}`",
    }


if __name__ == "__main__":
    main()
