"""Owns the question whether an ipset holds a packet, for sets of addresses, networks and ports."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Final

from nodeproxy.cluster.addresses import network
from nodeproxy.kernel.ipset_messages import SetContents
from nodeproxy.trace.packet import PacketState

_EXACT: Final = frozenset(("ip", "port"))
_KNOWN: Final = frozenset(("ip", "port", "net"))


class IpSet:
    """A set, ready to be asked many times."""

    def __init__(self, contents: SetContents) -> None:
        self._method, _, dimensions = contents.spec.type.partition(":")
        self._dimensions = tuple(dimensions.split(","))
        self._masked = contents.masked
        self._texts = {entry.text: entry.timeout for entry in contents.entries if not entry.nomatch}
        self._exceptions = [entry.text for entry in contents.entries if entry.nomatch]
        self._plain = _EXACT.issuperset(self._dimensions) and not any("/" in text for text in self._texts)

    def holds(self, packet: PacketState, flags: Sequence[str]) -> bool | None:
        """Whether the set holds the packet; `flags` say which end of it each dimension is about. None: not known."""
        if self._masked or not _KNOWN.issuperset(self._dimensions) or len(flags) < len(self._dimensions):
            return None
        values = [self._value(what, packet, flag) for what, flag in zip(self._dimensions, flags, strict=False)]
        if any(value is None for value in values):
            return None if self._texts else False
        wanted = [value for value in values if value is not None]
        if any(self._covers(text, wanted) for text in self._exceptions):
            return None  # the kernel takes the narrower of the exception and a member
        if self._plain:
            return ",".join(wanted) in self._texts
        return any(self._covers(text, wanted) for text in self._texts)

    def seconds_left(self, address: str) -> int | None:
        """How long an entry still lives, None where it is not there or lives on."""
        return self._texts.get(address)

    def _value(self, what: str, packet: PacketState, flag: str) -> str | None:
        if what != "port":
            return packet.source if flag == "src" else packet.destination
        if flag == "src":
            return None
        return str(packet.port) if self._method == "bitmap" else f"{packet.protocol}:{packet.port}"

    def _covers(self, text: str, wanted: Sequence[str]) -> bool:
        parts = text.split(",")
        return len(parts) == len(wanted) and all(
            part == value if what == "port" else _within(value, part)
            for what, part, value in zip(self._dimensions, parts, wanted, strict=True)
        )


def _within(address: str, text: str) -> bool:
    if "/" not in text:
        return address == text
    try:
        return ipaddress.ip_address(address) in network(text)
    except ValueError:
        return False
