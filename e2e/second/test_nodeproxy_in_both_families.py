"""Dual stack: each family of a Service is served on its own, by the pods' addresses of that family."""

from __future__ import annotations

from typing import Any

import pytest

from e2e.harness.asking import name_of
from e2e.harness.dns import resolve
from e2e.harness.objects import port, udp_port
from e2e.harness.settings import NAMESPACE
from e2e.harness.stage import A1, A2, ON_A, SERVERS
from e2e.harness.waiting import eventually
from e2e.harness.world import DROPPED, REJECTED, World
from e2e.second.steps import Migration

BOTH: dict[str, Any] = {"ipFamilyPolicy": "RequireDualStack"}


@pytest.fixture(autouse=True)
def with_nodeproxy(migration: Migration) -> None:
    migration.nodeproxy_everywhere()


def of(family: int, addresses: tuple[str, ...]) -> str:
    """The address of a family, 4 or 6."""
    return next(one for one in addresses if (":" in one) == (family == 6))


@pytest.mark.parametrize("family", [4, 6])
def test_cluster_ip_and_node_port(world: World, family: int) -> None:
    """A dual-stack Service is served at its address of either family, by TCP and UDP; pods keep their own address."""
    stage = world.stage
    service = world.service(ports=[port(), udp_port()], type="NodePort", **BOTH)
    address = of(family, service.addresses)
    for place in stage.inside:
        answers = world.answers(place, address, 80, SERVERS)
        if place in (stage.client_a, stage.client_b):
            assert {answer.source for answer in answers} == {place.address_of(family)}
        world.answers(place, address, 80, SERVERS, protocol="UDP")
    for node in stage.nodes:
        for place in (*stage.inside, stage.outside):
            world.answers(place, of(family, node.addresses), service.node_ports["http"], SERVERS)


def test_ipv6_alone(world: World) -> None:
    """A Service of IPv6 alone is served there, and its node port is not one of IPv4."""
    stage = world.stage
    service = world.service(type="NodePort", ipFamilyPolicy="SingleStack", ipFamilies=["IPv6"])
    assert [":" in address for address in service.addresses] == [True]
    for place in stage.inside:
        world.answers(place, service.address, 80, SERVERS)
    world.answers(stage.outside, of(6, stage.a.addresses), service.node_port, SERVERS)
    world.gone(stage.outside, of(4, stage.a.addresses), service.node_port)


def test_ipv6_and_policy_local(world: World) -> None:
    """Policy Local holds in IPv6: the client's address is kept, and a node without a pod drops."""
    stage = world.stage
    service = world.service(selector=ON_A, type="NodePort", externalTrafficPolicy="Local", **BOTH)
    answers = world.answers(stage.outside, of(6, stage.a.addresses), service.node_port, {A1, A2})
    assert {answer.source for answer in answers} == {stage.outside.address_of(6)}
    world.answers(stage.client_b, of(6, stage.b.addresses), service.node_port, {A1, A2})
    world.never(stage.outside, of(6, stage.b.addresses), service.node_port, DROPPED)


@pytest.mark.parametrize("family", [4, 6])
def test_no_endpoints(world: World, family: int) -> None:
    """Without endpoints a Service refuses in either family."""
    service = world.service(selector={"app": "nobody"}, type="NodePort", **BOTH)
    address = of(family, service.addresses)
    for place in (world.stage.client_a, world.stage.node_b):
        world.never(place, address, 80, REJECTED)
    world.never(world.stage.outside, of(family, world.stage.a.addresses), service.node_port, REJECTED)


def test_ipv6_hairpin_and_affinity(world: World) -> None:
    """In IPv6, too, a pod reaches itself, and with affinity a client keeps its pod."""
    stage = world.stage
    labels = {"app": world.unique("mirror")}
    (pod,) = world.servers([("mirror", stage.a)], labels)
    mirror = world.service(selector=labels, **BOTH)
    place = stage.pod(pod)
    world.answers(place, of(6, mirror.addresses), 80, {pod}, count=10)
    place.close()
    sticky = world.service(sessionAffinity="ClientIP", **BOTH)
    address = of(6, sticky.addresses)
    for client in (stage.client_a, stage.client_b):
        eventually(lambda: name_of(client.ask(address, 80)[0]) in SERVERS, f"{client} is served")  # noqa: B023
        assert len({name_of(one) for one in client.ask(address, 80, 15)}) == 1


def test_a_service_becomes_dual_stack(world: World) -> None:
    """A Service that gets its second family is served there, and the first does not notice."""
    stage = world.stage
    service = world.service(ipFamilyPolicy="SingleStack", ipFamilies=["IPv4"])
    world.answers(stage.client_a, service.address, 80, SERVERS)
    with world.requests(*world.lanes([stage.client_a, stage.client_b], service.address, 80, "connection")) as requests:
        both = world.change(service, ipFamilyPolicy="RequireDualStack", ipFamilies=["IPv4", "IPv6"])
        for place in stage.inside:
            world.answers(place, of(6, both.addresses), 80, SERVERS)
        requests.steady()


def test_names_in_both_families(world: World) -> None:
    """CoreDNS gives both addresses of a Service."""
    service = world.service("named", **BOTH)
    name = f"{service.name}.{NAMESPACE}.svc.cluster.local"
    for family in (4, 6):
        wanted = {of(family, service.addresses)}
        eventually(
            lambda: resolve(world.stage.client_b, world.dns(), name, family=family) == wanted,  # noqa: B023
            f"{name} is {wanted}",
        )
