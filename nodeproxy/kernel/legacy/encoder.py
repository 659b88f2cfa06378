"""Owns the binary form of single rules: those that a service proxy changes often, and no others.

Rules are text as iptables-save prints them, without `-A CHAIN`. Revisions of extensions differ between versions of iptables
and kernels, so nothing here is believed by itself: every rule names the forms (`parts`) that it is made of, and its user
takes a part for good only after it has seen it in a rule that iptables itself wrote.

Sources: include/uapi/linux/netfilter/xt_tcpudp.h, xt_sctp.h, xt_statistic.h, xt_comment.h, xt_addrtype.h, nf_nat.h,
netfilter_ipv4/ipt_REJECT.h, netfilter_ipv6/ip6t_REJECT.h.
"""

import re
import socket
import struct
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Final, NamedTuple

from nodeproxy.kernel.legacy.layout import LAYOUTS, RETURN, Layout, extension

_TOKEN: Final = re.compile(r'"([^"\\]*)"|(\S+)')
_PROTOCOLS: Final = {"tcp": 6, "udp": 17, "sctp": 132}
_VERDICTS: Final = {"DROP": -1, "ACCEPT": -2, "RETURN": RETURN}
_REJECT_WITH: Final = {4: {"icmp-port-unreachable": 3}, 6: {"icmp6-port-unreachable": 4}}
_TARGETS_NOT_CHAINS: Final = frozenset({"MARK", "MASQUERADE", "SET", "SNAT", "REDIRECT", "LOG", "CT", "NFLOG", "TRACE"})

_HAS_PROTOCOL: Final = 1  # IP6T_F_PROTO
_INVERT_INTERFACE: Final = 0x01
_INVERT: Final = {"-s": 0x08, "-d": 0x10, "-i": _INVERT_INTERFACE}
_ADDRTYPE_LOCAL: Final = 1 << 2  # XT_ADDRTYPE_LOCAL
_MAP_IPS_AND_PORTS: Final = 3  # NF_NAT_RANGE_MAP_IPS | NF_NAT_RANGE_PROTO_SPECIFIED
_MAX_INTERFACE: Final = 15
_COMMENT_SIZE: Final = 256


class NotEncodable(Exception):
    """A rule, or part of one, that is not among those this module knows."""


class EncodedRule(NamedTuple):
    """An entry with counters of zero. `chain` is what it jumps to: its verdict, at `verdict_at`, is then still to be set."""

    entry: bytes
    chain: str | None
    verdict_at: int
    parts: frozenset[str]


class _Rule:
    """A rule while its text is read."""

    def __init__(self) -> None:
        self.addresses: dict[str, str] = {}
        self.interface = ""
        self.protocol = 0
        self.inverted = 0
        self.matches: list[bytes] = []
        self.parts: set[str] = set()


