"""Whatever happens (crashes, repeats, faults, edits), the reconciliation never skips a verification, never goes beyond its
step, touches nothing it has not begun, and ends."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeproxy.operator.api import (
    FINISHED,
    FORWARD,
    IN_FLIGHT,
    NodePhase,
    Nodes,
    Phase,
    RolloutSpec,
    Selector,
    Target,
    Timeouts,
)
from nodeproxy.operator.steps import amounts
from tests.operator.simulation import NEW, OLD, OLDEST, SimNode, Simulation, cluster, state

TARGETS = [
    Target(mode="ipvs"),
    Target(image=NEW),
    Target(mode="ipvs", image=NEW),
    Target(configuration={"ipvs": {"scheduler": "lc"}}),
    Target(proxy="nodeproxy", mode="ipvs"),
    Target(proxy="kube-proxy"),
]
FAULTS = ["no_ipvs", "lies", "deaf", "broken_image", "crashes"]
CRASHES = ["crash before", "crash after", "crash between"]
DISTURBANCES = ["nothing"] * 6 + CRASHES + ["gone", "another", "not ready", "ready", "fault"]
EDITS = ["paused", "resumed", "steps", "Stop", "Rollback", "deleted", "soak"]


@st.composite
def specs(draw: st.DrawFn) -> RolloutSpec:
    return RolloutSpec(
        target=draw(st.sampled_from(TARGETS)),
        nodes=Nodes(selector=Selector()),
        steps=draw(st.sampled_from([("100%",), ("1", "100%"), (1, "10%", "50%", "100%"), ("2", "4", "100%")])),
        soak_seconds=draw(st.sampled_from([0, 12])),
        max_parallel=draw(st.integers(1, 3)),
        auto_rollback=draw(st.booleans()),
        timeouts=Timeouts(node_ready_seconds=60, verification_seconds=60),
    )


def disturb(sim: Simulation, data: st.DataObject, edits: bool) -> dict[str, Any]:
    what = data.draw(st.sampled_from(DISTURBANCES + (EDITS if edits else [])))
    names = sorted(sim.nodes)
    if not names:
        return {}
    node = sim.nodes[data.draw(st.sampled_from(names))]
    match what:
        case "crash before":
            return {"persisted": False}
        case "crash after":
            return {"actions": 0}
        case "crash between":
            return {"actions": data.draw(st.integers(0, 2))}
        case "gone":
            sim.remove(node.name)
        case "another":
            sim.add(
                SimNode(node.name, f"{node.uid}'", labelled=node.labelled, image=node.image, own_image=node.image or OLD)
            )
        case "not ready" | "ready":
            node.ready = what == "ready"
        case "fault":
            setattr(node, data.draw(st.sampled_from(FAULTS)), True)
        case "paused" | "resumed":
            sim.spec = replace(sim.spec, paused=what == "paused")
        case "steps":
            sim.spec = replace(
                sim.spec, steps=data.draw(st.sampled_from([("100%",), ("3", "100%"), ("1", "2", "3", "100%")]))
            )
        case "soak":
            sim.spec = replace(sim.spec, soak_seconds=data.draw(st.integers(0, 30)))
        case "Stop" | "Rollback":
            if sim.spec.abort is None:
                sim.spec = replace(sim.spec, abort=what)
        case "deleted":
            sim.deleted = True
    return {}


def check(sim: Simulation, before: dict[str, NodePhase]) -> None:
    """What must hold after every pass."""
    status = sim.status
    lines = {line.name: line for line in status.nodes}
    for name, line in lines.items():
        node = sim.nodes.get(name)
        old = before.get(name)
        if node is None or node.uid != line.uid:
            continue
        if line.phase is NodePhase.WAITING and old in (None, NodePhase.WAITING):
            assert node.spec is None or node.spec.mode is None, f"{name} was told something before its turn"
        if line.phase is NodePhase.UPDATED and old is not NodePhase.UPDATED:
            assert old is NodePhase.VERIFYING, f"{name} was not verified"
            assert state(node) in sim.passed.get(name, set()), f"{name} is said to be good, and no probe has found it so"
            assert line.figures_after is not None
    if status.outcome is None and status.nodes:
        flying = [line for line in status.nodes if line.phase in FORWARD]
        assert len(flying) <= sim.spec.max_parallel
    begun = {name for name, line in lines.items() if line.phase not in (NodePhase.WAITING, NodePhase.GONE)}
    fresh = begun - {name for name, phase in before.items() if phase is not NodePhase.WAITING}
    if fresh:
        total = sum(line.phase is not NodePhase.GONE for line in status.nodes)
        allowed = amounts(sim.spec.steps, total)[min(status.step, len(sim.spec.steps)) - 1]
        assert len(begun) <= allowed, f"{len(begun)} nodes are begun, {allowed} is what the step allows"
        assert not sim.spec.paused and sim.spec.abort is None and not sim.deleted


def prepare(sim: Simulation, *, canary: bool = False) -> None:
    """`canary`: an earlier roll-out has brought the image to some nodes, and others have an older one than all."""
    for node in sim.nodes.values():
        node.labelled = sim.spec.target.proxy != "nodeproxy"
        node.own_image = [OLD, NEW, OLDEST][int(node.name[1:]) % 3] if canary else OLD
        node.image = node.own_image if node.labelled else None
    if canary:
        sim.image, sim.strategy = NEW, {"type": "OnDelete"}


@settings(max_examples=250, deadline=None)
@given(specs(), st.integers(1, 7), st.booleans(), st.data())
def test_it_never_skips_a_verification_and_always_ends(
    spec: RolloutSpec, count: int, edits: bool, data: st.DataObject
) -> None:
    sim = cluster(count, spec, by_label=spec.target.proxy is not None)
    prepare(sim, canary=data.draw(st.booleans()))
    for _ in range(data.draw(st.integers(0, 40))):
        before = {line.name: line.phase for line in sim.status.nodes}
        sim.step(**disturb(sim, data, edits))
        check(sim, before)
    sim.spec = replace(sim.spec, paused=False)
    for _ in range(2000):
        if not sim.finalizers and (sim.deleted or sim.status.phase in FINISHED):
            break
        before = {line.name: line.phase for line in sim.status.nodes}
        sim.step()
        check(sim, before)
    else:
        raise AssertionError(f"does not end: {sim.status}")
    if sim.status.nodes:
        ended(sim)


def ended(sim: Simulation) -> None:
    """What must hold in the end."""
    status = sim.status
    assert not [line for line in status.nodes if line.phase in IN_FLIGHT]
    assert not [id for id in sim.probes if id.startswith("01234567")], "probes are left"
    assert not sim.cleanups
    lines = {line.name: line for line in status.nodes}
    # What leaves after the end is not the roll-out's any more: the API server's garbage collector sees to it.
    gone = {line.name for line in status.nodes if line.phase is NodePhase.GONE}
    assert not gone & sim.orphans.keys(), "what a node was told is left"
    for node in sim.nodes.values():
        line = lines.get(node.name)
        if line is None or line.uid != node.uid:
            told = node.spec is not None and node.owner != node.uid
            assert not told or node.name not in gone, f"another {node.name} has what the first was told"
            continue
        if line.phase is NodePhase.ROLLED_BACK and node.pod_ready and not node.deaf:
            # A pod that comes later has what the template says then: what it was before.
            assert sim.spec.target.image is None or node.image in (None, node.own_image), f"{node.name} is not as before"
            assert node.spec is None or node.spec.mode is None
        if line.phase is NodePhase.ROLLED_BACK and node.serving == "kube-proxy":
            assert node.spec is None, f"a later agent of {node.name} would go by what this one was told"
    if status.phase is Phase.COMPLETED:
        assert {line.phase for line in status.nodes} <= {NodePhase.UPDATED, NodePhase.GONE}
    elif status.outcome is not None and status.take_back:
        assert NodePhase.UPDATED not in {line.phase for line in status.nodes}
    if status.phase is Phase.FAILED:
        assert status.message


@settings(max_examples=60, deadline=None)
@given(specs(), st.integers(1, 5), st.data())
def test_the_same_pass_again_changes_nothing(spec: RolloutSpec, count: int, data: st.DataObject) -> None:
    """Idempotent: with nothing new to see, a second pass comes to the same status, and asks for the same things."""
    sim = cluster(count, spec, by_label=spec.target.proxy is not None)
    prepare(sim)
    for _ in range(data.draw(st.integers(1, 60))):
        sim.step()
    first = sim.plan()
    sim.status = first.status
    sim.finalizers = sim.finalizers or ["nodeproxy.io/rollout"]
    again = sim.plan()
    third = sim.plan()
    assert again == third
    for action in first.actions:
        sim.act(action)
        sim.act(action)  # a second time has no effect
    assert sim.finish().phase in (Phase.COMPLETED, Phase.FAILED)
