"""Reading and deleting conntrack entries, against the real kernel and the conntrack program."""

import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from nodeproxy.kernel import conntrack
from nodeproxy.kernel.conntrack import SCTP, TCP, UDP, Flow, count, delete, delete_body, dump
from nodeproxy.kernel.netlink import NETLINK_NETFILTER, NLA_F_NESTED, NLM_F_CREATE, NetlinkSocket, attribute
from tests.kernel.conftest import NetworkNamespace

pytestmark = pytest.mark.kernel


def tuple_nest(kind: int, protocol: int, ends: tuple[str, int, str, int]) -> bytes:
    """CTA_TUPLE_ORIG or _REPLY, written from the header file rather than with the code under test."""
    source, source_port, destination, destination_port = ends
    family, first = (socket.AF_INET6, 3) if ":" in source else (socket.AF_INET, 1)
    addresses = attribute(first, socket.inet_pton(family, source)) + attribute(
        first + 1, socket.inet_pton(family, destination)
    )
    ports = attribute(1, bytes((protocol,)))
    ports += attribute(2, struct.pack(">H", source_port)) + attribute(3, struct.pack(">H", destination_port))
    return attribute(kind | NLA_F_NESTED, attribute(1 | NLA_F_NESTED, addresses) + attribute(2 | NLA_F_NESTED, ports))


def insert(flows: Iterable[Flow]) -> None:
    """Make entries as the kernel's own NAT would leave them."""
    batch = []
    for flow in flows:
        family = socket.AF_INET6 if ":" in flow.source else socket.AF_INET
        body = struct.pack("=BBH", family, 0, 0)
        body += tuple_nest(1, flow.protocol, flow[1:5])
        body += tuple_nest(2, flow.protocol, flow[5:9])
        body += attribute(7, struct.pack(">I", 600))  # CTA_TIMEOUT
        body += attribute(3, struct.pack(">I", 8))  # CTA_STATUS: confirmed
        if flow.protocol == TCP:
            state = attribute(1 | NLA_F_NESTED, attribute(1, b"\3"))  # CTA_PROTOINFO_TCP_STATE: established
            body += attribute(4 | NLA_F_NESTED, state)
        if flow.protocol == SCTP:
            state = attribute(3 | NLA_F_NESTED, attribute(1, b"\4") + attribute(2, bytes(4)) + attribute(3, bytes(4)))
            body += attribute(4 | NLA_F_NESTED, state)
        if flow.zone:
            body += attribute(18, struct.pack(">H", flow.zone))
        batch.append((1 << 8 | 0, NLM_F_CREATE, body))
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        assert netlink.batch(batch) == {}


def flow(number: int, protocol: int = UDP, zone: int = 0, family: int = 4) -> Flow:
    """A client's flow to a Service address, DNAT'd to an endpoint."""
    prefix = "10.0.{}.{}" if family == 4 else "fd00::1:{:x}:{:x}"
    client = prefix.format(number >> 8 & 255, number & 255)
    port = 1024 + (number >> 16)
    service, endpoint = ("192.0.2.1", "172.16.0.7") if family == 4 else ("2001:db8::1", "fd01::7")
    return Flow(protocol, client, port, service, 53, endpoint, 5353, client, port, zone)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", [TCP, UDP, SCTP])
def test_flows_read_back_and_are_deleted(netns: NetworkNamespace, family: int, protocol: int) -> None:
    wanted = [flow(i, protocol, family=family) for i in range(5)]

    def work() -> None:
        insert([*wanted, flow(99, protocol=TCP if protocol == UDP else UDP, family=family), flow(98, family=10 - family)])
        assert sorted(dump(family, protocol)) == sorted(wanted)
        assert count() == 7
        assert delete(wanted[:2]) == 2
        assert delete(wanted[:3]) == 1  # two are gone already
        assert sorted(dump(family, protocol)) == sorted(wanted[3:])
        assert count() == 4

    netns.run(work)


def test_conntrack_program_sees_the_same(netns: NetworkNamespace) -> None:
    netns.run(lambda: insert([flow(1)]))
    listed = netns.command("conntrack", "-L", "-p", "udp")
    assert "src=10.0.0.1 dst=192.0.2.1 sport=1024 dport=53" in listed
    assert "src=172.16.0.7 dst=10.0.0.1 sport=5353 dport=1024" in listed
    assert netns.run(lambda: delete([flow(1)])) == 1
    assert "10.0.0.1" not in netns.command("conntrack", "-L", "-p", "udp")


def test_zones_are_read_and_only_the_right_one_deleted(netns: NetworkNamespace) -> None:
    same_tuple = [flow(1), flow(1, zone=7), flow(1, zone=500)]

    def work() -> None:
        insert(same_tuple)
        assert sorted(dump(4, UDP)) == sorted(same_tuple)
        assert delete([flow(1, zone=7)]) == 1
        assert sorted(dump(4, UDP)) == sorted([flow(1), flow(1, zone=500)])

    netns.run(work)


