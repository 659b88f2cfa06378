"""The interpreter of rules on rules of every sort, as text: who is matched, what targets do, and what is not known."""

from __future__ import annotations

import pytest

from nodeproxy.trace.kernel_view import KernelViewError
from nodeproxy.trace.packet import PacketState
from nodeproxy.trace.path import PacketPath
from nodeproxy.trace.saved_kernel import SavedKernel
from nodeproxy.trace.saved_tables import parse_tables
from nodeproxy.trace.walk import End, Way

PACKET = PacketState(4, "tcp", "10.0.0.9", "10.96.0.1", 80)
NODE = "192.168.0.2"
BUILT_IN = {
    "raw": ("PREROUTING", "OUTPUT"),
    "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
}


def ways(rules: str, packet: PacketState = PACKET, *, from_node: bool = False) -> list[Way]:
    """Walk a packet through rules, each given as `TABLE -A CHAIN ...`; chains are made as needed."""
    lines: list[str] = []
    given = [line.strip().partition(" ") for line in rules.strip().splitlines() if line.strip()]
    for table, built_in in BUILT_IN.items():
        of_table = [rule for name, _, rule in given if name == table]
        own = {rule.split()[1] for rule in of_table} - set(built_in)
        policies = dict.fromkeys(built_in, "ACCEPT") | {"FORWARD": "DROP"} if "DROP-FORWARD" in own else {}
        lines += [f"*{table}", *(f":{chain} {policies.get(chain, 'ACCEPT')} [0:0]" for chain in built_in)]
        lines += [f":{chain} - [0:0]" for chain in sorted(own)]
        lines += [*of_table, "COMMIT"]
    kernel = SavedKernel("text", parse_tables("\n".join(lines)), frozenset({NODE}), {}, {})
    return PacketPath(kernel).follow(packet, from_node=from_node)


def only(rules: str, packet: PacketState = PACKET, *, from_node: bool = False) -> Way:
    [way] = ways(rules, packet, from_node=from_node)
    assert way.chance == pytest.approx(1.0)
    return way


def matches(match: str, packet: PacketState = PACKET) -> End | None:
    """DROPPED where the match holds, SENT where it does not, UNKNOWN where that is not known."""
    return only(f"filter -A FORWARD {match} -j DROP", packet).end


@pytest.mark.parametrize(
    "match",
    [
        "-s 10.0.0.0/8",
        "! -s 10.1.0.0/16",
        "-d 10.96.0.1/32",
        "-s 0.0.0.9/0.0.0.255",
        "-p tcp",
        "-p 6",
        "! -p udp",
        "-p all",
        "! -i lo",
        "! -o lo",
        "-p tcp -m tcp --dport 80",
        "-p tcp -m tcp --dport 1:100",
        "-p tcp -m tcp --dport 80:",
        "-p tcp -m tcp ! --dport 81",
        "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN",
        "-p tcp -m multiport --dports 22,79:81",
        "-p tcp -m multiport ! --dports 22",
        "-m conntrack --ctstate NEW",
        "-m conntrack ! --ctstate INVALID,DNAT",
        "-m state --state NEW,ESTABLISHED",
        "-m mark --mark 0x0/0x4000",
        "-m mark ! --mark 0x4000/0x4000",
        "-m addrtype ! --dst-type LOCAL",
        "-m addrtype --src-type UNICAST",
        "-m iprange --src-range 10.0.0.1-10.0.0.20",
        "-m comment --comment anything",
        "-m set ! --match-set NONE src -m mark --mark 0x1",  # settled by the mark
    ],
)
def test_matches(match: str) -> None:
    expected = End.SENT if match.endswith("--mark 0x1") else End.DROPPED
    assert matches(match) is expected


@pytest.mark.parametrize(
    "match",
    [
        "! -s 10.0.0.0/8",
        "-d 10.96.0.2/32",
        "-p udp",
        "-i lo",
        "-p tcp -m tcp --dport 81:90",
        "-p udp -m udp --dport 80",
        "-p icmp -m icmp --icmp-type 8",
        "-m conntrack --ctstate RELATED,ESTABLISHED",
        "-m mark --mark 0x4000/0x4000",
        "-m addrtype --dst-type LOCAL",
        "-m length --length 1 -d 1.2.3.4/32",
        "-f",
    ],
)
def test_does_not_match(match: str) -> None:
    assert matches(match) is End.SENT


@pytest.mark.parametrize(
    "match",
    [
        "-m length --length 40",
        "-i eth0",
        "-m set --match-set NONE src",
        "-p tcp -m tcp --sport 1024:65535",
        "-m conntrack --ctstatus ASSURED",
        "-m recent --rcheck --name X --rsource",
        '-m bpf --bytecode "1,6 0 0 0"',
        "-m mark --mark x",
        "-d 1.2.3.4.5/99",
        "-m statistic --mode random --probability x",
    ],
)
def test_not_known(match: str) -> None:
    way = only(f"filter -A FORWARD {match} -j DROP")
    assert way.end is End.UNKNOWN
    assert way.reason.startswith("unknown from rule 1 of chain FORWARD (filter table) on: ")


