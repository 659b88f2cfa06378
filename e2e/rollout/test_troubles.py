"""Roll-outs that meet trouble: an agent that lies, a node that is away, and people who change their mind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from kubernetes.dynamic.exceptions import DynamicApiError

from e2e.harness.agents import Agents
from e2e.harness.places import docker
from e2e.harness.rollouts import Rollouts, line_of, phases
from e2e.harness.stage import SERVERS, Node
from e2e.harness.waiting import eventually
from e2e.harness.world import World
from e2e.rollout.test_rollouts import Load, as_before
from hack.kind.loading import load as load_images

pytestmark = [pytest.mark.disruptive, pytest.mark.agent]

LIAR: Final = "nodeproxy:e2e-liar"
MASQUERADE: Final = {"configuration": {"iptables": {"masqueradeAll": True}}}


@pytest.mark.only("iptables")
def test_an_agent_that_lies(world: World, rollouts: Rollouts, agents: Agents, load: Load) -> None:
    """An image whose agent takes all rules away, is healthy and answers that all is well: probes through the node find out.

    The node gets its agent back, and serves; the other nodes never noticed.
    """
    docker("build", "--quiet", "--tag", LIAR, str(Path(__file__).parent / "liar"))
    load_images(world.stage.cluster, [LIAR])
    service, lanes = load
    canary = world.stage.b
    checks = {"probes": {"count": 10, "timeoutSeconds": 1, "services": 2}}
    elsewhere = [lane for lane in lanes if lane.place in (world.stage.client_a, world.stage.node_a)]
    with world.requests(*elsewhere) as requests, rollouts.transcript("liar"):
        name = rollouts.start("liar", {"image": LIAR}, nodes={"names": [canary.name]}, steps=["100%"], checks=checks)
        status = rollouts.ends(name, "Failed", within=180)
        as_before(agents, world, image="nodeproxy:dev", strategy="RollingUpdate")
        print(requests.steady(least=50))
    assert "probes" in status["message"]
    assert line_of(status, "RolledBack")["name"] == canary.name
    world.answers(world.stage.client_b, service.address, 80, SERVERS)


@pytest.fixture
def away(world: World) -> Iterator[Node]:
    """A node whose kubelet has ended, so that it is no longer Ready; it comes back after the test."""
    node = world.stage.b
    world.stage.cluster.exec(node.name, "systemctl", "stop", "kubelet")
    try:
        yield node
    finally:
        world.stage.cluster.exec(node.name, "systemctl", "start", "kubelet")
        eventually(lambda: is_node_ready(world, node), f"{node.name} is Ready again", within=90)


def is_node_ready(world: World, node: Node) -> bool:
    conditions = world.api.get("Node", node.name, None)["status"]["conditions"]
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


@pytest.mark.long
def test_a_node_that_goes_away(world: World, rollouts: Rollouts, away: Node) -> None:
    """A node that is not Ready comes last, is waited for, and then fails; with autoRollback all others are taken back."""
    eventually(lambda: not is_node_ready(world, away), f"{away.name} is not Ready", within=120)
    timeouts = {"nodeReadySeconds": 10, "verificationSeconds": 60}
    with rollouts.transcript("away"):
        name = rollouts.start("away", MASQUERADE, autoRollback=True, timeouts=timeouts)
        status = rollouts.ends(name, "Failed", within=240)
    assert away.name in status["message"]
    assert "not Ready" in status["message"]
    assert phases(status) == ["Failed", *["RolledBack"] * (len(world.stage.nodes) - 1)]
    for node in world.stage.nodes:
        assert "configuration" not in (rollouts.node(node.name).get("spec") or {})


@pytest.mark.long
def test_edited_paused_and_deleted(world: World, rollouts: Rollouts, load: Load) -> None:
    """Paused it begins no node; its target cannot be changed, its thresholds can; deleted, it finishes nothing more."""
    with world.requests(*load[1]) as requests, rollouts.transcript("mind"):
        name = rollouts.start("mind", MASQUERADE, steps=[1, 2, "100%"])
        rollouts.wait(name, "the first node is begun", lambda status: "Checking" in phases(status))
        rollouts.change(name, paused=True)
        rollouts.wait(name, "it is paused after a node", lambda s: s["phase"] == "Paused" and "Updated" in phases(s))
        before = rollouts.nodes(name)
        time.sleep(5)
        assert rollouts.nodes(name) == before
        assert sorted(before.values()) == ["Updated", "Waiting", "Waiting"]
        with pytest.raises(DynamicApiError, match="cannot be changed"):
            rollouts.change(name, target={"mode": "ipvs"})
        with pytest.raises(DynamicApiError, match="errorRatio"):
            rollouts.change(name, checks={"thresholds": {"errorRatio": 7}})
        rollouts.change(name, paused=False, checks={"probes": {"count": 5}}, maxParallel=2)
        rollouts.wait(
            name,
            "another node is being changed",
            lambda status: "Changing" in phases(status) or "Verifying" in phases(status),
        )
        rollouts.remove(name)
        told = [rollouts.node(node.name).get("spec", {}).get("configuration") for node in world.stage.nodes]
        assert told.count(None) >= 1, "what was in flight, and what had not begun, is not changed"
        assert told.count(MASQUERADE["configuration"]) >= 1, "what was done stays"
        print(requests.steady(least=50))
