"""The reconciliation as a pure function: one roll-out at a time, told as a story."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from nodeproxy.operator.api import (
    Checks,
    NodePhase,
    Nodes,
    Phase,
    Probes,
    Selector,
    Target,
    Thresholds,
    Timeouts,
)
from nodeproxy.operator.world import DeletePod, LabelNode, ReleaseFinalizer, SetImage, Tell
from tests.operator.simulation import NEW, OLD, ROLLING, cluster, phases, spec, until


def test_a_mode_comes_to_all_nodes_step_by_step() -> None:
    sim = cluster(20, spec())
    seen: list[tuple[str, int]] = []
    for _ in range(2000):
        sim.step()
        said = (str(sim.status.phase), sum(node.mode == "ipvs" for node in sim.nodes.values()))
        if sim.status.phase is Phase.SOAKING and said not in seen:
            seen.append(said)
        if sim.status.phase is Phase.COMPLETED:
            break
    assert seen == [("Soaking", 1), ("Soaking", 2), ("Soaking", 20)]
    assert sim.finish().message == "20 nodes have mode ipvs"
    assert set(phases(sim).values()) == {"Updated"}
    assert not sim.probes and not sim.finalizers
    assert sim.status.counts is not None and sim.status.counts.updated == 20
    assert [one.reason for one in sim.told if one.node == "n7"] == ["NodeUpdated"]


def test_a_kernel_without_ipvs_is_caught_at_the_first_node_and_taken_back() -> None:
    sim = cluster(3, spec(steps=("1", "100%")))
    for node in sim.nodes.values():
        node.no_ipvs = True
    status = sim.finish()
    assert (status.phase, status.message) == (Phase.FAILED, "node n0: the agent says: the kernel has no ip_vs")
    assert phases(sim) == {"n0": "RolledBack", "n1": "Waiting", "n2": "Waiting"}
    assert sim.nodes["n0"].spec is not None and sim.nodes["n0"].spec.mode is None
    assert sim.nodes["n1"].spec is None, "a node whose turn has not come is not touched"
    assert ("NodeFailed", "n0") in {(one.reason, one.node) for one in sim.told}


def test_an_agent_that_lies_is_caught_by_probes() -> None:
    sim = cluster(3, spec())
    sim.nodes["n0"].lies = True
    status = sim.finish()
    assert status.message == "node n0: 20 of 20 probes through nodeproxy-probe failed: connection refused"
    assert phases(sim)["n0"] == "RolledBack" and sim.nodes["n0"].mode == "iptables"


def test_an_image_goes_pod_by_pod_and_the_strategy_comes_back() -> None:
    sim = cluster(4, spec(Target(image=NEW), steps=("1", "100%")))
    images = []
    while sim.status.phase is not Phase.COMPLETED:
        sim.step()
        images.append((sim.image, sim.strategy["type"], sum(node.image == NEW for node in sim.nodes.values())))
    assert images[0] == (OLD, "RollingUpdate", 0)
    assert (NEW, "OnDelete", 1) in images and (NEW, "OnDelete", 3) in images
    assert all(new == 0 or strategy == "OnDelete" for _, strategy, new in images[:-2])
    assert (sim.image, sim.strategy) == (NEW, ROLLING)


def test_a_strategy_that_would_take_other_nodes_along_stays_on_delete() -> None:
    sim = cluster(4, spec(Target(image=NEW), nodes=Nodes(names=("n1", "n2")), steps=("100%",)))
    assert sim.finish().phase is Phase.COMPLETED
    assert (sim.image, sim.strategy) == (NEW, {"type": "OnDelete"})
    for _ in range(10):
        sim.elapse()
    assert [node.image for node in sim.nodes.values()] == [OLD, NEW, NEW, OLD]


def test_a_broken_image_is_caught_at_the_first_node() -> None:
    sim = cluster(3, spec(Target(image=NEW), timeouts=Timeouts(node_ready_seconds=60)))
    for node in sim.nodes.values():
        node.broken_image = True
    status = sim.finish()
    assert status.message == "node n0: not ready within 60 s: the agent's pod is not ready"
    assert (sim.image, sim.strategy) == (OLD, ROLLING)
    assert [node.image for node in sim.nodes.values()] == [OLD] * 3


def test_auto_rollback_takes_finished_nodes_back_and_without_it_they_stay() -> None:
    for auto in (True, False):
        sim = cluster(3, spec(steps=("100%",), auto_rollback=auto))
        sim.nodes["n2"].no_ipvs = True
        assert sim.finish().phase is Phase.FAILED
        rest = "RolledBack" if auto else "Updated"
        assert phases(sim) == {"n0": rest, "n1": rest, "n2": "RolledBack"}
        assert [node.mode for node in sim.nodes.values()] == ["iptables" if auto else "ipvs"] * 2 + ["iptables"]


def test_an_unfinished_image_roll_out_goes_back_to_the_old_template_but_keeps_finished_pods() -> None:
    sim = cluster(3, spec(Target(image=NEW), steps=("100%",), timeouts=Timeouts(node_ready_seconds=60)))
    sim.nodes["n1"].broken_image = True
    assert sim.finish().phase is Phase.FAILED
    assert (sim.image, sim.strategy) == (OLD, {"type": "OnDelete"})
    assert [node.image for node in sim.nodes.values()] == [NEW, OLD, OLD]


@pytest.mark.parametrize("proxy", ["nodeproxy", "kube-proxy"])
def test_nodes_move_between_proxies(proxy: str) -> None:
    sim = cluster(3, spec(Target(proxy=proxy)), by_label=True)
    for node in sim.nodes.values():
        node.labelled = proxy == "kube-proxy"
        node.image = OLD if node.labelled else None
    assert sim.finish().phase is Phase.COMPLETED
    assert {node.serving for node in sim.nodes.values()} == {proxy}
    assert not sim.cleanups


def test_a_node_that_kube_proxy_gets_back_is_cleaned_up_before_it_is_verified() -> None:
    sim = cluster(1, spec(Target(proxy="kube-proxy"), steps=("100%",)), by_label=True)
    until(sim, NodePhase.CHANGING, "n0")
    for _ in range(20):
        if sim.cleanups:
            break
        sim.step()
    assert phases(sim)["n0"] == "Changing" and sim.cleanups.keys() == {"n0"}
    until(sim, NodePhase.UPDATED, "n0")


def test_a_failed_move_to_nodeproxy_gives_the_node_back_to_kube_proxy() -> None:
    sim = cluster(2, spec(Target(proxy="nodeproxy", mode="ipvs")), by_label=True)
    for node in sim.nodes.values():
        node.labelled, node.image, node.no_ipvs = False, None, True
    assert sim.finish().phase is Phase.FAILED
    assert [node.serving for node in sim.nodes.values()] == ["kube-proxy"] * 2
    assert not any(isinstance(action, LabelNode) for action in sim.plan().actions)


def test_a_node_that_goes_away_is_left_out_and_one_that_never_becomes_ready_ends_it() -> None:
    sim = cluster(4, spec(steps=("100%",), timeouts=Timeouts(node_ready_seconds=60)))
    until(sim, NodePhase.CHANGING, "n0")
    del sim.nodes["n0"], sim.nodes["n3"]
    sim.nodes["n1"].ready = False
    until(sim, NodePhase.UPDATED, "n2")
    # n1, which is not Ready, comes last.
    assert phases(sim) == {"n0": "Gone", "n1": "Checking", "n2": "Updated", "n3": "Gone"}
    status = sim.finish()
    assert status.phase is Phase.FAILED
    assert status.message == "node n1: not well before anything was changed: not ready within 60 s: the node is not Ready"
    assert sim.nodes["n1"].spec is None and phases(sim)["n1"] == "Failed"


def test_a_node_that_dies_while_it_is_changed_is_named_as_not_taken_back() -> None:
    sim = cluster(2, spec(Target(image=NEW), timeouts=Timeouts(node_ready_seconds=60)))
    until(sim, NodePhase.CHANGING, "n0")
    sim.nodes["n0"].ready = False
    status = sim.finish()
    assert status.phase is Phase.FAILED and phases(sim) == {"n0": "Failed", "n1": "Waiting"}
    assert "n0" in (status.message or "") and "not taken back: n0" in (status.message or "")
    assert (sim.image, sim.strategy) == (OLD, {"type": "OnDelete"}), (
        "another pod of n0 gets the old image, and no other pod moves"
    )


def test_another_node_of_the_same_name_is_not_touched() -> None:
    sim = cluster(2, spec(steps=("100%",)))
    until(sim, NodePhase.CHANGING, "n0")
    sim.nodes["n1"].uid = "another"
    assert sim.finish().phase is Phase.COMPLETED
    assert phases(sim) == {"n0": "Updated", "n1": "Gone"} and sim.nodes["n1"].spec is None


def test_paused_lets_nodes_end_that_were_begun_and_begins_no_other() -> None:
    sim = cluster(3, spec(steps=("100%",)))
    until(sim, NodePhase.CHANGING, "n0")
    sim.spec = replace(sim.spec, paused=True)
    for _ in range(50):
        sim.step()
    assert (sim.status.phase, phases(sim)) == (Phase.PAUSED, {"n0": "Updated", "n1": "Waiting", "n2": "Waiting"})
    assert sim.status.message == "paused after 1 of 3 nodes"
    sim.spec = replace(sim.spec, paused=False)
    assert sim.finish().phase is Phase.COMPLETED


def test_steps_that_are_edited_count_at_once() -> None:
    sim = cluster(10, spec(steps=("1", "100%"), soak_seconds=10_000))
    while sim.status.phase is not Phase.SOAKING:
        sim.step()
    sim.spec = replace(sim.spec, steps=("3", "100%"))
    for _ in range(100):
        sim.step()
    assert sum(phase == "Updated" for phase in phases(sim).values()) == 3
    sim.spec = replace(sim.spec, steps=("100%",), soak_seconds=0)
    assert sim.finish().phase is Phase.COMPLETED


@pytest.mark.parametrize("how", ["Stop", "Rollback", "deleted"])
def test_aborted_or_deleted_it_stops_where_it_is(how: str) -> None:
    sim = cluster(4, spec(steps=("100%",)))
    until(sim, NodePhase.UPDATED, "n0")
    until(sim, NodePhase.CHANGING, "n1")
    if how == "deleted":
        sim.deleted = True
    else:
        sim.spec = replace(sim.spec, abort=how)
    status = sim.finish()
    assert status.phase is Phase.ABORTED
    rest = "RolledBack" if how == "Rollback" else "Updated"
    assert phases(sim) == {"n0": rest, "n1": "RolledBack", "n2": "Waiting", "n3": "Waiting"}
    assert [node.mode for node in sim.nodes.values()] == ["iptables" if how == "Rollback" else "ipvs"] + ["iptables"] * 3
    assert not sim.probes


def test_deleted_before_it_began_nothing_is_left() -> None:
    sim = cluster(2, spec())
    sim.step()
    sim.deleted = True
    sim.step()
    assert not sim.finalizers and not sim.status.nodes


def test_a_node_that_spoils_during_the_soak_time_fails() -> None:
    sim = cluster(3, spec())
    while sim.status.phase is not Phase.SOAKING:
        sim.step()
    sim.nodes["n0"].deaf = True
    sim.nodes["n0"].status = replace(sim.nodes["n0"].status, in_sync=False)
    for _ in range(8):
        sim.step()
    assert (sim.status.phase, sim.status.message) == (Phase.SOAKING, "node n0: the agent is not in sync; looking again")
    for _ in range(40):
        sim.step()
    assert sim.status.message == "node n0: in the soak time the agent is not in sync, and so it was for 180 s"
    assert sim.status.outcome is Phase.FAILED


def test_a_node_that_is_not_in_sync_for_a_moment_does_not_spoil_it() -> None:
    sim = cluster(2, spec(steps=("100%",)))
    while sim.status.phase is not Phase.SOAKING:
        sim.step()
    sim.nodes["n0"].deaf = True
    sim.nodes["n0"].status = replace(sim.nodes["n0"].status, in_sync=False)
    for _ in range(8):
        sim.step()
    sim.nodes["n0"].deaf = False
    assert sim.finish().phase is Phase.COMPLETED


def test_a_node_that_is_not_well_before_is_not_touched() -> None:
    sim = cluster(2, spec(timeouts=Timeouts(verification_seconds=60)))
    sim.nodes["n0"].deaf = True
    status = sim.finish()
    assert status.message == "node n0: not well before anything was changed: the agent has not answered within 60 s"
    assert sim.nodes["n0"].spec is not None and sim.nodes["n0"].spec.mode is None


def test_without_checks_before_a_sick_node_can_be_mended() -> None:
    sim = cluster(1, spec(Target(image=NEW), checks=Checks(before=False, which=("probes",))))
    sim.nodes["n0"].deaf = True
    assert sim.finish().phase is Phase.COMPLETED


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        ({"target": Target(mode="nft")}, "UnknownMode", "spec.target.mode: 'nft' is none of iptables, ipvs"),
        ({"target": Target()}, "NoTarget", "spec.target: says nothing that could be changed"),
        (
            {"target": Target(proxy="envoy")},
            "UnknownProxy",
            "spec.target.proxy: 'envoy' is neither nodeproxy nor kube-proxy",
        ),
        ({"target": Target(proxy="kube-proxy", mode="ipvs")}, "NoSense", "spec.target: kube-proxy has neither"),
        ({"target": Target(proxy="nodeproxy")}, "NotByLabel", "the DaemonSet nodeproxy does not go by the label"),
        ({"nodes": Nodes(names=("n0", "nx"))}, "NoSuchNode", "there is no node nx"),
        ({"nodes": Nodes(selector=Selector(match_labels={"a": "b"}))}, "NoMatchingNode", "no node has the labels"),
        (
            {"steps": ("50%", 1, "100%")},
            "Steps",
            "spec.steps[1]: 1 of 3 nodes are fewer than those of the step before (50%)",
        ),
        ({"steps": (1,)}, "Steps", "spec.steps: the last step must be 100%"),
        ({"steps": ("a", "100%")}, "Steps", "spec.steps: a step is a number of nodes, or a share as 10%"),
        (
            {"checks": Checks(thresholds=Thresholds(latency_factor=0.5))},
            "Thresholds",
            "spec.checks.thresholds.latencyFactor",
        ),
        ({"checks": Checks(thresholds=Thresholds(error_ratio=1))}, "Thresholds", "spec.checks.thresholds.errorRatio"),
        (
            {"checks": Checks(probes=Probes(count=200, timeout_seconds=30))},
            "Thresholds",
            "spec.timeouts.verificationSeconds",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_is_touched(change: dict[str, Any], reason: str, words: str) -> None:
    sim = cluster(3, replace(spec(), **change))
    sim.step()
    result = sim.step()
    (accepted,) = (one for one in sim.status.conditions if one.type == "Accepted")
    assert (accepted.status, accepted.reason) == ("False", reason)
    assert accepted.message.startswith(words)
    assert sim.status.phase is Phase.FAILED and sim.status.message == f"refused: {accepted.message}"
    assert {type(action) for action in result.actions} == {Tell, ReleaseFinalizer}
    assert all(node.spec is None for node in sim.nodes.values())


def test_an_overlapping_one_is_refused_by_name() -> None:
    sim = cluster(3, spec())
    sim.claims = {"n2": "spring"}
    status = sim.finish()
    assert status.message == "refused: node n2 belongs to roll-out spring, which has not ended"


def test_two_at_a_time() -> None:
    sim = cluster(6, spec(steps=("100%",), max_parallel=2))
    most = 0
    while sim.status.phase is not Phase.COMPLETED:
        sim.step()
        most = max(most, sum(phase in ("Checking", "Changing", "Verifying") for phase in phases(sim).values()))
    assert most == 2


def test_the_image_in_the_template_is_written_before_any_pod_is_deleted() -> None:
    sim = cluster(2, spec(Target(image=NEW)))
    kinds: list[str] = []
    while sim.status.phase is not Phase.COMPLETED:
        kinds += [type(action).__name__ for action in sim.step().actions]
    assert kinds.index(SetImage.__name__) < kinds.index(DeletePod.__name__)
