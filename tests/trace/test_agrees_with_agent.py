"""Every flow of packet_flows.json: the walk through the rules that an agent programmed agrees with the oracle and the scene.

The oracle, the programmers and the interpreter of rules know nothing of each other: where all three agree, all are right.
(The packets themselves are sent by tests/conformance, to the same expectations.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from hack.random_scenes import make_scene
from nodeproxy.sandbox.flows import expected
from nodeproxy.sandbox.scene import Flow, Scene
from nodeproxy.trace.results import Agreement, Trace
from nodeproxy.trace.walk import End
from tests.trace.node import SCENES, TracedNode, traced_node
from tests.ways import IPVS_LEGACY, IPVS_NFT, LEGACY, NFT, Way, ipvs

pytestmark = pytest.mark.kernel

LARGE = ("scene-27", "scene-28")
# In the VM each costs seconds; these have every kind of frontend, policy and verdict. NODEPROXY_ALL_SCENES=1 takes all.
IN_IPVS_MODE = (*LARGE, *(f"scene-{number:02}" for number in (2, 3, 9, 10, 13, 14, 21, 26)))
FIRST, _, COUNT = os.environ.get("RANDOM_SCENES", "101:3").partition(":")
SEEDS = range(int(FIRST), int(FIRST) + int(COUNT or 1))
ALL = bool(os.environ.get("NODEPROXY_ALL_SCENES"))


def in_all_ways() -> Iterator[object]:
    for number, (name, scene) in enumerate(SCENES.items()):
        for way in (LEGACY, NFT) if name in LARGE else ((LEGACY, NFT)[number % 2],):
            yield pytest.param(scene, way, id=f"{name}-{way}")
        if ALL or name in IN_IPVS_MODE:
            way = (IPVS_LEGACY, IPVS_NFT)[number % 2]
            yield ipvs(scene, way, id=f"{name}-{way}")


@pytest.mark.parametrize(("scene", "way"), list(in_all_ways()))
def test_walk_oracle_and_scene_agree(scene: Scene, way: Way) -> None:
    with traced_node(scene, way) as node:
        wrong = [text for flow in scene.flows for text in problems(node, flow)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_scenes(seed: int) -> None:
    """Scenes that nobody thought of: many Services of every sort, policies, hints, affinity, in either family."""
    scene, way = make_scene(seed), (LEGACY, NFT)[seed % 2]
    with traced_node(scene, way) as node:
        wrong = [text for flow in scene.flows for text in problems(node, flow)]
    assert scene.flows
    assert not wrong, "\n".join(wrong)


def problems(node: TracedNode, flow: Flow) -> Iterator[str]:
    trace = node.trace(flow)
    if trace.agreement is not Agreement.AGREES:
        yield f"{flow}: {trace.agreement}: {trace.differences} {trace.notes}"
    expect = expected(node.layout, flow, node.way.mode)
    seen = ends(trace)
    if isinstance(expect, list):
        if seen != set(expect):
            yield f"{flow}: walked to {seen}"
        yield from masquerading(node, flow, trace)
    elif expect not in seen or len(seen) > 1:
        yield f"{flow}: walked to {seen}"


def ends(trace: Trace) -> set[str]:
    """In the words of a scene: backends, or what else became of the packet."""
    assert trace.kernel is not None
    words = {End.DROPPED: "DROP", End.REJECTED: "REJECT"}
    return {
        one.backend or words.get(End(one.end)) or ("ACCEPT" if trace.expected.outcome == "accept" else "no-match")
        for one in trace.kernel.destinations
    }


def masquerading(node: TracedNode, flow: Flow, trace: Trace) -> Iterator[str]:
    """`masquerade` of a flow is about backends that are not the sender itself, which gets its own packets masqueraded."""
    assert trace.kernel is not None
    for one in trace.kernel.destinations:
        hairpin = one.backend is not None and one.backend.rpartition(":")[0].strip("[]") == flow.source
        if one.end == End.SENT and one.masqueraded != (flow.masquerade or hairpin):
            yield f"{flow}: to {one.backend}: masqueraded is {one.masqueraded}"
