"""What clients of a Service notice: balance, affinity, hairpin, protocols, and what survives a change."""

from __future__ import annotations

import socket
import time
from collections import Counter
from typing import Any

import pytest

from nodeproxy.kernel.ipvs import IPVS
from nodeproxy.sandbox import pace
from nodeproxy.sandbox.client import Answered, Probe, Rejected, probe_many

from .conftest import POD_A, POD_B
from .world import CLUSTER_IP, NODE_ADDRESS, World, ask, endpoint_slice, names, service

pytestmark = pytest.mark.kernel

CLIENTS = 5_000 if pace.factor() == 1 else 500


def sticky_for(seconds: int) -> dict[str, Any]:
    """The fields of a Service with ClientIP affinity."""
    return {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}}


def test_every_backend_has_an_equal_chance(world: World) -> None:
    world.put("web", service(), endpoint_slice([POD_A, POD_B]))
    client = world.box.add_pod("10.1.0.9")
    with world.agent:
        counts = Counter(verdict.name for verdict in ask(client, CLUSTER_IP, 80, 1000) if isinstance(verdict, Answered))
    # chi-square with one degree of freedom: 15.1 is exceeded by chance once in 10,000 runs
    assert sum(counts.values()) == 1000
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 15.1


def test_affinity_holds_for_thousands_of_clients(world: World) -> None:
    affinity: dict[str, Any] = {
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}},
    }
    world.put("web", service(nodePort=30080, **affinity), endpoint_slice([POD_A, POD_B]))
    client = world.box.outside
    client.command(["ip", "route", "add", "local", "198.18.0.0/15", "dev", "lo"])
    sources = [f"198.18.{number // 250}.{number % 250 + 1}" for number in range(CLIENTS)]
    with world.agent:
        rounds = [
            [
                verdict.name if isinstance(verdict, Answered) else str(verdict)
                for verdict in probe_many(
                    client, [Probe(NODE_ADDRESS, 30080, source=source) for source in sources], timeout=5
                )
            ]
            for _ in range(2)
        ]
        assert set(rounds[0]) == {"a", "b"}
        lost = sum(first != second for first, second in zip(*rounds, strict=True))
        assert lost == 0, f"{lost} of {CLIENTS} clients did not come back to their endpoint"
        # an endpoint goes: its clients move, all others stay
        world.put("web", service(nodePort=30080, **affinity), endpoint_slice([POD_B]))
        world.settle(lambda: not world.forwards_to(f"{POD_A}:8080"), "endpoint a is gone")
        assert names(probe_many(client, [Probe(NODE_ADDRESS, 30080, source=source) for source in sources[:200]])) == {"b"}


def test_affinity_ends_with_its_timeout(world: World) -> None:
    """By UDP, because IPVS counts the time from when it has forgotten the last connection, and TCP's it remembers longer.

    The affinity outlasts the connections: an affinity entry of ip_vs whose time is up while it still has a connection stays
    for 60 s more (`ip_vs_conn_expire`), and anew for every packet. The last pauses are for a machine that was held up so
    long that it happened all the same.
    """
    world.put("web", service(protocol="UDP", **sticky_for(3)), endpoint_slice([POD_A, POD_B], protocol="UDP"))
    client = world.box.add_pod("10.1.0.9")
    pauses = [5] * 8 + [65, 65] if world.way.mode == "ipvs" else [5] * 15
    with world.agent:
        if world.way.mode == "ipvs":
            world.box.node.run(lambda: IPVS().set_timeouts(udp=1))
        seen = names(ask(client, CLUSTER_IP, 80, 20, protocol="UDP"))
        assert len(seen) == 1
        for pause in pauses:
            time.sleep(pause)
            seen |= names(ask(client, CLUSTER_IP, 80, protocol="UDP"))
            if len(seen) == 2:
                break
        assert seen == {"a", "b"}


@pytest.mark.parametrize("address", [POD_A, "fd00:10::1"])
def test_a_pod_reaches_itself_through_its_service(world: World, address: str) -> None:
    cluster_ip = CLUSTER_IP if address == POD_A else "fd00:96::10"
    world.put("web", service(cluster_ip=cluster_ip), endpoint_slice([address]))
    with world.agent:
        (verdict,) = ask(world.box.pods[address], cluster_ip, 80)
    assert isinstance(verdict, Answered)
    assert verdict.name == "a"
    assert verdict.source != address


