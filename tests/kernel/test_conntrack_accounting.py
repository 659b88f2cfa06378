"""Reading counters of connections, against the real kernel, real traffic and the conntrack program."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from nodeproxy.kernel import conntrack_accounting, sysctl
from nodeproxy.kernel.conntrack import SCTP, TCP, UDP, Flow
from nodeproxy.kernel.conntrack_accounting import (
    Account,
    Counters,
    accounts,
    destination_number,
    unpack_counters,
)
from tests.kernel.conftest import NetworkNamespace
from tests.kernel.test_conntrack import flow, insert

pytestmark = pytest.mark.kernel

SERVICE = {4: "192.0.2.1", 6: "2001:db8::1"}
SERVER = {4: "127.0.0.1", 6: "::1"}


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def read(**wanted: tuple[str, int, int]) -> list[Account[str]]:
    """Accounts of destinations by name: address, protocol, port."""
    destinations: dict[bytes, dict[int, str]] = {}
    for name, (address, protocol, port) in wanted.items():
        destinations.setdefault(packed(address), {})[destination_number(protocol, port)] = name
    return [account for batch in accounts(destinations) for account in batch]


def names(found: list[Account[str]]) -> list[str]:
    return sorted(name for name, _, _ in found)


@contextmanager
def udp_through_dnat(netns: NetworkNamespace, family: int = 4, port: int = 53) -> Iterator[Callable[[bytes, bytes], None]]:
    """A client and a server with a DNAT rule between them; call it to send a datagram and its answer."""
    tool = "iptables-nft" if family == 4 else "ip6tables-nft"
    to = f"{SERVER[family]}:5353" if family == 4 else f"[{SERVER[family]}]:5353"
    netns.command(tool, "-t", "nat", "-A", "OUTPUT", "-d", SERVICE[family], "-p", "udp", "--dport", str(port),
                  "-j", "DNAT", "--to-destination", to)  # fmt: skip
    netns.command("ip", f"-{family}", "route", "replace", "default", "dev", "lo")
    kind = socket.AF_INET if family == 4 else socket.AF_INET6

    def make() -> socket.socket:
        made = socket.socket(kind, socket.SOCK_DGRAM)
        made.settimeout(5)
        made.bind((SERVER[family], 0))
        return made

    with ExitStack() as stack:
        server = stack.enter_context(netns.run(lambda: socket.socket(kind, socket.SOCK_DGRAM)))
        server.settimeout(5)
        server.bind((SERVER[family], 5353))
        client = stack.enter_context(netns.run(make))

        def talk(question: bytes, answer: bytes) -> None:
            client.sendto(question, (SERVICE[family], port))
            data, peer = server.recvfrom(2000)
            assert data == question
            server.sendto(answer, peer)
            assert client.recv(2000) == answer

        yield talk


@pytest.mark.parametrize("family", [4, 6])
def test_counters_are_those_of_the_traffic(netns: NetworkNamespace, family: int) -> None:
    netns.run(lambda: sysctl.set("net.netfilter.nf_conntrack_acct", 1))
    header = 28 if family == 4 else 48
    with udp_through_dnat(netns, family) as talk:
        wanted = {"dns": (SERVICE[family], UDP, 53)}
        talk(b"q" * 10, b"a" * 500)
        [(name, first, counters)] = netns.run(lambda: read(**wanted))
        assert name == "dns"
        assert unpack_counters(counters) == Counters(1, header + 10, 1, header + 500)
        talk(b"q" * 20, b"a" * 7)
        [(_, second, counters)] = netns.run(lambda: read(**wanted))
        assert unpack_counters(counters) == Counters(2, 2 * header + 30, 2, 2 * header + 507)
        assert first == second  # the same connection
    listed = netns.command("conntrack", "-L", "-f", f"ipv{family}", "-p", "udp", "-d", SERVICE[family])
    assert re.findall(r"packets=(\d+) bytes=(\d+)", listed) == [
        ("2", str(2 * header + 30)),
        ("2", str(2 * header + 507)),
    ]


def test_without_accounting_there_are_no_counters(netns: NetworkNamespace) -> None:
    netns.run(lambda: sysctl.set("net.netfilter.nf_conntrack_acct", 0))
    with udp_through_dnat(netns) as talk:
        talk(b"q", b"a")
        [(_, _, counters)] = netns.run(lambda: read(dns=(SERVICE[4], UDP, 53)))
        assert unpack_counters(counters) == Counters(0, 0, 0, 0)


@pytest.mark.parametrize("filtered", [True, False], ids=["kernel-filters", "all-are-read"])
def test_only_what_goes_to_the_destinations_and_is_sent_on(
    netns: NetworkNamespace, monkeypatch: pytest.MonkeyPatch, filtered: bool
) -> None:
    monkeypatch.setattr(conntrack_accounting, "_ipvs_has_servers", lambda: not filtered)
    with udp_through_dnat(netns) as talk:
        talk(b"q", b"a")

        def plain() -> None:
            """Connections of other destinations, and one to a wanted destination that nobody sent on."""
            insert([flow(1)._replace(destination="192.0.2.77", reply_source="192.0.2.77", reply_source_port=53)])
            insert([flow(2)._replace(reply_source=SERVICE[4], reply_source_port=53)])

        netns.run(plain)
        assert names(netns.run(lambda: read(dns=(SERVICE[4], UDP, 53)))) == ["dns"]
        assert netns.run(lambda: read(dns=(SERVICE[4], UDP, 54))) == []
        assert netns.run(lambda: read(dns=(SERVICE[4], TCP, 53))) == []
        assert netns.run(lambda: read(dns=("192.0.2.77", UDP, 53))) == []
        assert netns.run(read) == []


def inserted() -> list[Flow]:
    """Entries of every kind as IPVS leaves them: another answers, but no mark of DNAT."""
    made = [flow(i, protocol, family=family) for i, protocol in enumerate((TCP, UDP, SCTP)) for family in (4, 6)]
    return [*made, flow(9, UDP, zone=7), flow(9, UDP)]


def everything(family: int) -> dict[str, tuple[str, int, int]]:
    return {
        f"{name}{family}": (SERVICE[family], number, 53) for name, number in (("tcp", TCP), ("udp", UDP), ("sctp", SCTP))
    }


def test_all_protocols_and_families_in_one_reading(netns: NetworkNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conntrack_accounting, "_ipvs_has_servers", lambda: True)

    def work() -> None:
        insert(inserted())
        found = read(**everything(4), **everything(6))
        assert names(found) == ["sctp4", "sctp6", "tcp4", "tcp6", "udp4", "udp4", "udp4", "udp6"]
        assert len({number for _, number, _ in found}) == len(found)

    netns.run(work)


def test_unusual_layouts_are_read_alike(netns: NetworkNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attribute by attribute it is the same, numbers and counters included; ICMP is passed over both ways."""
    monkeypatch.setattr(conntrack_accounting, "_ipvs_has_servers", lambda: True)
    slow: list[Any] = []
    original = conntrack_accounting._decode_slowly

    def counting(*arguments: Any) -> Any:
        slow.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(conntrack_accounting, "_decode_slowly", counting)
    netns.run(lambda: insert(inserted()))
    netns.run(lambda: sysctl.set("net.netfilter.nf_conntrack_acct", 1))
    with udp_through_dnat(netns) as talk:
        talk(b"q" * 10, b"a" * 500)

        def work() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
                raw.sendto(bytes.fromhex("0800 f7fd 0001 0001"), ("127.0.0.1", 0))  # echo request
            wanted = everything(4) | everything(6)
            usual = sorted(read(**wanted), key=str)
            assert len(usual) == 9
            assert len(slow) <= 2  # the ICMP entry, and where the kernel pads numbers, the one that has counters
            with monkeypatch.context() as patch:
                patch.setattr(conntrack_accounting, "_learn", lambda *_: None)
                assert sorted(read(**wanted), key=str) == usual
            assert len(slow) > 9

        netns.run(work)


