"""What a roll-out leaves behind: nodes as they were, and nothing that a later agent, node or roll-out would go by."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from nodeproxy.api.proxy_node import ProxyNodeSpec
from nodeproxy.operator.api import Checks, NodePhase, Nodes, Phase, Target, Timeouts
from nodeproxy.operator.world import EndCleanup, EndProbes, ForgetNode
from tests.operator.simulation import NEW, OLD, OLDEST, SimNode, Simulation, cluster, phases, spec, until

SOON = Timeouts(node_ready_seconds=60)


def after_a_canary(*images: str) -> Simulation:
    """An image has come to the first node, and to the template; then it is brought to the others."""
    names = tuple(f"n{i}" for i in range(1, len(images)))
    sim = cluster(len(images), spec(Target(image=NEW), nodes=Nodes(names=names), steps=("100%",), timeouts=SOON))
    sim.image, sim.strategy = NEW, {"type": "OnDelete"}
    for node, image in zip(sim.nodes.values(), images, strict=True):
        node.image = node.own_image = image
    return sim


def test_a_node_gets_the_image_back_that_its_pod_had_and_not_that_of_the_template() -> None:
    sim = after_a_canary(NEW, OLD, OLD)
    sim.nodes["n1"].broken_image = True
    assert sim.finish().phase is Phase.FAILED
    assert phases(sim) == {"n1": "RolledBack", "n2": "Waiting"}
    assert [node.image for node in sim.nodes.values()] == [NEW, OLD, OLD]
    assert (sim.image, sim.strategy) == (NEW, {"type": "OnDelete"}), "the template is as it was before"


def test_nodes_of_different_images_go_back_each_to_its_own() -> None:
    images = [NEW, OLD, OLDEST, OLD, "nodeproxy:a", "nodeproxy:b", "nodeproxy:c"]
    sim = after_a_canary(*images)
    sim.spec = replace(sim.spec, max_parallel=6, auto_rollback=True)
    sim.nodes["n4"].broken_image = True
    assert sim.finish().phase is Phase.FAILED
    assert set(phases(sim).values()) == {"RolledBack"}, "nor is the time that the last one waits for its turn counted"
    assert [node.image for node in sim.nodes.values()] == images
    assert sim.image == NEW


def test_a_failed_move_to_nodeproxy_leaves_nothing_that_a_later_agent_would_go_by() -> None:
    sim = cluster(1, spec(Target(proxy="nodeproxy", mode="ipvs"), timeouts=SOON), by_label=True)
    sim.nodes["n0"].labelled, sim.nodes["n0"].image, sim.nodes["n0"].no_ipvs = False, None, True
    assert sim.finish().phase is Phase.FAILED
    assert phases(sim) == {"n0": "RolledBack"} and sim.nodes["n0"].spec is None

    sim.status, sim.spec = type(sim.status)(), spec(Target(proxy="nodeproxy"), steps=("100%",))
    sim.nodes["n0"].no_ipvs = False
    assert sim.finish().phase is Phase.COMPLETED
    assert (sim.nodes["n0"].serving, sim.nodes["n0"].mode) == ("nodeproxy", "iptables")


def test_what_an_agent_was_told_before_it_came_is_as_before() -> None:
    sim = cluster(1, spec(Target(proxy="nodeproxy", mode="ipvs"), timeouts=SOON), by_label=True)
    node = sim.nodes["n0"]
    node.labelled, node.image, node.no_ipvs = False, None, True
    node.spec = ProxyNodeSpec(configuration={"clusterCIDR": "10.0.0.0/8"})
    assert sim.finish().phase is Phase.FAILED
    assert node.spec == ProxyNodeSpec(configuration={"clusterCIDR": "10.0.0.0/8"})


def test_a_move_to_kube_proxy_that_is_taken_back_brings_back_what_the_agent_was_told() -> None:
    checks = Checks(which=("probes",))
    sim = cluster(2, spec(Target(proxy="kube-proxy"), steps=("100%",), checks=checks, auto_rollback=True), by_label=True)
    told = ProxyNodeSpec(mode="ipvs")
    sim.nodes["n0"].spec = told
    until(sim, NodePhase.UPDATED, "n0")
    assert sim.nodes["n0"].spec is None
    sim.nodes["n1"].lies = True
    assert sim.finish().phase is Phase.FAILED
    assert phases(sim)["n0"] == "RolledBack"
    assert (sim.nodes["n0"].mode, sim.nodes["n0"].spec) == ("ipvs", told)


@pytest.mark.parametrize("phase", [NodePhase.VERIFYING, NodePhase.UPDATED])
@pytest.mark.parametrize("owned", [True, False])
def test_another_node_of_the_same_name_does_not_get_what_the_first_was_told(phase: NodePhase, owned: bool) -> None:
    sim = cluster(2, spec(steps=("100%",), auto_rollback=True))
    until(sim, phase, "n0")
    assert sim.nodes["n0"].owner == "u0", "it goes with the Node, also where no operator runs"
    if not owned:
        sim.nodes["n0"].owner = ""  # an older operator did not write it down
    sim.add(SimNode("n0", "another"))
    sim.nodes["n1"].no_ipvs = True
    assert sim.finish().phase is Phase.FAILED
    assert phases(sim) == {"n0": "Gone", "n1": "RolledBack"}
    sim.elapse()
    assert sim.nodes["n0"].spec is None and sim.nodes["n0"].mode == "iptables"


def test_what_a_node_of_the_same_name_is_told_itself_stays() -> None:
    sim = cluster(2, spec(steps=("100%",)))
    until(sim, NodePhase.UPDATED, "n0")
    sim.add(SimNode("n0", "another"))
    sim.nodes["n0"].spec, sim.nodes["n0"].owner = ProxyNodeSpec(mode="ipvs"), "another"
    assert sim.finish().phase is Phase.COMPLETED
    assert phases(sim)["n0"] == "Gone" and sim.nodes["n0"].spec == ProxyNodeSpec(mode="ipvs")


@pytest.mark.parametrize("target", [Target(proxy="kube-proxy"), Target(mode="ipvs")])
def test_an_operator_that_ends_before_it_clears_away_is_followed_by_one_that_does(target: Target) -> None:
    sim = cluster(2, spec(target, steps=("100%",), max_parallel=2), by_label=target.proxy is not None)
    for node in sim.nodes.values():
        node.spec = ProxyNodeSpec(configuration={"clusterCIDR": "10.0.0.0/8"})
    lost = 0
    while sim.finalizers or not sim.status.nodes:
        kinds = {type(action) for action in sim.plan().actions}
        clears = bool(kinds & {ForgetNode, EndProbes, EndCleanup})
        # Of each two times that it would clear away, the first is lost.
        lose = clears and lost % 2 == 0
        lost += clears
        sim.step(actions=0 if lose else None)
    assert lost and sim.status.phase is Phase.COMPLETED
    assert not sim.probes and not sim.cleanups
    assert all(node.spec is None for node in sim.nodes.values()) == (target.proxy == "kube-proxy")


@pytest.mark.parametrize("target", [Target(proxy="kube-proxy"), Target(mode="ipvs")])
def test_the_finalizer_stays_until_nothing_is_left_to_be_cleared_away(target: Target) -> None:
    sim = cluster(2, spec(target, steps=("100%",)), by_label=target.proxy is not None)
    sim.nodes["n0"].no_ipvs = sim.nodes["n0"].lies = True
    for _ in range(200):  # requests that clear away fail all the time
        result = sim.plan()
        sim.status = result.status
        for action in result.actions:
            if not isinstance(action, EndProbes | EndCleanup):
                sim.act(action)
        sim.elapse()
    assert sim.status.phase is Phase.FAILED and sim.finalizers
    assert sim.probes and bool(sim.cleanups) == (target.proxy == "kube-proxy")
    sim.finish()
    assert not sim.probes and not sim.cleanups and not sim.finalizers


def test_a_cleanup_of_another_roll_out_is_not_ended() -> None:
    sim = cluster(1, spec(steps=("100%",)), by_label=True)
    until(sim, NodePhase.UPDATED, "n0")
    while sim.status.phase is not Phase.COMPLETED:
        sim.step()
    sim.claims, sim.cleanups = {"n0": "summer"}, {"n0": False}
    assert not any(isinstance(action, EndCleanup) for action in sim.plan().actions)


def test_a_webhook_that_rewrites_images_is_seen_through_where_pods_say_of_which_template_they_are() -> None:
    sim = cluster(2, spec(Target(image=NEW), steps=("100%",), auto_rollback=True, timeouts=SOON))
    sim.mirror, sim.counts_templates = "mirror.example/", True
    until(sim, NodePhase.UPDATED, "n0")
    sim.nodes["n1"].broken_image = True
    assert sim.finish().phase is Phase.FAILED
    assert [line.before.image for line in sim.status.nodes if line.before] == [OLD, OLD]
    assert [node.image for node in sim.nodes.values()] == [OLD, OLD] and sim.image == OLD
    assert sim.deleted_pods == 4, "each pod was exchanged, and back"


def test_without_that_a_pod_that_comes_with_another_image_is_not_deleted_over_and_over() -> None:
    sim = cluster(2, spec(Target(image=NEW), timeouts=SOON))
    sim.mirror = "mirror.example/"
    status = sim.finish()
    assert status.phase is Phase.FAILED
    assert (status.message or "").startswith(
        "node n0: the agent's pod came with image mirror.example/nodeproxy:2, and the DaemonSet has nodeproxy:2"
    )
    assert sim.deleted_pods <= 2


def test_nodes_on_which_no_agent_can_run_are_left_out_and_named() -> None:
    sim = cluster(5, spec(steps=("100%",)))
    sim.node_selector = {"kubernetes.io/os": "linux", "pool": "web"}
    for node in sim.nodes.values():
        node.labels = {"kubernetes.io/os": "linux", "pool": "web"}
    sim.nodes["n0"].labels["kubernetes.io/os"] = "windows"
    sim.nodes["n3"].labels["pool"] = "virtual"
    until(sim, NodePhase.CHECKING, "n1")
    (accepted,) = (one for one in sim.status.conditions if one.type == "Accepted")
    assert accepted.message == ("3 nodes belong to it; left out, because the DaemonSet nodeproxy does not run there: n0, n3")
    assert sim.finish().phase is Phase.COMPLETED
    assert phases(sim).keys() == {"n1", "n2", "n4"}
    assert sim.probed_from == {"n1", "n2", "n4"}, "nor can a probe run there"


def test_a_named_node_on_which_no_agent_can_run_is_refused() -> None:
    sim = cluster(2, spec(nodes=Nodes(names=("n0", "n1"))))
    sim.nodes["n1"].labels = {"kubernetes.io/os": "windows"}
    assert sim.finish().message == (
        "refused: spec.nodes.names: the DaemonSet nodeproxy does not run on n1, which lacks the label kubernetes.io/os=linux"
    )


def test_what_a_node_was_told_that_leaves_at_the_very_end_is_removed_too() -> None:
    sim = cluster(2, spec(steps=("100%",)))
    sim.nodes["n1"].no_ipvs = True
    while sim.status.phase is not Phase.FAILED:
        if "n0" in sim.nodes and sim.plan().status.phase is Phase.FAILED:
            sim.remove("n0")
        sim.step()
    assert sim.finish() and phases(sim) == {"n0": "Gone", "n1": "RolledBack"}
    assert not sim.orphans