class RuleEncoder:
    """Encodes rules of one family (4 or 6)."""

    def __init__(self, family: int) -> None:
        self._layout: Layout = LAYOUTS[family]

    def encode(self, text: str) -> EncodedRule:
        """The rule as an entry. Raises NotEncodable, and ValueError where a number is none."""
        tokens = _tokens(text)
        rule = _Rule()
        position = 0
        while position < len(tokens):
            option = tokens[position]
            inverted = option == "!"
            if inverted:
                position += 1
                option = _at(tokens, position)
            value = _at(tokens, position + 1)
            position += 2
            if option == "-j" and not inverted:
                return self._finish(rule, value, tokens[position:])
            if option == "-m" and not inverted:
                end = next((at for at in range(position, len(tokens)) if tokens[at] in ("-m", "-j", "!")), len(tokens))
                self._add_match(rule, value, tokens[position:end])
                position = end
            else:
                self._add_basic(rule, option, value, inverted)
        raise NotEncodable("no target")

    def chain_head(self, name: str) -> bytes:
        """The entry that begins a chain. Raises NotEncodable for a name that does not fit."""
        target = extension(b"ERROR", 0, name.encode("ascii").ljust(30, b"\0"))
        return self._entry(_Rule(), target)

    def chain_foot(self) -> bytes:
        """The entry that ends a chain."""
        return self._entry(_Rule(), _standard(RETURN))

    def _add_basic(self, rule: _Rule, option: str, value: str, inverted: bool) -> None:
        part = f"{'! ' if inverted else ''}{option}"
        if option in ("-s", "-d") and option not in rule.addresses:
            rule.addresses[option] = value
        elif option == "-i" and not rule.interface:
            rule.interface = value
            part += "+" if value.endswith("+") else ""
        elif option == "-p" and not inverted and value in _PROTOCOLS and not rule.protocol:
            rule.protocol = _PROTOCOLS[value]
            part = f"-p {value}"
        else:
            raise NotEncodable(f"{part} {value}")
        rule.inverted |= _INVERT.get(option, 0) if inverted else 0
        rule.parts.add(part)

    @staticmethod
    def _add_match(rule: _Rule, name: str, options: list[str]) -> None:
        form = " ".join([name, *options[::2]])
        encode = _MATCHES.get(form)
        if encode is None or len(options) % 2 or (name in _PROTOCOLS and rule.protocol != _PROTOCOLS[name]):
            raise NotEncodable(f"-m {name} {' '.join(options)}")
        rule.matches.append(encode(*options[1::2]))
        rule.parts.add(f"{form} LOW:HIGH" if name in _PROTOCOLS and ":" in options[1] else form)

    def _finish(self, rule: _Rule, target: str, options: list[str]) -> EncodedRule:
        if target == "DNAT":
            if len(options) != 2 or options[0] != "--to-destination":
                raise NotEncodable("-j DNAT")
            return self._encoded(rule, "DNAT", self._dnat(options[1]))
        if target == "REJECT":
            number = _REJECT_WITH[self._layout.family].get(options[1] if len(options) == 2 else "")
            if number is None or options[0] != "--reject-with":
                raise NotEncodable("-j REJECT")
            return self._encoded(rule, "REJECT", extension(b"REJECT", 0, struct.pack("=I", number)))
        if options or target in _TARGETS_NOT_CHAINS or len(target) >= 30:
            raise NotEncodable(f"-j {target}")
        if target in _VERDICTS:
            return self._encoded(rule, target, _standard(_VERDICTS[target]))
        return self._encoded(rule, "jump", _standard(0), target)

    def _dnat(self, destination: str) -> bytes:
        host, _, port = destination.rpartition(":")
        if self._layout.family == 6:
            if not (host.startswith("[") and host.endswith("]")):
                raise NotEncodable(f"--to-destination {destination}")
            host = host[1:-1]
        address = self._address(host).ljust(16, b"\0")
        number = struct.pack("!H", _number(port, 0xFFFF))
        data = struct.pack("=I16s16s2s2s2s", _MAP_IPS_AND_PORTS, address, address, number, number, b"\0\0")
        return extension(b"DNAT", 2, data)

    def _encoded(self, rule: _Rule, part: str, target: bytes, chain: str | None = None) -> EncodedRule:
        entry = self._entry(rule, target)
        verdict_at = len(entry) - len(target) + 32
        return EncodedRule(entry, chain, verdict_at, frozenset({*rule.parts, f"-j {part}"}))

    def _entry(self, rule: _Rule, target: bytes) -> bytes:
        layout = self._layout
        source, source_mask = self._network(rule.addresses.get("-s"))
        destination, destination_mask = self._network(rule.addresses.get("-d"))
        addresses = source + destination + source_mask + destination_mask
        interface, interface_mask = _interface(rule.interface)
        interfaces = interface + bytes(16) + interface_mask + bytes(16)
        if layout.family == 4:
            rest = struct.pack("=HBB", rule.protocol, 0, rule.inverted)
        else:
            flags = _HAS_PROTOCOL if rule.protocol else 0
            rest = struct.pack("=HBBB", rule.protocol, 0, flags, rule.inverted)
        matches = b"".join(rule.matches)
        head = (addresses + interfaces + rest).ljust(layout.target_offset_at, b"\0")
        target_offset = layout.entry_size + len(matches)
        offsets = struct.pack("=HH", target_offset, target_offset + len(target))
        return (head + offsets).ljust(layout.entry_size, b"\0") + matches + target

    def _network(self, text: str | None) -> tuple[bytes, bytes]:
        size = 4 if self._layout.family == 4 else 16
        if text is None:
            return bytes(size), bytes(size)
        host, _, length = text.partition("/")
        free = size * 8 - _number(length, size * 8)
        mask = ((1 << size * 8) - (1 << free)).to_bytes(size)
        return self._address(host), mask

    def _address(self, text: str) -> bytes:
        try:
            return socket.inet_pton(self._layout.domain, text)
        except OSError as error:
            raise NotEncodable(f"address {text}") from error


