"""`make e2e`: brings up a cluster, runs the suite in it, collects logs if something failed, and removes what it made.

    python -m e2e [--smoke] [-- ARGUMENTS OF PYTEST]

E2E_MODE=ipvs is the other mode. E2E_KEEP=1 keeps the clusters, and the next run takes them as they are. E2E_PROXY=kube-proxy
runs the suite against the peer. E2E_ROLLOUT=all runs all tests of roll-outs and not only the short ones.
What is told by `hack.kind` and by pytest is shown as it comes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

from e2e.harness import kind
from e2e.harness.pace import scaled
from e2e.harness.settings import CLUSTER_NAME, MODE, PROXY
from nodeproxy.sandbox.pace import factor

_HERE: Final = Path(__file__).parent
_SECOND: Final = _HERE / "second"
_ROLLOUT: Final = _HERE / "rollout"
_TESTS_FAILED, _NO_TESTS = 1, 5  # exit statuses of pytest
_ONE_BY_ONE: Final = ("-n", "0")


@dataclass(frozen=True)
class Part:
    """Tests that run in one call of pytest."""

    title: str
    arguments: tuple[str, ...]


def parts(smoke: bool, workers: int) -> list[Part]:
    """In this order: what is disruptive comes after what runs side by side, and alone."""
    only = "smoke and " if smoke else ""
    here = (str(_HERE), f"--ignore={_SECOND}", f"--ignore={_ROLLOUT}")
    side_by_side = ("-n", str(workers), "--dist", "worksteal")
    found = [
        Part("side by side", (*here, "-m", f"{only}not disruptive", *side_by_side)),
        Part("disruptive, one by one", (*here, "-m", f"{only}disruptive", "-v", "-s")),
    ]
    if smoke:
        return found
    if PROXY == "nodeproxy":
        found.append(Part("roll-outs, one by one", (str(_ROLLOUT), "-v", "-s")))
    return [*found, Part("a second cluster: migration, dual stack", (str(_SECOND), "-v", "-s"))]


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]})
@click.option("--smoke", is_flag=True, help="The short suite: Service types, policies, affinity, draining, a killed agent.")
@click.option("--nodes", type=click.IntRange(1, 5), default=2, show_default=True, help="Workers of the cluster.")
@click.option("--parallel", type=click.IntRange(1, 16), default=4, show_default=True, help="Processes of pytest.")
@click.option("--logs", type=click.Path(path_type=Path), default=Path("e2e-logs"), show_default=True, help="For failures.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(*, smoke: bool, nodes: int, parallel: int, logs: Path, arguments: tuple[str, ...]) -> None:
    """Run the suite."""
    if os.geteuid() != 0:
        raise click.ClickException("requests are sent from within the namespaces of pods and nodes: run it as root")
    sys.exit(0 if run(parts(smoke, parallel), nodes, logs, arguments) else 1)


def run(todo: Sequence[Part], nodes: int, logs: Path, arguments: Sequence[str]) -> bool:
    """Run the parts; whether all passed."""
    keep = os.environ.get("E2E_KEEP") == "1"
    made = [CLUSTER_NAME, f"{CLUSTER_NAME}-second"]
    say(f"{PROXY} in {MODE} mode, cluster {CLUSTER_NAME}; this machine is {factor():.1f} times slower than usual")
    failed: list[str] = []
    begin = time.monotonic()
    try:
        with told(f"cluster {CLUSTER_NAME}"):
            kind.prepare(CLUSTER_NAME, workers=nodes)
        common = ("--durations", "15", f"--timeout={scaled(600):.0f}", *arguments)
        for part in todo:
            with told(part.title):
                if not passed(part, common):
                    failed.append(part.title)
    except BaseException:
        failed.append("the set-up")
        raise
    finally:
        if failed:
            for name in made:
                kind.collect_logs(name, logs / name)
            say(f"logs are in {logs.resolve()}")
        if keep:
            say(f"clusters are kept (E2E_KEEP=1): `python -m hack.kind env --name {CLUSTER_NAME}`")
        else:
            for name in made:
                kind.take_down(name)
        say(f"{'FAILED: ' + ', '.join(failed) if failed else 'passed'}, {time.monotonic() - begin:.0f} s in all")
    return not failed


def passed(part: Part, common: Sequence[str]) -> bool:
    """Run a part. What fails runs once more, one by one and said so: a defect fails again, a machine's hiccup does not."""
    with tempfile.TemporaryDirectory(prefix="e2e-") as cache:
        command = [sys.executable, "-m", "pytest", *part.arguments, *common, "-o", f"cache_dir={cache}"]
        status = subprocess.run(command, check=False).returncode
        if status == _TESTS_FAILED:
            say(f"tests of the part {part.title!r} failed; these run once more, one by one")
            again = (*_ONE_BY_ONE, "--last-failed", "--last-failed-no-failures=none")
            status = subprocess.run([*command, *again], check=False).returncode
            if status == 0:
                say(f"UNSTEADY: tests of the part {part.title!r} passed only when run once more, see above")
    return status in (0, _NO_TESTS)


def say(text: str) -> None:
    """A line of progress."""
    print(f"e2e: {text}", flush=True)


@contextmanager
def told(what: str) -> Iterator[None]:
    """Say what begins, and how long it took."""
    say(f"--- {what}")
    begin = time.monotonic()
    yield
    say(f"--- {what}: {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
