"""What is looked at while a roll-out soaks: nodes and pods, which say more than the last word of an agent that is dead."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from nodeproxy.operator.api import Phase, Target, Timeouts
from tests.operator.simulation import Simulation, cluster, phases, spec, until_it_soaks


def steps(sim: Simulation, count: int) -> None:
    for _ in range(count):
        sim.step()


def test_an_agent_that_dies_in_the_soak_time_fails_whatever_it_said_last() -> None:
    sim = cluster(3, spec(soak_seconds=3600, auto_rollback=True))
    until_it_soaks(sim)
    sim.nodes["n0"].crashes = True
    assert sim.nodes["n0"].status.in_sync
    steps(sim, 5)
    assert (sim.status.phase, sim.status.message) == (Phase.SOAKING, "node n0: nodeproxy's pod is not ready; looking again")
    steps(sim, 40)
    assert sim.status.outcome is Phase.FAILED
    assert (sim.status.message or "").startswith("node n0: in the soak time nodeproxy's pod is not ready, and so it was for")
    assert sim.finish().phase is Phase.FAILED


def test_a_node_that_dies_in_the_soak_time_fails_with_the_patience_that_a_restart_takes() -> None:
    sim = cluster(2, spec(timeouts=Timeouts(node_ready_seconds=300, verification_seconds=60)))
    until_it_soaks(sim)
    sim.nodes["n0"].ready = False
    steps(sim, 50)
    assert (sim.status.phase, sim.status.outcome) == (Phase.SOAKING, None), "not before 300 s"
    steps(sim, 20)
    assert sim.finish().message == (
        "node n0: in the soak time the node is not Ready, and so it was for 300 s; not taken back: n0"
    )


def test_kube_proxys_pod_is_looked_at_where_kube_proxy_is_wanted() -> None:
    sim = cluster(2, spec(Target(proxy="kube-proxy")), by_label=True)
    until_it_soaks(sim)
    sim.nodes["n0"].crashes = True
    steps(sim, 50)
    assert (sim.status.message or "").startswith("node n0: in the soak time kube-proxy's pod is not ready")


def test_a_pod_that_comes_back_in_time_spoils_nothing() -> None:
    sim = cluster(2, spec())
    for _ in range(2):
        until_it_soaks(sim)
        sim.nodes["n0"].crashes = True
        steps(sim, 20)
        assert sim.status.phase is Phase.SOAKING
        sim.nodes["n0"].crashes = False
        sim.step()
        sim.step()
        assert not any(line.unwell_since for line in sim.status.nodes)
    assert sim.finish().phase is Phase.COMPLETED


def test_paused_nothing_fails_and_the_soak_time_does_not_end_with_a_dead_agent() -> None:
    sim = cluster(1, spec())
    until_it_soaks(sim)
    sim.nodes["n0"].crashes = True
    sim.spec = replace(sim.spec, paused=True)
    steps(sim, 100)
    assert (sim.status.phase, sim.status.message) == (Phase.PAUSED, "node n0: nodeproxy's pod is not ready; looking again")
    sim.spec = replace(sim.spec, paused=False)
    steps(sim, 50)
    assert sim.status.outcome is Phase.FAILED


def test_nodes_are_looked_at_also_where_no_time_is_given_to_soak() -> None:
    sim = cluster(1, spec(soak_seconds=0))
    while phases(sim).get("n0") != "Updated":
        sim.step()
    sim.nodes["n0"].crashes = True
    steps(sim, 10)
    assert sim.status.message == "node n0: nodeproxy's pod is not ready; looking again"


@pytest.mark.parametrize("seconds", [0, 300])
def test_a_soak_time_that_is_edited_counts_at_once(seconds: int) -> None:
    sim = cluster(2, spec(soak_seconds=3600))
    until_it_soaks(sim)
    began = sim.now
    sim.spec = replace(sim.spec, soak_seconds=seconds)
    while sim.status.step == 1:
        assert sim.status.soak_since is not None
        sim.step()
        assert sim.now - began < 400, sim.status
    assert sim.now - began >= seconds


def test_a_finished_node_that_leaves_the_cluster_is_left_out_even_if_its_last_word_was_not_good() -> None:
    sim = cluster(3, spec(auto_rollback=True))
    until_it_soaks(sim)
    sim.nodes["n0"].status = replace(sim.nodes["n0"].status, in_sync=False)
    sim.remove("n0")
    status = sim.finish()
    assert (status.phase, status.message) == (Phase.COMPLETED, "2 nodes have mode ipvs")
    assert phases(sim) == {"n0": "Gone", "n1": "Updated", "n2": "Updated"}
    assert not sim.orphans, "what it was told is removed"
