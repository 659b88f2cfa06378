"""Traffic policies Cluster and Local, of internal and of external traffic."""

from __future__ import annotations

import pytest

from e2e.harness.stage import A1, A2, ALL, ON_A, SERVERS
from e2e.harness.world import DROPPED, World


@pytest.mark.smoke
def test_internal_policy_local(world: World) -> None:
    """`internalTrafficPolicy: Local`: a client reaches the pods of its own node only, and nobody where there are none.

    Nobody means that packets are dropped, so that a client does not take the Service for gone.
    """
    everywhere = world.service(internalTrafficPolicy="Local")
    world.answers(world.stage.client_a, everywhere.address, 80, {A1, A2})
    world.answers(world.stage.node_a, everywhere.address, 80, {A1, A2})
    world.answers(world.stage.client_b, everywhere.address, 80, SERVERS - {A1, A2})
    only_a = world.service(selector=ON_A, internalTrafficPolicy="Local", type="NodePort")
    world.answers(world.stage.client_a, only_a.address, 80, {A1, A2})
    world.answers(world.stage.node_b, world.stage.b.address, only_a.node_port, {A1, A2})  # b has programmed it
    for place in (world.stage.client_b, world.stage.node_b):
        world.never(place, only_a.address, 80, DROPPED)


@pytest.mark.smoke
def test_external_policy_local(world: World) -> None:
    """`externalTrafficPolicy: Local`: a client outside keeps its address, and reaches pods of the node it came to only.

    On a node without any its packets are dropped. Pods and the node itself reach all pods there: they are not outside.
    """
    service = world.service(selector=ON_A, type="NodePort", externalTrafficPolicy="Local")
    outside = world.stage.outside
    answers = world.answers(outside, world.stage.a.address, service.node_port, {A1, A2})
    assert {answer.source for answer in answers} == {outside.address}
    for place in (world.stage.client_b, world.stage.node_b):
        world.answers(place, world.stage.b.address, service.node_port, {A1, A2})
        world.answers(place, service.address, 80, {A1, A2})
    world.never(outside, world.stage.b.address, service.node_port, DROPPED)


def test_load_balancer_and_policy_local(world: World) -> None:
    """The same at the address of a load balancer, wherever it sends its packets."""
    service = world.service(selector=ON_A, type="LoadBalancer", externalTrafficPolicy="Local")
    at_a, at_b = world.address_at(world.stage.a), world.address_at(world.stage.b)
    world.load_balancer(service, at_a, at_b)
    outside = world.stage.outside
    answers = world.answers(outside, at_a, 80, {A1, A2})
    assert {answer.source for answer in answers} == {outside.address}
    for place in (world.stage.client_a, world.stage.client_b, world.stage.node_a, world.stage.node_b):
        world.answers(place, at_b, 80, {A1, A2})
    world.never(outside, at_b, 80, DROPPED)


def test_policy_changes(world: World) -> None:
    """A policy that changes is in force at once, in both directions, and leaves the other policy alone."""
    service = world.service(selector=ON_A, type="NodePort", externalTrafficPolicy="Cluster")
    outside, b = world.stage.outside, world.stage.b
    answers = world.answers(outside, b.address, service.node_port, {A1, A2})
    assert outside.address not in {answer.source for answer in answers}
    world.change(service, externalTrafficPolicy="Local")
    world.never(outside, b.address, service.node_port, DROPPED)
    answers = world.answers(outside, world.stage.a.address, service.node_port, {A1, A2})
    assert {answer.source for answer in answers} == {outside.address}
    world.answers(world.stage.client_b, service.address, 80, {A1, A2})
    world.change(service, externalTrafficPolicy="Cluster")
    world.answers(outside, b.address, service.node_port, {A1, A2})


def test_policy_local_follows_the_pods(world: World) -> None:
    """A node begins to answer when its first pod is ready, and ends with the last one."""
    labels = {"app": world.unique("follows")}
    service = world.service(selector=labels, type="NodePort", externalTrafficPolicy="Local")
    outside, a, b = world.stage.outside, world.stage.a, world.stage.b
    (first,) = world.servers([("first", a)], labels)
    world.answers(outside, a.address, service.node_port, {first})
    world.never(outside, b.address, service.node_port, DROPPED)
    (second,) = world.servers([("second", b)], labels)
    world.answers(outside, b.address, service.node_port, {second})
    world.api.delete("Pod", first)
    world.never(outside, a.address, service.node_port, DROPPED)
    world.answers(world.stage.client_a, a.address, service.node_port, {second})


def test_policies_of_one_service_differ(world: World) -> None:
    """Internal and external policy are two things: pods may go everywhere and clients outside may not, and vice versa."""
    outside, b = world.stage.outside, world.stage.b
    one = world.service(selector=ALL, type="NodePort", externalTrafficPolicy="Local", internalTrafficPolicy="Cluster")
    world.answers(outside, b.address, one.node_port, SERVERS - {A1, A2})
    world.answers(world.stage.client_b, one.address, 80, SERVERS)
    other = world.service(selector=ALL, type="NodePort", externalTrafficPolicy="Cluster", internalTrafficPolicy="Local")
    world.answers(outside, b.address, other.node_port, SERVERS)
    world.answers(world.stage.client_b, other.address, 80, SERVERS - {A1, A2})
