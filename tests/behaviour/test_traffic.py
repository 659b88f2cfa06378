"""Counters of traffic by port of a Service equal what clients know that they sent, in every mode."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nodeproxy.sandbox.agent import http_get
from nodeproxy.sandbox.namespace import Namespace
from nodeproxy.sandbox.topology import Sandbox
from tests.ways import Way

from .conftest import POD_A, POD_B
from .world import CLUSTER_IP, NODE_ADDRESS, World, endpoint_slice, service

pytestmark = pytest.mark.kernel

ACCOUNTING = "net.netfilter.nf_conntrack_acct"
LINE = re.compile(r"nodeproxy_service_(\w+)_total\{(.*)\} (\S+)")
IP_HEADER, UDP_HEADER, TCP_HEADER = 20, 8, range(20, 61)

Counts = dict[str, dict[str, float]]
"""Name of a Service -> `connections`, `packets in` and so on -> how many."""


@pytest.fixture
def world(box: Sandbox, way: Way) -> Iterator[World]:
    """With counters read every half second."""
    made = World(box, way, flags=["--traffic-counters-period", "500ms"])
    yield made
    made.agent.kill()


def counts(world: World) -> Counts:
    """What the agent's metrics say."""
    _, text = http_get(world.box.node, "http://127.0.0.1:10249/metrics")
    found: Counts = {}
    for line in text.splitlines():
        if match := LINE.fullmatch(line):
            labels = dict(re.findall(r'(\w+)="(\w*)"', match[2]))
            assert (labels["namespace"], labels["port"]) == ("test", "p")
            what = f"{match[1]} {labels['direction']}" if "direction" in labels else match[1]
            found.setdefault(labels["service"], {})[what] = float(match[3])
    return found


def settle(world: World, done: Callable[[], bool], what: str) -> None:
    """Wait until `done`. A reading waits a hundred times as long as the last one took: on a busy machine, some time."""
    try:
        world.settle(done, what, 60)
    except AssertionError as error:
        seconds = world.metric("nodeproxy_traffic_dump_seconds")
        raise AssertionError(f"{counts(world)}, reading took {seconds} s: {error}") from error


def wait_for_first_reading(world: World) -> None:
    """Connections that are there already are not counted."""
    settle(world, lambda: world.metric("nodeproxy_traffic_dump_seconds") > 0, "connections were read")


def connect(where: Namespace, address: str, port: int, lines: list[bytes]) -> tuple[int, int]:
    """One TCP connection that sends these lines, reads an answer to each, and ends well; payload bytes sent and received."""

    def work() -> tuple[int, int]:
        with socket.create_connection((address, port), timeout=5) as connection, connection.makefile("rb") as answers:
            received = len(answers.readline())
            for line in lines:
                connection.sendall(line + b"\n")
                received += len(answers.readline())
        return sum(map(len, lines)) + len(lines), received

    return where.run(work)


def ask(where: Namespace, address: str, port: int, datagrams: list[bytes]) -> tuple[int, int]:
    """Datagrams from one port, each with its answer; payload bytes sent and received."""

    def work() -> tuple[int, int]:
        received = 0
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(5)
            client.connect((address, port))
            for datagram in datagrams:
                client.send(datagram)
                received += len(client.recv(2000))
        return sum(map(len, datagrams)), received

    return where.run(work)


def is_within_headers(count: dict[str, float], direction: str, payload: int, ip_header: int = IP_HEADER) -> bool:
    """Whether what was counted over the payload may be the headers of the packets counted."""
    packets, octets = count[f"packets {direction}"], count[f"bytes {direction}"]
    least, most = (packets * (ip_header + TCP_HEADER[end]) for end in (0, -1))
    return least <= octets - payload <= most


