"""What fits into a roll-out: texts as its definition takes them, and no more lines than a real API server can store."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
from msgspec.structs import replace

from hack.controlplane import ControlPlane
from nodeproxy.api.proxy_node import ObjectMeta, ProxyNode, ProxyNodeSpec
from nodeproxy.operator.api import (
    FINALIZER,
    Condition,
    NodeLine,
    NodePhase,
    Nodes,
    Phase,
    ProxyRollout,
    RolloutSpec,
    RolloutStatus,
    Selector,
    Target,
)
from nodeproxy.operator.limits import MAX_BYTES, MAX_MESSAGE, MAX_REASON, check_weight, finished_line, shortened, weight
from nodeproxy.operator.plan import plan
from nodeproxy.operator.steps import Refused
from nodeproxy.operator.world import DaemonSetSeen, NodeSeen, TellNode, World
from tests.operator.conftest import ROLLOUTS, Rollouts
from tests.operator.test_definitions import schema

SPEC = RolloutSpec(target=Target(mode="ipvs"), nodes=Nodes(selector=Selector()))
ROLLOUT = ProxyRollout(metadata=ObjectMeta(name="r", uid="u"), spec=SPEC)
NAMES = [f"ip-10-0-{i // 256}-{i % 256}.eu-central-1.compute.internal" for i in range(1000)]
IMAGE = "registry.example.com/infrastructure/network/nodeproxy:v0.2.0"


def world(bytes_each: int) -> World:
    """A thousand nodes with configurations of so many bytes."""
    configuration = {"ipvs": {"excludeCIDRs": ["x" * bytes_each]}} if bytes_each else None
    told = ProxyNodeSpec(configuration=configuration)
    return World(
        nodes={name: NodeSeen(name=name, uid="01234567-89ab-cdef-0123-456789abcdef") for name in NAMES},
        proxy_nodes={name: ProxyNode(metadata=ObjectMeta(name=name), spec=told) for name in NAMES},
        daemon_set=DaemonSetSeen(image=IMAGE, update_strategy={}),
    )


def texts(length: int) -> RolloutStatus:
    text = "é" * length
    condition = Condition(
        type="Succeeded", status="False", reason="Failed", message=text, last_transition_time="2026-01-01T00:00:00Z"
    )
    return RolloutStatus(
        message=text, conditions=[condition], nodes=[NodeLine(name="n1", phase=NodePhase.FAILED, reason=text)]
    )


def test_texts_are_as_long_as_the_definition_takes_them() -> None:
    status = shortened(texts(3000))
    reason = status.nodes[0].reason
    assert reason == "é" * (MAX_REASON - 1) + "…"
    assert status.message == status.conditions[0].message == "é" * (MAX_MESSAGE - 1) + "…"
    assert shortened(status) == status and shortened(texts(1024)) == texts(1024)
    fields = schema("proxyrollouts")["status"]["properties"]
    assert fields["message"]["maxLength"] == MAX_MESSAGE
    assert fields["conditions"]["items"]["properties"]["message"]["maxLength"] == MAX_MESSAGE
    assert fields["nodes"]["items"]["properties"]["reason"]["maxLength"] == MAX_REASON


def test_a_thousand_nodes_that_were_told_nothing_are_not_too_many() -> None:
    check_weight(ROLLOUT, NAMES, world(0))


def test_a_thousand_nodes_with_large_configurations_are_refused_by_numbers() -> None:
    with pytest.raises(Refused, match=r"1000 nodes would come to 1\d{3} kB, of which 10\d\d kB are the configurations"):
        check_weight(ROLLOUT, NAMES, world(1000))


def test_such_a_roll_out_ends_before_it_begins() -> None:
    rollout = replace(ROLLOUT, metadata=ObjectMeta(name="r", uid="u", finalizers=[FINALIZER]))
    result = plan(rollout, world(1000), 1_800_000_000.0)
    status = result.status
    assert not any(isinstance(action, TellNode) for action in result.actions)
    assert status.phase is Phase.FAILED and not status.nodes
    (accepted,) = (one for one in status.conditions if one.type == "Accepted")
    assert (accepted.status, accepted.reason) == ("False", "TooLarge")


@pytest.fixture
def lines() -> Iterator[list[NodeLine]]:
    """As many bytes as are accepted at most."""
    each = 0
    while weight(ROLLOUT, NAMES, world(each + 50))[0] <= MAX_BYTES:
        each += 50
    found = world(each)
    check_weight(ROLLOUT, NAMES, found)
    yield [finished_line(ROLLOUT, name, found) for name in NAMES]


@pytest.mark.controlplane
def test_what_is_accepted_a_real_server_stores(cluster: ControlPlane, rollouts: Rollouts, lines: list[NodeLine]) -> None:
    made = rollouts.create("spring", {"mode": "ipvs"})
    nodes = [replace(line, reason="é" * MAX_REASON) if i < 50 else line for i, line in enumerate(lines)]  # those in flight
    status = RolloutStatus(phase=Phase.PROGRESSING, nodes=nodes)
    answer = cluster.request("PUT", f"{ROLLOUTS}/spring/status", {**made, "status": msgspec.to_builtins(status)})
    assert len(answer["status"]["nodes"]) == 1000