@pytest.mark.parametrize("protocol", ["TCP", "UDP", "SCTP"])
def test_protocols(world: World, protocol: str) -> None:
    world.put("web", service(protocol=protocol, nodePort=30080), endpoint_slice([POD_A, POD_B], protocol=protocol))
    world.put("empty", service("empty", protocol=protocol, cluster_ip="10.96.0.11"))
    client = world.box.add_pod("10.1.0.9")
    with world.agent:
        answers = ask(client, CLUSTER_IP, 80, 20, protocol=protocol)
        assert names(answers) == {"a", "b"}
        assert {verdict.source for verdict in answers if isinstance(verdict, Answered)} == {"10.1.0.9"}
        assert names(ask(world.box.outside, NODE_ADDRESS, 30080, 20, protocol=protocol)) == {"a", "b"}
        assert ask(client, "10.96.0.11", 80, protocol=protocol) == [Rejected()]


def test_established_connections_survive_the_removal_of_their_endpoint(world: World) -> None:
    world.put("web", service(), endpoint_slice([POD_A]))
    client = world.box.add_pod("10.1.0.9")

    def open_connection() -> socket.socket:
        return socket.create_connection((CLUSTER_IP, 80), timeout=2)

    listener = world.box.pods[POD_A].run(socket.create_server, (POD_A, 9090))
    world.put("web", service(), endpoint_slice([POD_A], port=9090))
    with world.agent, listener:
        connection = client.run(open_connection)
        accepted, _ = listener.accept()
        world.put("web", service(), endpoint_slice([POD_B]))
        world.settle(lambda: not world.forwards_to(f"{POD_A}:9090"), "endpoint a is gone")
        with connection, accepted:
            accepted.settimeout(2)
            for turn in range(5):
                connection.sendall(f"still here {turn}".encode())
                assert accepted.recv(100) == f"still here {turn}".encode()
        assert names(ask(client, CLUSTER_IP, 80, 5)) == {"b"}


def test_udp_clients_that_keep_their_port_move_on_when_their_endpoint_goes(world: World) -> None:
    world.put("dns", service("dns", protocol="UDP"), endpoint_slice([POD_A], "dns", protocol="UDP"))
    client = world.box.add_pod("10.1.0.9")
    with world.agent:
        assert names(ask(client, CLUSTER_IP, 80, protocol="UDP", source_port=5353)) == {"a"}
        world.put("dns", service("dns", protocol="UDP"), endpoint_slice([POD_B], "dns", protocol="UDP"))
        world.settle(lambda: world.forwards_to(f"{POD_B}:8080"), "endpoint b is there")
        world.settle(
            lambda: names(ask(client, CLUSTER_IP, 80, protocol="UDP", source_port=5353)) == {"b"}, "the client moved on", 3
        )


def test_udp_clients_that_asked_too_early_are_served_once_there_is_an_endpoint(world: World) -> None:
    world.put("dns", service("dns", protocol="UDP", nodePort=30053))
    with world.agent:
        # not rejected in the node's own namespace before the rules are there: make an entry that leads nowhere
        world.iptables("-I", "INPUT", "-p", "udp", "--dport", "30053", "-j", "ACCEPT")
        world.iptables("-t", "raw", "-I", "PREROUTING", "-p", "udp", "--dport", "30053", "-j", "ACCEPT")
        ask(world.box.outside, NODE_ADDRESS, 30053, protocol="UDP", source_port=5353)
        world.put("dns", service("dns", protocol="UDP", nodePort=30053), endpoint_slice([POD_A], "dns", protocol="UDP"))
        world.settle(lambda: world.forwards_to(f"{POD_A}:8080"), "endpoint a is there")
        world.settle(
            lambda: names(ask(world.box.outside, NODE_ADDRESS, 30053, protocol="UDP", source_port=5353)) == {"a"},
            "the client is served",
            3,
        )
