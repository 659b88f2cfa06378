"""UDP: Services of it, and what becomes of a client that keeps its source port when its server goes or comes."""

from __future__ import annotations

import pytest

from e2e.harness.asking import name_of
from e2e.harness.objects import udp_port
from e2e.harness.places import Place
from e2e.harness.stage import ALL, SERVERS
from e2e.harness.waiting import eventually
from e2e.harness.world import World

SOURCE_PORT = 20000  # below those that the kernel gives away


def becomes(place: Place, address: str, port: int, source_port: int, wanted: str) -> None:
    """A client that keeps its source port, and goes on asking, is answered by this server."""

    def right() -> bool:
        (verdict,) = place.ask(address, port, protocol="UDP", source_port=source_port, timeout=1.0)
        assert name_of(verdict) == wanted, f"seen {name_of(verdict)}"
        return True

    eventually(right, f"{place} from port {source_port} to {address}:{port} is answered by {wanted}", poll=0.1)


@pytest.mark.smoke
def test_udp_service(world: World) -> None:
    """UDP is served like TCP, at the cluster IP and at node ports."""
    service = world.service(ports=[udp_port()], type="NodePort")
    for place in world.stage.inside:
        world.answers(place, service.address, 80, SERVERS, protocol="UDP")
    for place in (world.stage.outside, world.stage.client_a, world.stage.node_b):
        world.answers(place, world.stage.b.address, service.node_port, SERVERS, protocol="UDP")


@pytest.mark.smoke
def test_a_server_is_replaced(world: World) -> None:
    """A client that keeps its source port, as many do, is answered by the new server: its flow does not stick to the old.

    At the cluster IP and at the node port, of clients in pods, on nodes and outside; each time the server has moved.
    """
    stage = world.stage
    labels = {"app": world.unique("replaced")}
    service = world.service(selector=labels, ports=[udp_port()], type="NodePort")
    lanes = [(place, service.address, 80) for place in stage.inside]
    lanes += [(stage.outside, stage.a.address, service.node_port), (stage.outside, stage.b.address, service.node_port)]
    old = ""
    for number, node in enumerate((stage.a, stage.b, stage.a)):
        (new,) = world.servers([(f"udp-{number}", node)], labels)
        if old:
            world.api.delete("Pod", old)
        for place, address, port in lanes:
            becomes(place, address, port, SOURCE_PORT, new)
        old = new


def test_a_server_comes(world: World) -> None:
    """A client that asked while there was no server, and keeps its source port, is answered once there is one."""
    stage = world.stage
    service = world.service(selector={"app": "nobody"}, ports=[udp_port()], type="NodePort")
    lanes = [(stage.client_a, service.address, 80), (stage.node_b, service.address, 80)]
    lanes.append((stage.outside, stage.b.address, service.node_port))
    for place, address, port in lanes:
        for _ in range(3):
            (verdict,) = place.ask(address, port, protocol="UDP", source_port=SOURCE_PORT + 1, timeout=0.3)
            assert name_of(verdict) not in SERVERS
    world.change(service, selector=ALL)
    for place, address, port in lanes:

        def answered(place: Place = place, address: str = address, port: int = port) -> bool:
            (verdict,) = place.ask(address, port, protocol="UDP", source_port=SOURCE_PORT + 1, timeout=1.0)
            return name_of(verdict) in SERVERS

        eventually(answered, f"{place} -> {address}:{port} is answered", poll=0.1)


def test_a_client_before_its_service(world: World) -> None:
    """A client that asks an address before it is a Service's is answered once it is: nothing of before sticks."""
    stage = world.stage
    probe = world.service("probe", ports=[udp_port()])
    world.api.delete("Service", probe.name)
    address = probe.addresses[0]
    world.gone(stage.client_a, address, 80, protocol="UDP", source_port=SOURCE_PORT + 2)
    for _ in range(3):
        stage.client_a.ask(address, 80, protocol="UDP", source_port=SOURCE_PORT + 2, timeout=0.2)
    world.service("late", ports=[udp_port()], clusterIP=address)

    def answered() -> bool:
        (verdict,) = stage.client_a.ask(address, 80, protocol="UDP", source_port=SOURCE_PORT + 2, timeout=1.0)
        return name_of(verdict) in SERVERS

    eventually(answered, "the client is answered", poll=0.1)
