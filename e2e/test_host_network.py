"""Clients and servers in the host's network, and pods that reach themselves."""

from __future__ import annotations

from typing import Any

import pytest

from e2e.harness.objects import port, udp_port
from e2e.harness.stage import A1, A2, ON_A, SERVERS, Node
from e2e.harness.world import World

HTTP, UDP = 18080, 18081


def on_host(node: Node, http: int, udp: int) -> dict[str, Any]:
    """A server in its node's network. By UDP it answers from the address that it was asked at only if it listens there."""
    listen = ["--http-port", str(http), "--udp-port", str(udp), "--udp-listen-addresses", node.address]
    return {"host_network": True, "arguments": listen, "ports": {"http": http, "udp": udp}}


@pytest.mark.smoke
def test_hairpin(world: World) -> None:
    """A pod reaches itself through its Service, by TCP and by UDP, by cluster IP and by node port."""
    labels = {"app": world.unique("mirror")}
    (pod,) = world.servers([("mirror", world.stage.a)], labels)
    service = world.service(selector=labels, ports=[port(), udp_port()], type="NodePort")
    place = world.stage.pod(pod)
    for protocol in ("TCP", "UDP"):
        world.answers(place, service.address, 80, {pod}, protocol=protocol, count=10)
    for node in (world.stage.a, world.stage.b):
        world.answers(place, node.address, service.node_ports["http"], {pod}, count=10)
    place.close()


def test_a_pod_among_others_reaches_itself(world: World) -> None:
    """A pod of a Service of several reaches all of them, itself included, and none of its requests is lost."""
    labels = {"app": world.unique("mirrors")}
    pods = world.servers([("mirror", world.stage.a), ("mirror", world.stage.a), ("mirror", world.stage.b)], labels)
    service = world.service(selector=labels)
    for pod in pods:
        place = world.stage.pod(pod)
        world.answers(place, service.address, 80, pods)
        place.close()


def test_host_network_servers(world: World) -> None:
    """A server in its node's network is served like any pod: to pods, to nodes, its own included, and to clients outside."""
    labels = {"app": world.unique("host")}
    stage = world.stage
    for node in (stage.a, stage.b):
        world.server("host", node, labels, **on_host(node, HTTP, UDP))
    service = world.service(selector=labels, ports=[port(80, HTTP), udp_port(80, UDP)], type="NodePort")
    names = {stage.a.name, stage.b.name}  # a pod in the host's network has its node's name
    for place in stage.inside:
        world.answers(place, service.address, 80, names)
        world.answers(place, service.address, 80, names, protocol="UDP")
    for place in stage.everywhere:
        for node in (stage.a, stage.b):
            world.answers(place, node.address, service.node_ports["http"], names)


def test_host_network_server_and_policy_local(world: World) -> None:
    """With policy Local a server in its node's network is its node's own, and sees the client's address."""
    labels = {"app": world.unique("local")}
    stage = world.stage
    world.server("local", stage.a, labels, **on_host(stage.a, 18090, 18091))
    ports_of_service = [port(80, 18090)]
    service = world.service(selector=labels, ports=ports_of_service, type="NodePort", externalTrafficPolicy="Local")
    answers = world.answers(stage.outside, stage.a.address, service.node_port, {stage.a.name})
    assert {answer.source for answer in answers} == {stage.outside.address}
    inside = world.service("inside", selector=labels, ports=ports_of_service, internalTrafficPolicy="Local")
    world.answers(stage.client_a, inside.address, 80, {stage.a.name})
    world.answers(stage.node_a, inside.address, 80, {stage.a.name})


def test_nodes_as_clients(world: World) -> None:
    """A node reaches pods of its own and of other nodes, whichever address of a Service it uses."""
    stage = world.stage
    service = world.service(type="NodePort")
    local = world.service("local", selector=ON_A, type="NodePort", externalTrafficPolicy="Local")
    for place, node in ((stage.node_a, stage.a), (stage.node_b, stage.b)):
        for address, number in ((service.address, 80), (node.address, service.node_port)):
            world.answers(place, address, number, SERVERS)
        world.answers(place, node.address, local.node_port, {A1, A2})
