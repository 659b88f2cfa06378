"""`nodeproxy rollout` against a real API server with a real operator; nodes are played (`Fleet`)."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import yaml
from rich.console import Console

from hack.controlplane import ControlPlane
from nodeproxy.api.proxy_node import ObjectMeta
from nodeproxy.cli.rollout_view import follow, listing, picture
from nodeproxy.operator.api import (
    Counts,
    NodeLine,
    NodePhase,
    Nodes,
    NodeState,
    Phase,
    ProxyRollout,
    RolloutSpec,
    RolloutStatus,
    Target,
)
from nodeproxy.sandbox.pace import scaled
from tests.operator.conftest import MakeFleet, OperatorProcess, Rollouts
from tests.operator.fleet import Faults

NODEPROXY = Path(sys.executable).with_name("nodeproxy")
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(cluster: ControlPlane, tmp_path: Path) -> Command:
    """`nodeproxy rollout`, as administrator."""
    kubeconfig = tmp_path / "kubeconfig"
    cluster.write_kubeconfig(kubeconfig)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        whole = [NODEPROXY, "rollout", f"--kubeconfig={kubeconfig}", *arguments]
        return subprocess.run(whole, capture_output=True, text=True, check=False, timeout=scaled(90))

    return run


@pytest.mark.controlplane
def test_from_start_to_end(
    command: Command, rollouts: Rollouts, make_fleet: MakeFleet, operator: OperatorProcess, tmp_path: Path
) -> None:
    fleet = make_fleet(2)
    (tmp_path / "c.yaml").write_text("kind: KubeProxyConfiguration\nipvs: {scheduler: lc}\n")
    arguments = ["--mode=ipvs", f"--configuration={tmp_path}/c.yaml", "--nodes=nodeproxy.io/proxy in (nodeproxy)"]
    arguments += ["--steps=1,100%", "--soak=0s", "--wait"]
    done = command("start", "spring", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "proxyrollout spring started\n"
    said = [line.partition(" ")[2] for line in done.stdout.splitlines()]
    assert said[-1] == "spring: Completed 2/2 (100%): 2 nodes have mode ipvs, configuration"
    assert said.index("node n0: Updated") < said.index("node n1: Updated")
    assert rollouts.get("spring")["spec"]["target"] == {"mode": "ipvs", "configuration": {"ipvs": {"scheduler": "lc"}}}

    assert "spring" in command("status").stdout and "Completed" in command("status").stdout
    shown = command("status", "spring").stdout
    assert "2/2 nodes" in shown and "n0" in shown and "iptables" in shown
    assert json.loads(command("status", "spring", "--output=json").stdout)["status"]["phase"] == "Completed"
    ended = command("abort", "spring")
    assert (ended.returncode, ended.stderr) == (
        1,
        "nodeproxy: roll-out spring has ended: 2 nodes have mode ipvs, configuration\n",
    )

    back = command("start", "summer", "--mode=iptables", "--node=n1,n0", "--steps=100%", "--soak=1h", "--paused")
    assert back.returncode == 0
    assert command("pause", "summer").stderr == "proxyrollout summer paused\n"
    assert command("resume", "summer").stderr == "proxyrollout summer resumed\n"
    rollouts.until("summer", "it soaks", lambda status: status.get("phase") == "Soaking")
    aborted = command("abort", "summer", "--rollback", "--wait")
    assert aborted.returncode == 0, aborted.stderr
    assert rollouts.phases("summer") == {"n0": "RolledBack", "n1": "RolledBack"}
    assert fleet.modes == {"n0": "ipvs", "n1": "ipvs"}


@pytest.mark.controlplane
def test_a_failed_one_is_exit_status_one(
    command: Command, rollouts: Rollouts, make_fleet: MakeFleet, operator: OperatorProcess
) -> None:
    make_fleet(1).faults["n0"] = Faults(no_ipvs=True)
    done = command("start", "spring", "--mode=ipvs", "--all", "--wait")
    assert done.returncode == 1
    assert "spring: Failed 1/3 (1): node n0: the agent says: mode ipvs: the kernel has no ip_vs" in done.stdout


@pytest.mark.controlplane
@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["start", "a", "--all"], 2, "--mode, --image, --proxy or --configuration: say what shall change"),
        (["start", "a", "--mode=ipvs"], 2, "--nodes, --node or --all: say which nodes"),
        (["start", "a", "--mode=ipvs", "--nodes=a=b=c"], 2, "--nodes: 'a=b=c' is not a requirement on a label"),
        (["start", "a", "--mode=nft", "--all"], 1, "spec.target.mode: Unsupported value"),
        (["start", "a", "--mode=ipvs", "--all", "--steps=5"], 1, "spec.steps: Invalid value: the last step must be 100%"),
        (["start", "A_", "--mode=ipvs", "--all"], 1, "metadata.name: Invalid value"),
        (["start", "a", "--configuration=/nowhere", "--all"], 1, "--configuration: /nowhere: No such file or directory"),
        (["status", "nowhere"], 1, "there is no ProxyRollout nowhere"),
        (["pause", "nowhere"], 1, "there is no ProxyRollout nowhere"),
        (["status", "--watch"], 2, "--watch needs a NAME"),
    ],
)
def test_bad_input_is_one_line(command: Command, arguments: list[str], status: int, words: str) -> None:
    done = command(*arguments)
    assert done.returncode == status
    assert words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.controlplane
def test_a_dry_run_is_checked_and_makes_nothing(command: Command, rollouts: Rollouts) -> None:
    done = command("start", "spring", "--image=nodeproxy:2", "--all", "--dry-run", "--error-ratio=0.1", "--check=probes")
    assert done.returncode == 0 and not rollouts.there("spring")
    document = yaml.safe_load(done.stdout)
    assert document["spec"]["checks"] == {"thresholds": {"errorRatio": 0.1}, "which": ["probes"]}
    assert command("start", "spring", "--image=no image", "--all", "--dry-run").returncode == 1


def test_without_a_cluster_it_is_one_line(tmp_path: Path) -> None:
    missing = subprocess.run(
        [NODEPROXY, "rollout", f"--kubeconfig={tmp_path}/none", "status"], capture_output=True, text=True, check=False
    )
    assert missing.returncode == 1
    assert missing.stderr == f"nodeproxy: kubeconfig {tmp_path}/none: No such file or directory\n"


def made(phases: dict[str, NodePhase], **status: object) -> ProxyRollout:
    lines = [
        NodeLine(name=name, phase=phase, reason="[red]x[/red] \x1b[2J", before=NodeState(proxy="nodeproxy", mode="iptables"))
        for name, phase in phases.items()
    ]
    updated = sum(phase is NodePhase.UPDATED for phase in phases.values())
    whole = {"nodes": lines, "counts": Counts(total=len(lines), updated=updated), "phase": Phase.PROGRESSING, **status}
    return ProxyRollout(
        metadata=ObjectMeta(name="spring", creation_timestamp="2026-01-01T00:00:00Z"),
        spec=RolloutSpec(target=Target(mode="ipvs"), nodes=Nodes(names=tuple(phases))),
        status=msgspec.convert(msgspec.to_builtins(whole), RolloutStatus),
    )


def shown(what: object) -> str:
    console = Console(file=io.StringIO(), width=160, force_terminal=False)
    console.print(what)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


def test_text_of_the_cluster_is_neither_markup_nor_obeyed() -> None:
    text = shown(picture(made({"n1": NodePhase.UPDATED, "n2": NodePhase.CHANGING}, message="[bold]all[/bold]\x07")))
    assert "[red]x[/red]" in text and "[bold]all[/bold]" in text
    assert "\x1b[2J" not in text and "\x07" not in text
    assert "1/2 nodes" in text and "spring" in shown(listing([made({"n1": NodePhase.UPDATED})]))


def test_of_many_nodes_those_are_shown_that_matter() -> None:
    phases = {f"n{i:04}": NodePhase.WAITING for i in range(1000)}
    phases |= {"n0500": NodePhase.VERIFYING, "n0900": NodePhase.FAILED}
    text = shown(picture(made(phases), lines=12))
    assert "n0500" in text and "n0900" in text and "and 989 more nodes" in text


def test_on_a_terminal_the_picture_changes_until_it_is_enough() -> None:
    story = [
        made({"n1": NodePhase.CHECKING}),
        made({"n1": NodePhase.UPDATED}, phase=Phase.SOAKING),
        made({"n1": NodePhase.UPDATED}, phase=Phase.COMPLETED, message="1 nodes have mode ipvs"),
    ]
    console = Console(file=io.StringIO(), width=160, height=40, force_terminal=True)
    last = follow(console, lambda: story.pop(0), lambda one: one.finished, poll=0)
    assert last.status.phase is Phase.COMPLETED and not story
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Checking" in text and "Completed" in text and "1 nodes have mode ipvs" in text
