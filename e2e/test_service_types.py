"""What the types of Services promise: who answers, at which addresses, to whom, and what the server sees of the client."""

from __future__ import annotations

import pytest

from e2e.harness.objects import UDP_PORT, port, udp_port
from e2e.harness.settings import PROXY
from e2e.harness.stage import A1, A2, ALL, ON_A, ON_B, SERVERS, B
from e2e.harness.world import REJECTED, World
from nodeproxy.sandbox.client import Answered, NoListener


@pytest.mark.smoke
def test_cluster_ip(world: World) -> None:
    """A cluster IP is answered by every ready pod, to pods and to nodes; the server sees a pod's own address."""
    service = world.service()
    for place in world.stage.inside:
        answers = world.answers(place, service.address, 80, SERVERS)
        if place in (world.stage.client_a, world.stage.client_b):
            assert {answer.source for answer in answers} == {place.address}


@pytest.mark.smoke
def test_node_port(world: World) -> None:
    """A node port is answered at the address of every node: to a client outside, to pods and to nodes.

    With policy Cluster a client outside is masqueraded, so that the answer finds back through the node it came by.
    """
    service = world.service(type="NodePort")
    for node in world.stage.nodes:
        for place in world.stage.everywhere:
            answers = world.answers(place, node.address, service.node_port, SERVERS)
            if place is world.stage.outside:
                assert place.address not in {answer.source for answer in answers}


@pytest.mark.only("iptables")
def test_node_port_on_loopback(world: World) -> None:
    """A node's own processes reach a node port at 127.0.0.1. (IPVS cannot, with kube-proxy neither.)"""
    service = world.service(type="NodePort")
    for place in (world.stage.node_a, world.stage.node_b):
        world.answers(place, "127.0.0.1", service.node_port, SERVERS)


def test_external_ips(world: World) -> None:
    """An external IP is answered to clients outside that are routed to a node, to pods and to nodes."""
    address = world.address_at(world.stage.a)
    service = world.service(externalIPs=[address])
    for place in world.stage.everywhere:
        world.answers(place, address, 80, SERVERS)
    world.change(service, externalIPs=[])
    world.answers(world.stage.outside, world.stage.a.address, world.change(service, type="NodePort").node_port, SERVERS)
    assert not any(isinstance(one, Answered) for one in world.stage.outside.ask(address, 80, 2, timeout=1.0))


@pytest.mark.smoke
def test_load_balancer(world: World) -> None:
    """The address of a load balancer, once it is in the status, is answered to clients outside, to pods and to nodes."""
    service = world.service(type="LoadBalancer")
    at_a, at_b = world.address_at(world.stage.a), world.address_at(world.stage.b)
    world.load_balancer(service, at_a, at_b)
    for place in world.stage.everywhere:
        for address in (at_a, at_b):
            world.answers(place, address, 80, SERVERS)
    world.answers(world.stage.outside, world.stage.b.address, service.node_port, SERVERS)


def test_load_balancer_that_is_a_proxy(world: World) -> None:
    """With `ipMode: Proxy` pods must go through the load balancer: the address is not short-cut on the node."""
    service = world.service(type="LoadBalancer")
    direct, proxied = world.address_at(world.stage.a), world.address_at(world.stage.a)
    world.load_balancer(service, direct, mode="VIP")
    world.answers(world.stage.client_a, direct, 80, SERVERS)
    world.load_balancer(service, proxied, mode="Proxy")
    world.answers(world.stage.client_a, service.address, 80, SERVERS)
    for place in (world.stage.client_a, world.stage.node_a):
        assert not any(isinstance(one, Answered) for one in place.ask(proxied, 80, 2, timeout=1.0))


def test_load_balancer_without_node_ports(world: World) -> None:
    """`allocateLoadBalancerNodePorts: false`: the load balancer's address is answered, and there is no node port."""
    service = world.service(type="LoadBalancer", allocateLoadBalancerNodePorts=False)
    assert service.node_ports == {}
    address = world.address_at(world.stage.b)
    world.load_balancer(service, address)
    for place in (world.stage.outside, world.stage.client_a):
        world.answers(place, address, 80, SERVERS)


