"""Owns the evaluation of a rule's matches for one packet: does it match, with what chance, or is that not known.

Sources: iptables-extensions(8), and net/netfilter/xt_*.c where it leaves open what the first packet of a connection gives.
An option that is not known makes the match unknown, never a guess; so does a value that cannot be read.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from nodeproxy.cluster.addresses import network
from nodeproxy.forwarding.table import Family
from nodeproxy.programmer.rules.common import same_addresses
from nodeproxy.trace.ip_sets import IpSet
from nodeproxy.trace.kernel_view import KernelView, RouteKind
from nodeproxy.trace.packet import UNKNOWN_INTERFACE, PacketState
from nodeproxy.trace.rule_text import Match, Option, Rule, tokens

Chance = float | None
"""0 for no, 1 for yes, between them for a match by chance; None where it is not known."""

_PROTOCOLS: Final = {"tcp": ("tcp", "6"), "udp": ("udp", "17"), "sctp": ("sctp", "132")}
_NO_EFFECT: Final = frozenset(("comment", "nfacct"))


class Evaluation(NamedTuple):
    """Whether a rule matches; `unknown` names the match that could not be judged."""

    chance: Chance
    unknown: str = ""


class Matcher:
    """Evaluates rules against one kernel."""

    def __init__(self, kernel: KernelView) -> None:
        self._kernel = kernel
        self._sets: dict[str, IpSet | None] = {}
        self._modules: Mapping[str, Callable[[Option, PacketState], Chance]] = {
            "": self._base,
            "tcp": self._tcp,
            "udp": self._ports,
            "sctp": self._ports,
            "multiport": self._ports,
            "conntrack": self._conntrack,
            "state": self._conntrack,
            "mark": self._mark,
            "connmark": self._connection_mark,
            "addrtype": self._address_type,
            "set": self._set,
            "iprange": self._range,
            "bpf": self._bpf,
        }
        self._bytecode = {family: tokens(same_addresses(family))[-1].text for family in Family}

    def evaluate(self, rule: Rule, packet: PacketState) -> Evaluation:
        """Whether `rule` matches `packet`. One match that certainly fails settles it, whatever is unknown beside it."""
        chance, unknown = 1.0, ""
        for match in rule.matches:
            found = self._match(match, packet)
            if found is None:
                unknown = unknown or (f"-m {match.module}" if match.module else "an option of every rule")
            else:
                chance *= found
            if chance == 0.0:
                return Evaluation(0.0)
        return Evaluation(None, unknown) if unknown else Evaluation(chance)

    def ip_set(self, name: str) -> IpSet | None:
        """An ipset, read once."""
        if name not in self._sets:
            contents = self._kernel.ip_set(name)
            self._sets[name] = None if contents is None else IpSet(contents)
        return self._sets[name]

    def _match(self, match: Match, packet: PacketState) -> Chance:
        if match.module in _NO_EFFECT:
            return 1.0
        if match.module == "statistic":
            return _statistic(match)
        if match.module == "recent":
            return self._recent(match, packet)
        judge = self._modules.get(match.module)
        if judge is None:
            # Matches of other protocols cannot hold, whatever their options.
            return 0.0 if match.module in ("icmp", "icmp6", "icmpv6", "ah", "esp", "dccp") else None
        if match.module in ("tcp", "udp", "sctp") and match.module != packet.protocol:
            return 0.0
        chance = 1.0
        unknown = False
        for option in match.options:
            found = judge(option, packet)
            if found is None:
                unknown = True
            else:
                chance *= 1.0 - found if option.negated else found
        return chance if chance == 0.0 or not unknown else None

    def _base(self, option: Option, packet: PacketState) -> Chance:
        name, value = option.name, option.values[0] if option.values else ""
        if name in ("-s", "-d"):
            return _in_network(packet.source if name == "-s" else packet.destination, value)
        if name == "-p":
            return float(value == "all" or value in _PROTOCOLS.get(packet.protocol, ()))
        if name in ("-i", "-o"):
            return _interface(packet.incoming if name == "-i" else packet.outgoing, value)
        return 0.0 if name == "-f" else None

    def _tcp(self, option: Option, packet: PacketState) -> Chance:
        if option.name == "--syn":
            return 1.0
        if option.name == "--tcp-flags":
            mask, wanted = (frozenset(text.split(",")) for text in option.values)
            return float(("SYN" in mask) == ("SYN" in wanted) and wanted <= {"SYN", "NONE"})
        return self._ports(option, packet)

    def _ports(self, option: Option, packet: PacketState) -> Chance:
        if option.name in ("--dport", "--dports"):
            return _port(packet.port, option.values[0])
        if option.name in ("--sport", "--sports"):
            return 1.0 if option.values[0] in ("0:65535", "1:65535") else None
        return None

    def _conntrack(self, option: Option, packet: PacketState) -> Chance:
        if option.name not in ("--ctstate", "--state"):
            return None
        states = {"UNTRACKED"} if packet.untracked else {"NEW"}
        if packet.translated:
            states.add("DNAT")
        if packet.masqueraded:
            states.add("SNAT")
        return float(not states.isdisjoint(option.values[0].split(",")))

    def _mark(self, option: Option, packet: PacketState) -> Chance:
        return _marked(option, packet.mark)

    def _connection_mark(self, option: Option, packet: PacketState) -> Chance:
        return _marked(option, packet.connection_mark)

    def _address_type(self, option: Option, packet: PacketState) -> Chance:
        if option.name not in ("--src-type", "--dst-type"):
            return None
        address = packet.source if option.name == "--src-type" else packet.destination
        kinds = set(option.values[0].split(","))
        local = self._kernel.route(address).kind is RouteKind.LOCAL
        if local:
            return float("LOCAL" in kinds)
        parsed = ipaddress.ip_address(address)
        if parsed.is_multicast:
            return float("MULTICAST" in kinds)
        if kinds <= {"LOCAL", "MULTICAST"}:
            return 0.0
        return 1.0 if "UNICAST" in kinds else None

    def _set(self, option: Option, packet: PacketState) -> Chance:
        if option.name == "--update-counters":
            return 0.0 if option.negated else 1.0  # only whether counters are kept
        if option.name != "--match-set":
            return None
        held = self.ip_set(option.values[0])
        found = None if held is None else held.holds(packet, option.values[1].split(","))
        return None if found is None else float(found)

    def _range(self, option: Option, packet: PacketState) -> Chance:
        if option.name not in ("--src-range", "--dst-range"):
            return None
        address = ipaddress.ip_address(packet.source if option.name == "--src-range" else packet.destination)
        try:
            first, last = (ipaddress.ip_address(text) for text in option.values[0].split("-"))
        except ValueError:
            return None
        return float(int(first) <= int(address) <= int(last) and first.version == address.version)

    def _bpf(self, option: Option, packet: PacketState) -> Chance:
        """The one program that is known: ours, which finds packets that go to where they come from."""
        if option.name != "--bytecode" or option.values[0] != self._bytecode[Family(packet.family)]:
            return None
        return float(packet.source == packet.destination)

    def _recent(self, match: Match, packet: PacketState) -> Chance:
        """A list of addresses. `--set` notes the packet and always matches; the others ask whether it was noted."""
        options = {option.name: option for option in match.options}
        if "--set" in options:
            return 0.0 if options["--set"].negated else 1.0
        name, asked = options.get("--name"), options.get("--rcheck") or options.get("--update")
        if name is None or asked is None or "--hitcount" in options or "--rttl" in options:
            return None
        address = packet.destination if "--rdest" in options else packet.source
        seconds = options["--seconds"].values[0] if "--seconds" in options else ""
        held = self._kernel.recent(name.values[0], address, int(seconds) if seconds.isdigit() else None)
        return None if held is None else float(held != asked.negated)


def _statistic(match: Match) -> Chance:
    options = {option.name: option for option in match.options}
    chance: float | None = None
    try:
        if "--probability" in options:
            chance = float(options["--probability"].values[0])
            chance = 1.0 - chance if options["--probability"].negated else chance
        elif "--every" in options:  # one packet in so many, whichever this one is
            chance = 1.0 / int(options["--every"].values[0])
            chance = 1.0 - chance if options["--every"].negated else chance
    except (ValueError, ZeroDivisionError):
        return None
    return chance if chance is not None and 0.0 <= chance <= 1.0 else None


def _in_network(address: str, text: str) -> Chance:
    """iptables takes any mask, also one that is no prefix length (0.0.0.1/0.0.0.1)."""
    host, _, mask = text.partition("/")
    try:
        if "." in mask or ":" in mask:
            bits = int(ipaddress.ip_address(mask))
            return float(int(ipaddress.ip_address(address)) & bits == int(ipaddress.ip_address(host)) & bits)
        found = network(text)
    except ValueError:
        return None
    parsed = ipaddress.ip_address(address)
    return float(parsed.version == found.version and parsed in found)


def _interface(name: str, wanted: str) -> Chance:
    if name == UNKNOWN_INTERFACE:
        return 0.0 if wanted == "lo" else 1.0 if wanted == "+" else None
    return float(name.startswith(wanted[:-1]) if wanted.endswith("+") else name == wanted)


def _port(port: int, text: str) -> Chance:
    for part in text.split(","):
        first, _, last = part.partition(":")
        try:
            if int(first or 0) <= port <= int(last or (65535 if ":" in part else first)):
                return 1.0
        except ValueError:
            return None
    return 0.0


def _marked(option: Option, mark: int) -> Chance:
    if option.name != "--mark":
        return None
    value, _, mask = option.values[0].partition("/")
    try:
        return float(mark & (int(mask, 0) if mask else 0xFFFFFFFF) == int(value, 0))
    except ValueError:
        return None