@pytest.mark.parametrize("family", [4, 6])
def test_filter_by_destination(netns: NetworkNamespace, family: int) -> None:
    one = flow(1, family=family)
    other_port = flow(2, family=family)._replace(destination_port=54)
    other_address = flow(3, family=family)._replace(destination="192.0.2.2" if family == 4 else "2001:db8::2")

    def work() -> None:
        insert([one, other_port, other_address])
        assert list(dump(family, UDP, one.destination, 53)) == [one]
        assert sorted(dump(family, UDP, destination=one.destination)) == sorted([one, other_port])
        assert sorted(dump(family, UDP, destination_port=53)) == sorted([one, other_address])
        if family == 6:
            assert list(dump(6, UDP, "2001:DB8:0::1", 53)) == [one]
        assert list(dump(family, UDP, "192.0.2.9" if family == 4 else "2001:db8::9")) == []

    netns.run(work)


def test_kernel_filters_by_itself(netns: NetworkNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Linux 5.8 on only what was asked for is decoded."""
    decoded = []
    original = conntrack._decode

    def counting(messages: Iterator[tuple[bytes, int, int]], *rest: Any) -> Iterator[Flow]:
        def counted() -> Iterator[tuple[bytes, int, int]]:
            for message in messages:
                decoded.append(message)
                yield message

        return original(counted(), *rest)

    monkeypatch.setattr(conntrack, "_decode", counting)

    def work() -> None:
        insert([flow(i) for i in range(50)] + [flow(i, TCP) for i in range(50)])
        assert len(list(dump(4, UDP))) == 50

    netns.run(work)
    assert len(decoded) == 50


def test_kernel_that_ignores_the_filter_gives_the_same(netns: NetworkNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel before 5.8 does not look at the attribute CTA_FILTER; neither does any at an unknown number."""
    monkeypatch.setattr(conntrack, "_CTA_FILTER", 200)

    def work() -> None:
        insert([flow(1), flow(2, TCP), flow(3)._replace(destination_port=54)])
        assert list(dump(4, UDP, "192.0.2.1", 53)) == [flow(1)]

    netns.run(work)


def test_unusual_layout_is_read_attribute_by_attribute(netns: NetworkNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        insert([flow(1), flow(2, zone=3), flow(1, family=6)])
        for family in (4, 6):
            expected = sorted(dump(family, UDP))
            assert expected
            with monkeypatch.context() as patch:
                patch.setattr(conntrack, "_both_tuples", lambda _: struct.Struct("999x"))  # no message is that long
                assert sorted(dump(family, UDP)) == expected
                assert list(dump(family, UDP, destination_port=1)) == []
                assert list(dump(family, TCP)) == []

    netns.run(work)


def test_entries_without_ports_are_left_out(netns: NetworkNamespace) -> None:
    netns.command("iptables-nft", "-A", "OUTPUT", "-m", "conntrack", "--ctstate", "NEW", "-j", "ACCEPT")  # turns tracking on

    def ping() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
            raw.sendto(bytes.fromhex("0800 f7fd 0001 0001"), ("127.0.0.1", 0))  # echo request

    netns.run(ping)
    assert "icmp" in netns.command("conntrack", "-L")
    assert netns.run(lambda: list(dump(4, socket.IPPROTO_ICMP))) == []


def test_real_traffic_through_dnat(netns: NetworkNamespace) -> None:
    netns.command("iptables-nft", "-t", "nat", "-A", "OUTPUT", "-d", "192.0.2.1", "-p", "udp", "--dport", "53",
                  "-j", "DNAT", "--to-destination", "127.0.0.1:5353")  # fmt: skip
    netns.command("ip", "route", "add", "default", "dev", "lo")

    def work() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server, socket.socket(type=socket.SOCK_DGRAM) as client:
            server.bind(("127.0.0.1", 5353))
            client.bind(("127.0.0.1", 40000))
            client.sendto(b"x", ("192.0.2.1", 53))
            server.settimeout(5)
            assert server.recv(10) == b"x"
            [found] = dump(4, UDP, "192.0.2.1", 53)
            assert (found.source, found.source_port) == ("127.0.0.1", 40000)
            assert (found.reply_source, found.reply_source_port) == ("127.0.0.1", 5353)
            assert delete([found]) == 1

    netns.run(work)


def test_nothing_to_delete_is_nothing() -> None:
    assert delete([]) == 0


def test_deletion_is_byte_for_byte_what_pyroute2_encodes(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, nfct_msg

    # the one difference: pyroute2 leaves NLA_F_NESTED away in conntrack messages, which kernels let pass for its age
    for nest in (nfct_msg.cta_tuple, nfct_msg.cta_tuple.cta_ip, nfct_msg.cta_tuple.cta_proto):
        monkeypatch.setattr(nest, "nla_flags", NLA_F_NESTED)
    for one in (flow(1), flow(2, TCP, family=6)):
        family = socket.AF_INET6 if ":" in one.source else socket.AF_INET
        orig = NFCTAttrTuple(
            family=family,
            saddr=one.source,
            daddr=one.destination,
            proto=one.protocol,
            sport=one.source_port,
            dport=one.destination_port,
        )
        message = nfct_msg.create_from(tuple_orig=orig)
        message["nfgen_family"] = family
        message.encode()
        assert delete_body(one).hex() == bytes(message.data)[16:].hex()