def test_tcp_counts_are_those_of_the_clients(world: World) -> None:
    world.put("web", service(nodePort=30080), endpoint_slice([POD_A, POD_B]))
    world.put("web6", service("web6", cluster_ip="fd00:96::10"), endpoint_slice(["fd00:10::1"], "web6"))
    client = world.box.add_pod("10.1.0.9", "fd00:10::9")
    with world.agent:
        wait_for_first_reading(world)
        payloads = [connect(client, CLUSTER_IP, 80, [b"x" * 3000] * 2) for _ in range(7)]
        payloads += [connect(world.box.outside, NODE_ADDRESS, 30080, [b"y" * 10]) for _ in range(5)]
        payloads += [connect(world.box.node, CLUSTER_IP, 80, []) for _ in range(3)]
        payload6 = connect(client, "fd00:96::10", 80, [b"z" * 500])
        for _ in range(4):
            connect(client, POD_A, 8080, [b"not by way of a Service"])
        sent, received = (sum(values) for values in zip(*payloads, strict=True))
        settle(world, lambda: counts(world).get("web", {}).get("connections") == 15, "all connections are counted")
        settle(world, lambda: is_within_headers(counts(world)["web"], "in", sent), "all bytes are counted")
        found = counts(world)
        assert found.keys() == {"web", "web6"}
        assert is_within_headers(found["web"], "out", received)
        assert found["web6"]["connections"] == 1
        assert is_within_headers(found["web6"], "in", payload6[0], 40)
        assert is_within_headers(found["web6"], "out", payload6[1], 40)
        # nothing is counted again when it is read again
        seconds = world.metric("nodeproxy_traffic_dump_seconds")
        settle(world, lambda: world.metric("nodeproxy_traffic_dump_seconds") != seconds, "connections were read again")
        assert counts(world)["web"]["connections"] == 15
        assert is_within_headers(counts(world)["web"], "in", sent)


def test_udp_counts_are_exact(world: World) -> None:
    world.put("dns", service("dns", protocol="UDP", nodePort=30053), endpoint_slice([POD_A, POD_B], "dns", protocol="UDP"))
    client = world.box.add_pod("10.1.0.9")
    with world.agent:
        wait_for_first_reading(world)
        payloads = [ask(client, CLUSTER_IP, 80, [b"?" * (size + 1)] * 3) for size in range(4)]
        payloads.append(ask(world.box.outside, NODE_ADDRESS, 30053, [b"?" * 100]))
        sent, received = (sum(values) for values in zip(*payloads, strict=True))
        headers = 13 * (IP_HEADER + UDP_HEADER)
        expected = {
            "connections": 5,
            "packets in": 13,
            "packets out": 13,
            "bytes in": sent + headers,
            "bytes out": received + headers,
        }
        settle(world, lambda: counts(world).get("dns") == expected, f"{expected} are counted")


def test_a_long_connection_is_counted_while_it_lasts(world: World) -> None:
    world.put("web", service(), endpoint_slice([POD_A]))
    client = world.box.add_pod("10.1.0.9")
    with world.agent:
        wait_for_first_reading(world)
        with client.run(lambda: socket.create_connection((CLUSTER_IP, 80), timeout=5)) as connection:
            for turn in range(1, 4):
                connection.sendall(b"x" * 999 + b"\n")

                def is_counted(turn: int = turn) -> bool:
                    count = counts(world).get("web", {"packets in": 0, "bytes in": 0})
                    return is_within_headers(count, "in", 1000 * turn)

                settle(world, is_counted, f"{turn} thousand bytes are counted")
                assert counts(world)["web"]["connections"] == 1
        # the Service goes, and its series with it
        world.remove("web")
        settle(world, lambda: counts(world) == {}, "the series are gone")


def test_connections_that_are_led_elsewhere_first_belong_to_the_frontend_they_came_to(world: World) -> None:
    """In IPVS mode short-cuts of policy Local and affinity send a connection to another virtual server first."""
    sticky: dict[str, Any] = {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}}}
    local = service(nodePort=30080, externalTrafficPolicy="Local", internalTrafficPolicy="Local", **sticky)
    world.put("web", local, endpoint_slice([POD_A]))
    client = world.box.add_pod("10.1.0.9")
    with world.agent:
        wait_for_first_reading(world)
        payloads = [connect(client, NODE_ADDRESS, 30080, [b"x" * 50]) for _ in range(4)]
        payloads += [connect(world.box.node, NODE_ADDRESS, 30080, [b"x" * 50]) for _ in range(2)]
        payloads += [connect(world.box.outside, NODE_ADDRESS, 30080, [b"x" * 50]) for _ in range(3)]
        sent, received = (sum(values) for values in zip(*payloads, strict=True))
        settle(world, lambda: counts(world).get("web", {}).get("connections") == 9, "all connections are counted")
        settle(world, lambda: is_within_headers(counts(world)["web"], "in", sent), "all bytes are counted")
        settle(world, lambda: is_within_headers(counts(world)["web"], "out", received), "all answers are counted")


def test_turned_off_it_leaves_the_kernel_alone(box: Sandbox, way: Way) -> None:
    world = World(box, way, flags=["--traffic-counters-period", "0s"])
    world.put("web", service(), endpoint_slice([POD_A]))
    before = box.node.read_sysctl(ACCOUNTING)
    with world.agent:
        connect(box.node, CLUSTER_IP, 80, [])
        assert counts(world) == {}
        assert world.metric("nodeproxy_traffic_dump_seconds") == 0
        assert box.node.read_sysctl(ACCOUNTING) == before