def _tokens(text: str) -> list[str]:
    if "\\" in text:
        raise NotEncodable("an escaped character")
    return [match[1] if match[1] is not None else match[2] for match in _TOKEN.finditer(text)]


def _at(tokens: list[str], position: int) -> str:
    if position >= len(tokens):
        raise NotEncodable("ends early")
    return tokens[position]


def _number(text: str, greatest: int) -> int:
    if not text.isdecimal() or int(text) > greatest:
        raise NotEncodable(f"number {text!r}")
    return int(text)


def _standard(verdict: int) -> bytes:
    return extension(b"", 0, struct.pack("=i", verdict))


def _comment(comment: str) -> bytes:
    text = comment.encode()
    if len(text) >= _COMMENT_SIZE:
        raise NotEncodable("a comment of 256 characters or more")
    return extension(b"comment", 0, text.ljust(_COMMENT_SIZE, b"\0"))


@lru_cache(maxsize=4096)
def _statistic(mode: str, probability: str) -> bytes:
    """xt_statistic_info: mode (0 is random), flags, probability in units of 2**-31, packet, count, pointer.

    The last ones mean nothing in this mode, but iptables computes the count all the same.
    """
    if mode != "random":
        raise NotEncodable(f"-m statistic --mode {mode}")
    share = round(float(probability) * 0x80000000)
    return extension(b"statistic", 0, struct.pack("=HH3IQ", 0, 0, share, 0, share, 0))


def _addrtype(source: str | None, destination: str | None) -> bytes:
    """xt_addrtype_info_v1: source, dest, flags."""
    if {source, destination} - {None, "LOCAL"}:
        raise NotEncodable("-m addrtype")
    types = [_ADDRTYPE_LOCAL if name else 0 for name in (source, destination)]
    return extension(b"addrtype", 1, struct.pack("=HHI", *types, 0))


@lru_cache(maxsize=4096)
def _ports(name: str, ports: str) -> bytes:
    """Destination ports, as 80 or 80:90."""
    first, _, last = ports.partition(":")
    low, high = _number(first, 0xFFFF), _number(last or first, 0xFFFF)
    every = (0, 0xFFFF)
    if name == "tcp":
        data = struct.pack("=4H4B", *every, low, high, 0, 0, 0, 0)
    elif name == "udp":
        data = struct.pack("=4HB", *every, low, high, 0)
    else:
        # dpts, spts, chunkmap[64], chunk_match_type, flag_info[4] (of no chunk), flag_count, flags (destination), invflags
        data = struct.pack("=2H4x256xI12si2I", low, high, 0, b"\xff\0\0" * 4, 0, 2, 0)
    return extension(name.encode(), 0, data)


_MATCHES: Final[Mapping[str, Callable[..., bytes]]] = {
    **{f"{name} --dport": partial(_ports, name) for name in _PROTOCOLS},
    "comment --comment": _comment,
    "statistic --mode --probability": _statistic,
    "addrtype --src-type": lambda source: _addrtype(source, None),
    "addrtype --dst-type": lambda destination: _addrtype(None, destination),
}
"""By name and options, in the order in which iptables-save prints them."""


def _interface(name: str) -> tuple[bytes, bytes]:
    """Name and mask. The final zero counts, unless the name ends in +, which stays in it and does not count."""
    text = name.encode()
    if not text:
        return bytes(16), bytes(16)
    if len(text) > _MAX_INTERFACE or name == "+":
        raise NotEncodable(f"interface {name}")
    counting = len(text) - 1 if name.endswith("+") else len(text) + 1
    return text.ljust(16, b"\0"), (b"\xff" * counting).ljust(16, b"\0")