def test_jump_return_and_goto() -> None:
    """What returns goes on behind the jump; what falls through after a goto goes on where the jump before it was."""
    assert only("filter -A FORWARD -j A\nfilter -A FORWARD -j DROP\nfilter -A A -j RETURN").end is End.DROPPED
    assert only("filter -A FORWARD -j A\nfilter -A FORWARD -j DROP\nfilter -A A -j ACCEPT").end is End.SENT
    rules = """
        filter -A FORWARD -j A
        filter -A FORWARD -d 10.96.0.1/32 -j MARK --set-xmark 0x7/0xf
        filter -A A -g B
        filter -A A -j DROP
        filter -A B -d 1.2.3.4/32 -j DROP
    """
    way = only(rules)
    assert (way.end, way.packet.mark) == (End.SENT, 7)
    assert [(step.chain, step.number) for step in way.steps()] == [("FORWARD", 1), ("A", 1), ("FORWARD", 2)]


def test_a_loop_in_a_file_ends() -> None:
    assert "jumps go too deep" in only("filter -A FORWARD -j A\nfilter -A A -j B\nfilter -A B -j A").reason
    half = "-m statistic --mode random --probability 0.5"
    with pytest.raises(KernelViewError, match="lead to more than 50000 ways"):
        ways(f"filter -A FORWARD -j A\nfilter -A A {half} -j A\nfilter -A A {half} -j A")


def test_chances() -> None:
    rules = """
        nat -A PREROUTING -m statistic --mode random --probability 0.25 -j DNAT --to-destination 10.1.0.1:81
        nat -A PREROUTING -m statistic --mode nth --every 3 --packet 0 -j DNAT --to-destination 10.1.0.2
        nat -A PREROUTING -m statistic --mode random ! --probability 0.5 -j A
        nat -A A -j DNAT --to-destination 10.1.0.3:83
    """
    found = {(way.packet.destination, way.packet.port): way.chance for way in ways(rules)}
    assert found == {
        ("10.1.0.1", 81): pytest.approx(0.25),
        ("10.1.0.2", 80): pytest.approx(0.25),
        ("10.1.0.3", 83): pytest.approx(0.25),
        ("10.96.0.1", 80): pytest.approx(0.25),
    }


def test_marks() -> None:
    def mark(*targets: str) -> int:
        return only("\n".join(f"mangle -A FORWARD -j {target}" for target in targets)).packet.mark

    assert mark("MARK --set-xmark 0x4000/0x4000") == 0x4000
    assert mark("MARK --set-xmark 0x4000/0x4000", "MARK --set-xmark 0x4000/0x0") == 0
    assert mark("MARK --set-mark 5", "MARK --or-mark 0x10", "MARK --and-mark 0x11", "MARK --xor-mark 0x3") == 0x12
    assert mark("MARK --set-mark 5", "CONNMARK --save-mark", "MARK --set-mark 0", "CONNMARK --restore-mark") == 5
    connection = "CONNMARK --save-mark --nfmask 0xff --ctmask 0xff"
    assert mark("MARK --set-mark 0x105", connection, "MARK --set-mark 0", "CONNMARK --restore-mark") == 5


def test_the_nat_table_is_asked_once() -> None:
    """What the node sends to itself comes in again, and the nat table of PREROUTING is not asked about it any more."""
    packet = PacketState(4, "tcp", NODE, "10.96.0.1", 80)
    rules = f"""
        nat -A OUTPUT -d 10.96.0.1/32 -j DNAT --to-destination {NODE}:8080
        nat -A PREROUTING -j DNAT --to-destination 1.2.3.4:1
        filter -A INPUT -i lo -m conntrack --ctstate DNAT -j ACCEPT
        filter -A INPUT -j DROP
    """
    way = only(rules, packet, from_node=True)
    assert (way.end, way.packet.destination, way.packet.port) == (End.DELIVERED, NODE, 8080)


def test_other_targets() -> None:
    redirected = only("nat -A PREROUTING -p tcp -j REDIRECT --to-ports 8080")
    assert (redirected.end, redirected.packet.destination, redirected.packet.port) == (End.DELIVERED, "127.0.0.1", 8080)
    untracked = only("raw -A PREROUTING -j CT --notrack\nnat -A PREROUTING -j DNAT --to-destination 1.2.3.4:1")
    assert (untracked.end, untracked.packet.destination) == (End.SENT, "10.96.0.1")
    assert only("nat -A POSTROUTING -j MASQUERADE --random-fully").packet.masqueraded
    assert only("nat -A POSTROUTING -j SNAT --to-source 1.2.3.4").packet.masqueraded
    assert only("filter -A FORWARD -j REJECT --reject-with tcp-reset").end is End.REJECTED
    assert only("filter -A FORWARD -j DROP-FORWARD\nfilter -A DROP-FORWARD -j RETURN").end is End.DROPPED  # by its policy
    for target in ("NFQUEUE --queue-num 1", "TPROXY --on-port 1", "DNAT --to-destination 1.2.3.4-1.2.3.9", "NEW --odd x"):
        way = only(f"mangle -A PREROUTING -j {target}")
        assert way.end is End.UNKNOWN, target
        assert "is not understood" in way.reason


def test_a_rule_that_cannot_be_read_ends_the_walk() -> None:
    assert "lacks its value" in only("filter -A FORWARD -j ACCEPT -s").reason
