"""One namespace that stands for many pods or clients: each of them is on its own, as seen from the network."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nodeproxy.sandbox.client import PATIENT, Answered, NoListener, Probe, Rejected, probe, probe_many
from nodeproxy.sandbox.many import add_client_host, add_pod_host, prefixes
from nodeproxy.sandbox.namespace import Namespace
from nodeproxy.sandbox.sockets import host_port
from nodeproxy.sandbox.topology import Sandbox

PODS = ("10.1.0.5", "10.1.0.6", "fd00:10:1::5", "fd00:10:1::6")
CLIENTS = ("203.0.113.0/24", "2001:db8:c::/112")


def test_prefixes_hold_these_addresses_and_no_others() -> None:
    assert prefixes(["10.0.0.0", "10.0.0.1", "10.0.0.3", "fd00::2", "fd00::3"]) == [
        "10.0.0.0/31",
        "10.0.0.3/32",
        "fd00::2/127",
    ]


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Sandbox, Namespace, Namespace]]:
    with Sandbox(node_addresses=["192.168.0.2", "2001:db8::2"]) as box:
        pods, clients = add_pod_host(box, PODS), add_client_host(box, CLIENTS)
        for protocol in ("TCP", "UDP", "SCTP"):
            for family in (4, 6):
                box.servers.add_any(pods, family, 8080, protocol=protocol)
                box.servers.add_any(box.outside, family, 8080, protocol=protocol)
        yield box, pods, clients


@pytest.mark.kernel
@pytest.mark.parametrize("protocol", ["TCP", "UDP", "SCTP"])
@pytest.mark.parametrize(
    "addresses",
    [
        ("10.1.0.5", "10.1.0.6", "203.0.113.77", "10.9.9.9", "192.168.0.2"),
        ("fd00:10:1::5", "fd00:10:1::6", "2001:db8:c::77", "fd00:9::9", "2001:db8::2"),
    ],
    ids=["IPv4", "IPv6"],
)
def test_every_address_answers_for_itself(
    hosts: tuple[Sandbox, Namespace, Namespace], protocol: str, addresses: tuple[str, ...]
) -> None:
    box, pods, clients = hosts
    own, other, client, remote, node = addresses
    for sender, source, destination in (
        (clients, client, own),
        (clients, client, other),
        (pods, own, other),
        (pods, own, remote),
        (box.node, node, own),
    ):
        found = probe(sender, Probe(destination, 8080, protocol, source), timeout=PATIENT)
        assert isinstance(found, Answered), (source, destination, found)
        assert (found.name, found.source) == (host_port(destination, 8080), source)
    closed = probe(pods, Probe(other, 8081, protocol, own), timeout=PATIENT)
    assert isinstance(closed, Rejected if protocol == "UDP" else NoListener)


@pytest.mark.kernel
@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_between_two_of_its_pods_packets_pass_the_node(hosts: tuple[Sandbox, Namespace, Namespace], variant: str) -> None:
    box, pods, _ = hosts
    rule = ["PREROUTING", "-t", "nat", "-p", "tcp", "-d", "172.30.0.1", "-j", "DNAT", "--to-destination", "10.1.0.6:8080"]
    hairpin = ["POSTROUTING", "-t", "nat", "-p", "tcp", "-s", "10.1.0.6", "-d", "10.1.0.6", "-j", "MASQUERADE"]
    for one in (rule, hairpin):
        box.node.command([f"iptables-{variant}", "-A", *one])
    try:
        found = probe_many(pods, [Probe("172.30.0.1", 80, source=source) for source in PODS[:2]], timeout=PATIENT)
    finally:
        for one in (rule, hairpin):
            box.node.command([f"iptables-{variant}", "-D", *one])
    assert [one.name for one in found if isinstance(one, Answered)] == ["10.1.0.6:8080"] * 2
    assert isinstance(found[0], Answered)
    assert found[0].source == "10.1.0.5"
    assert isinstance(found[1], Answered)
    assert found[1].source in box.owned_addresses()


@pytest.mark.kernel
def test_servers_that_are_paused_let_the_kernel_connect(hosts: tuple[Sandbox, Namespace, Namespace]) -> None:
    box, _, clients = hosts
    before = box.servers.answers["10.1.0.5:8080"]
    with box.servers.paused():
        probe(clients, Probe("10.1.0.5", 8080, source="203.0.113.9"), timeout=0.1)
        assert box.servers.answers["10.1.0.5:8080"] == before
    assert isinstance(probe(clients, Probe("10.1.0.5", 8080, source="203.0.113.9"), timeout=PATIENT), Answered)
