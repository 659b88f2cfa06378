"""Roll-outs over all nodes, while requests of every kind flow from everywhere: none fails, however the roll-out ends."""

from __future__ import annotations

import time

import pytest

from e2e.harness.agents import SYSTEM, Agents
from e2e.harness.flow import Lane
from e2e.harness.rollouts import Rollouts, line_of, phases
from e2e.harness.settings import AGNHOST, MODE
from e2e.harness.stage import SERVERS, is_ready
from e2e.harness.waiting import eventually
from e2e.harness.world import Service, World
from hack.kind.loading import canonical

pytestmark = [pytest.mark.disruptive, pytest.mark.agent]

Load = tuple[Service, list[Lane]]


def test_configuration_of_three_nodes_and_the_operator_killed(world: World, rollouts: Rollouts, load: Load) -> None:
    """masqueradeAll comes to node after node; both pods of the operator are killed in the middle, and another goes on.

    A second roll-out to the same nodes is refused meanwhile. In the end every server sees nodes instead of pods.
    """
    service, lanes = load
    client = world.stage.client_a
    assert {one.source for one in world.answers(client, service.address, 80, SERVERS)} == {client.address}
    with world.requests(*lanes) as requests, rollouts.transcript("masquerade"):
        first = rollouts.start("masquerade", {"configuration": {"iptables": {"masqueradeAll": True}}})
        rollouts.wait(first, "a node is being changed", lambda status: status.get("nodes"))
        second = rollouts.start("overlapping", {"mode": MODE})
        assert first in rollouts.ends(second, "Failed")["message"]
        rollouts.wait(first, "the first node is updated", lambda status: "Updated" in phases(status))
        rollouts.kill_operators()
        status = rollouts.ends(first, "Completed", within=240)
        print(requests.steady(least=100))
    assert phases(status) == ["Updated"] * len(world.stage.nodes)
    assert client.address not in {one.source for one in world.answers(client, service.address, 80, SERVERS)}
    for node in world.stage.nodes:
        assert rollouts.node(node.name)["status"]["audit"]["clean"] is True


@pytest.mark.without_ipvs
@pytest.mark.only("iptables")
def test_ipvs_on_nodes_without_it(world: World, rollouts: Rollouts, load: Load) -> None:
    """IPVS mode is caught at the first node, which is taken back; the others are not touched."""
    with world.requests(*load[1]) as requests, rollouts.transcript("ipvs"):
        status = rollouts.ends(rollouts.start("ipvs", {"mode": "ipvs"}), "Failed")
        print(requests.steady(least=50))
    assert "ip_vs" in status["message"]
    assert phases(status) == ["RolledBack", *["Waiting"] * (len(world.stage.nodes) - 1)]
    canary = rollouts.node(line_of(status, "RolledBack")["name"])
    assert "mode" not in canary["spec"]
    eventually(lambda: "message" not in rollouts.node(canary["metadata"]["name"])["status"], "the agent has nothing to say")
    assert canary["status"]["mode"] == "iptables"


def test_a_broken_image(world: World, rollouts: Rollouts, agents: Agents, load: Load) -> None:
    """An image that is no agent is caught at the first node, which gets the former one again; nobody notices."""
    broken = "nodeproxy:e2e-broken"
    for node in world.stage.nodes:
        tag(world, node.name, AGNHOST, broken)
    before = {node.name: agents.pod(node.name)["metadata"]["uid"] for node in world.stage.nodes}
    timeouts = {"nodeReadySeconds": 10, "verificationSeconds": 60}
    with world.requests(*load[1]) as requests, rollouts.transcript("broken"):
        status = rollouts.ends(rollouts.start("broken", {"image": broken}, timeouts=timeouts), "Failed")
        print(requests.steady(least=50))
    assert phases(status) == ["RolledBack", *["Waiting"] * (len(world.stage.nodes) - 1)]
    canary = line_of(status, "RolledBack")["name"]
    as_before(agents, world, image="nodeproxy:dev", strategy="RollingUpdate")
    for node, uid in before.items():
        assert (agents.pod(node)["metadata"]["uid"] == uid) is (node != canary)


def tag(world: World, node: str, source: str, target: str) -> None:
    """Have an image of a node by another name, too."""
    names = (canonical(name) for name in (source, target))
    world.stage.cluster.exec(node, "ctr", "-n", "k8s.io", "images", "tag", "--force", *names)


def as_before(agents: Agents, world: World, *, image: str, strategy: str) -> None:
    """Wait until the DaemonSet and all its pods have this image, and it has this strategy."""

    def done() -> bool:
        spec = world.api.get("DaemonSet", "nodeproxy", SYSTEM)["spec"]
        images = {spec["template"]["spec"]["containers"][0]["image"]}
        pods = [agents.pod(node.name) for node in world.stage.nodes]
        images |= {pod["spec"]["containers"][0]["image"] for pod in pods}
        assert (images, spec["updateStrategy"]["type"]) == ({image}, strategy)
        return all(is_ready(pod) for pod in pods)

    eventually(done, "the DaemonSet is as it was", within=60)


@pytest.mark.long
def test_another_image_for_three_nodes(world: World, rollouts: Rollouts, agents: Agents, load: Load) -> None:
    """Another image comes to node after node, pod by pod, and back again; no request fails."""
    target = "nodeproxy:e2e-upgrade"
    for node in world.stage.nodes:
        tag(world, node.name, "nodeproxy:dev", target)
    with world.requests(*load[1]) as requests:
        for name, image in (("upgrade", target), ("back", "nodeproxy:dev")):
            with rollouts.transcript(name):
                status = rollouts.ends(rollouts.start(name, {"image": image}), "Completed", within=300)
            assert phases(status) == ["Updated"] * len(world.stage.nodes)
            as_before(agents, world, image=image, strategy="RollingUpdate")
        time.sleep(1)
        print(requests.steady(least=100))