def test_kernel_passes_over_what_is_not_sent_on(netns: NetworkNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """As kernels do that know the attribute CTA_STATUS of a request; others ignore it."""
    decoded = []
    original = conntrack_accounting._decode

    def counting(messages: Iterator[tuple[bytes, int, int]], *rest: Any) -> Any:
        def counted() -> Iterator[tuple[bytes, int, int]]:
            for message in messages:
                decoded.append(message)
                yield message

        return original(counted(), *rest)

    monkeypatch.setattr(conntrack_accounting, "_decode", counting)
    with udp_through_dnat(netns) as talk:
        talk(b"q", b"a")
        netns.run(lambda: insert([flow(i) for i in range(50)]))
        assert names(netns.run(lambda: read(dns=(SERVICE[4], UDP, 53)))) == ["dns"]
    assert len(decoded) == 1


def test_padded_counters_are_brought_into_the_usual_bytes() -> None:
    """Kernels of processors that want 64-bit numbers aligned put an empty attribute before them."""
    numbers = {(9, 1): 3, (9, 2): 300, (10, 1): 4, (10, 2): 70_000}
    raw = {key: struct.pack(">Q", value) for key, value in numbers.items()} | {(9, 5): b"", (10, 5): b""}
    assert unpack_counters(conntrack_accounting._as_usual(raw)) == Counters(3, 300, 4, 70_000)
