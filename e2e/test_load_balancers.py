"""What load balancers need of a node: health-check node ports; and whom they may let in: source ranges."""

from __future__ import annotations

import json

import pytest

from e2e.harness.stage import A1, A2, ON_A, SERVERS, Node
from e2e.harness.waiting import eventually
from e2e.harness.world import DROPPED, Service, World


def health(world: World, node: Node, port: int) -> tuple[int, int]:
    """The status of a node's health-check node port, and how many endpoints it says that it has; zeros without an answer."""
    try:
        status, text = world.stage.outside.get(f"http://{node.address}:{port}/healthz", timeout=3)
    except OSError:
        return 0, 0
    return status, json.loads(text)["localEndpoints"]


def becomes(world: World, node: Node, service: Service, wanted: tuple[int, int]) -> None:
    """Wait for a status and a count at a Service's health-check node port."""

    def right() -> bool:
        seen = health(world, node, service.health_check_node_port)
        assert seen == wanted, f"seen {seen}"
        return True

    eventually(right, f"node {node.letter} says {wanted}")


@pytest.mark.smoke
def test_health_check_node_port(world: World) -> None:
    """A node with pods of a Service says 200 and how many, one without 503, and both follow the pods and the Service."""
    service = world.service(selector=ON_A, type="LoadBalancer", externalTrafficPolicy="Local")
    a, b = world.stage.a, world.stage.b
    becomes(world, a, service, (200, 2))
    becomes(world, b, service, (503, 0))
    status, text = world.stage.outside.get(f"http://{a.address}:{service.health_check_node_port}/")
    name = json.loads(text)["service"]
    assert (status, name) == (200, {"namespace": "e2e", "name": service.name})
    world.change(service, selector={"app": "nobody", "on": None})
    becomes(world, a, service, (503, 0))
    world.change(service, selector={"app": "server", "on": "b"})
    becomes(world, b, service, (200, 1))
    world.change(service, externalTrafficPolicy="Cluster")
    for node in (a, b):
        eventually(lambda: health(world, node, service.health_check_node_port) == (0, 0), f"{node.letter} says nothing")  # noqa: B023


def test_health_check_follows_pods(world: World) -> None:
    """A node whose last pod of the Service ends says 503 while that still serves: the load balancer is to go elsewhere."""
    labels = {"app": world.unique("health")}
    ending = ["--delay-shutdown", "60"]
    (pod,) = world.servers([("health", world.stage.a)], labels, arguments=ending, grace=90)
    service = world.service(selector=labels, type="LoadBalancer", externalTrafficPolicy="Local")
    becomes(world, world.stage.a, service, (200, 1))
    world.api.delete("Pod", pod)
    becomes(world, world.stage.a, service, (503, 0))
    world.answers(world.stage.outside, world.stage.a.address, service.node_port, {pod}, count=5)


def test_source_ranges(world: World) -> None:
    """Only clients from the ranges reach the address of the load balancer; node port and cluster IP are open to all.

    Ranges that change are in force for the next connection.
    """
    allowed, denied = world.stage.sources(2)
    service = world.service(type="LoadBalancer", loadBalancerSourceRanges=[f"{allowed}/32", "2001:db8::/32"])
    address = world.address_at(world.stage.a)
    world.load_balancer(service, address)
    outside, a = world.stage.outside, world.stage.a
    world.answers(outside, address, 80, SERVERS, source=allowed)
    world.never(outside, address, 80, DROPPED, source=denied)
    world.answers(outside, a.address, service.node_port, SERVERS, source=denied)
    world.never(world.stage.client_a, address, 80, DROPPED)
    world.answers(world.stage.client_a, service.address, 80, SERVERS)
    world.change(service, loadBalancerSourceRanges=[f"{denied}/32", f"{world.stage.client_a.address}/32"])
    world.answers(outside, address, 80, SERVERS, source=denied)
    world.answers(world.stage.client_a, address, 80, SERVERS)
    world.never(outside, address, 80, DROPPED, source=allowed)
    world.change(service, loadBalancerSourceRanges=None)
    world.answers(outside, address, 80, SERVERS, source=allowed)


def test_source_ranges_and_policy_local(world: World) -> None:
    """Ranges hold where the client's address is kept, too."""
    allowed, denied = world.stage.sources(2)
    service = world.service(
        selector=ON_A, type="LoadBalancer", externalTrafficPolicy="Local", loadBalancerSourceRanges=[f"{allowed}/32"]
    )
    address = world.address_at(world.stage.a)
    world.load_balancer(service, address)
    answers = world.answers(world.stage.outside, address, 80, {A1, A2}, source=allowed)
    assert {answer.source for answer in answers} == {allowed}
    world.never(world.stage.outside, address, 80, DROPPED, source=denied)


def test_a_load_balancer_that_goes(world: World) -> None:
    """An address that leaves the status is answered no more, one that comes is, and the rest of the Service stays."""
    service = world.service(type="LoadBalancer")
    first, second = world.address_at(world.stage.a), world.address_at(world.stage.a)
    world.load_balancer(service, first)
    outside = world.stage.outside
    world.answers(outside, first, 80, SERVERS)
    world.load_balancer(service, second)
    world.answers(outside, second, 80, SERVERS)
    world.gone(outside, first, 80)
    world.answers(outside, world.stage.b.address, service.node_port, SERVERS)