def test_several_ports(world: World) -> None:
    """Each port of a Service leads to its own target, and the same number by TCP and by UDP are two ports."""
    ports = [port(80), port(81, UDP_PORT + 1, name="nobody"), udp_port(80), udp_port(53, name="dns")]
    service = world.service(ports=ports)
    for place in (world.stage.client_a, world.stage.node_b):
        world.answers(place, service.address, 80, SERVERS)
        for number in (80, 53):
            world.answers(place, service.address, number, SERVERS, protocol="UDP")
        world.never(place, service.address, 81, {str(NoListener())})


def test_named_target_ports(world: World) -> None:
    """A target port by name may be another number on each pod."""
    labels = {"app": world.unique("named")}
    (first,) = world.servers([("old", world.stage.a)], labels, ports={"web": 8080})
    moved = ["--http-port", "9090"]
    (second,) = world.servers([("new", world.stage.b)], labels, ports={"web": 9090}, arguments=moved)
    service = world.service(selector=labels, ports=[port(80, "web")])
    for place in world.stage.inside:
        world.answers(place, service.address, 80, {first, second})


@pytest.mark.smoke
def test_no_endpoints(world: World) -> None:
    """A Service without endpoints refuses at once, at each of its addresses, and serves as soon as there are some."""
    address = world.address_at(world.stage.a)
    service = world.service(type="LoadBalancer", selector={"app": "nobody"}, ports=[port(), udp_port()])
    world.load_balancer(service, address)
    stage = world.stage
    targets = [(service.address, 80), (stage.a.address, service.node_port), (address, 80)]
    seen = [(place, target) for place in (stage.client_a, stage.node_a, stage.outside) for target in targets]
    seen.remove((stage.outside, targets[0]))
    for place, target in seen:
        if not (PROXY == "kube-proxy" and (place, target) == (stage.node_a, targets[2])):  # it lets that out
            world.never(place, *target, REJECTED)
    world.never(world.stage.client_b, service.address, 80, REJECTED, protocol="UDP")
    world.change(service, selector=ALL)
    for place, target in seen:
        world.answers(place, *target, SERVERS)


def test_service_changes(world: World) -> None:
    """A Service follows its object: its selector, its port, its type, and its end."""
    service = world.service(selector=ON_A)
    world.answers(world.stage.client_b, service.address, 80, {A1, A2})
    world.change(service, selector={**ON_B})
    world.answers(world.stage.client_b, service.address, 80, {B})
    world.change(service, ports=[port(8000)])
    world.answers(world.stage.client_b, service.address, 8000, {B})
    assert not any(isinstance(one, Answered) for one in world.stage.client_b.ask(service.address, 80, timeout=1.0))
    exposed = world.change(service, type="NodePort")
    world.answers(world.stage.outside, world.stage.a.address, exposed.node_port, {B})
    world.change(service, type="ClusterIP", ports=[{**port(8000), "nodePort": None}])
    number = exposed.node_port
    world.gone(world.stage.outside, world.stage.a.address, number)
    world.answers(world.stage.client_a, service.address, 8000, {B})
    world.api.delete("Service", service.name)
    world.gone(world.stage.client_a, service.address, 8000)


def test_a_service_made_anew_at_the_same_address(world: World) -> None:
    """A cluster IP that goes from one Service to another leads to the new one's pods only."""
    first = world.service(selector=ON_A)
    world.answers(world.stage.client_b, first.address, 80, {A1, A2})
    world.api.delete("Service", first.name)
    second = world.service(selector=ON_B, clusterIP=first.address)
    assert second.address == first.address
    world.answers(world.stage.client_b, second.address, 80, {B})


@pytest.mark.smoke
def test_the_api_server_through_its_service(world: World) -> None:
    """Pods and nodes reach the API server by the cluster IP of the Service `kubernetes`."""
    service = world.api.get("Service", "kubernetes", "default")
    for place in world.stage.inside:
        status, text = place.get(f"https://{service['spec']['clusterIP']}:443/version")
        assert status == 200 and '"gitVersion"' in text
