"""Topology hints: traffic stays in its zone or on its node where the hints of all endpoints say that it may.

Node a is in zone-a, node b in zone-b.
"""

from __future__ import annotations

import pytest

from e2e.harness.stage import A1, A2, SERVERS, B
from e2e.harness.world import World


def test_zone_hints_by_hand(world: World) -> None:
    """Each zone's clients, pods and nodes, reach the endpoints that are hinted for it, wherever these are.

    So do clients outside that come in by a node of the zone. The zones are crossed here: hints are told from nearness.
    """
    service = world.service(selector=None, type="NodePort")
    hinted = [
        world.endpoint(A1, zones=["zone-b"]),
        world.endpoint(A2, zones=["zone-b"]),
        world.endpoint(B, zones=["zone-a"]),
    ]
    world.slice(service, hinted)
    stage = world.stage
    for place in (stage.client_a, stage.node_a):
        world.answers(place, service.address, 80, {B})
    for place in (stage.client_b, stage.node_b):
        world.answers(place, service.address, 80, {A1, A2})
    world.answers(stage.outside, stage.a.address, service.node_port, {B})
    world.answers(stage.outside, stage.b.address, service.node_port, {A1, A2})


def test_node_hints_by_hand(world: World) -> None:
    """Hints for nodes go before those for zones."""
    a, b = world.stage.a.name, world.stage.b.name
    service = world.service(selector=None)
    zones = ["zone-a", "zone-b"]
    hinted = [world.endpoint(pod, zones=zones, nodes=[node]) for pod, node in ((A1, b), (A2, a), (B, a))]
    world.slice(service, hinted)
    world.answers(world.stage.client_a, service.address, 80, {A2, B})
    world.answers(world.stage.client_b, service.address, 80, {A1})


def test_hints_that_do_not_apply(world: World) -> None:
    """Hints are passed over where an endpoint has none, and where none is for this zone: better far than not at all."""
    some = world.service("some", selector=None)
    world.slice(some, [world.endpoint(A1, zones=["zone-a"]), world.endpoint(A2, zones=["zone-a"]), world.endpoint(B)])
    elsewhere = world.service("elsewhere", selector=None)
    world.slice(elsewhere, [world.endpoint(pod, zones=["zone-a"]) for pod in (A1, A2, B)])
    for service in (some, elsewhere):
        world.answers(world.stage.client_a, service.address, 80, SERVERS)
        world.answers(world.stage.client_b, service.address, 80, SERVERS)


@pytest.mark.parametrize("distribution", ["PreferSameZone", "PreferSameNode"])
def test_traffic_distribution(world: World, distribution: str) -> None:
    """`trafficDistribution` keeps traffic in the zone, or on the node, by the hints that Kubernetes' controller writes."""
    service = world.service(trafficDistribution=distribution)
    world.answers(world.stage.client_a, service.address, 80, {A1, A2})
    world.answers(world.stage.client_b, service.address, 80, {B})
    world.change(service, trafficDistribution=None)
    world.answers(world.stage.client_b, service.address, 80, SERVERS)


def test_same_node_and_the_last_pod_there(world: World) -> None:
    """With PreferSameNode a node whose last pod goes is served by pods elsewhere."""
    labels = {"app": world.unique("near")}
    near, far = world.servers([("near", world.stage.a), ("far", world.stage.b)], labels)
    service = world.service(selector=labels, trafficDistribution="PreferSameNode")
    world.answers(world.stage.client_a, service.address, 80, {near}, count=10)
    world.api.delete("Pod", near)
    world.answers(world.stage.client_a, service.address, 80, {far})
