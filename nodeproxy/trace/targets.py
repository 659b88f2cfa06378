"""Owns what targets do to a packet: verdicts, addresses rewritten, marks.

Sources: iptables-extensions(8), and net/netfilter/xt_*.c. A target that is not known leaves the walk in the dark.
"""

from __future__ import annotations

import enum
import re
from typing import Final, NamedTuple

from msgspec.structs import replace

from nodeproxy.cluster.addresses import parse_address
from nodeproxy.trace.packet import PacketState
from nodeproxy.trace.rule_text import Option, Rule


class Effect(enum.Enum):
    """Where a packet goes on after a target."""

    NEXT = "next rule"
    ACCEPT = "next table"
    """Accepted, as far as this table is concerned."""
    RETURN = "back to the calling chain"
    DROP = "dropped"
    REJECT = "rejected"
    UNKNOWN = "unknown"


class Done(NamedTuple):
    """What a target did: the packet as it is now, and a remark in words ("" where the rule's text says it all)."""

    effect: Effect
    packet: PacketState
    remark: str = ""


# Targets that change nothing that decides where a packet goes.
_WITHOUT_EFFECT: Final = frozenset(
    (
        *("", "LOG", "NFLOG", "ULOG", "TRACE", "AUDIT", "CHECKSUM", "TCPMSS", "TCPOPTSTRIP", "CLASSIFY", "DSCP", "TOS"),
        *("TTL", "HL", "ECN", "SET", "SECMARK", "CONNSECMARK", "IDLETIMER", "LED", "RATEEST"),
    )
)
_DESTINATION: Final = re.compile(
    r"(?:\[(?P<six>[0-9a-fA-F:.]+)\]|(?P<four>[0-9.]+)|(?P<bare>[0-9a-fA-F:]+))(?::(?P<port>\d+))?"
)
_ALL: Final = 0xFFFFFFFF


def apply(rule: Rule, packet: PacketState) -> Done:
    """What the target of a rule that matches does. Jumps to chains are not looked at here."""
    target = rule.target
    options = {option.name: option for option in rule.target_options}
    if target in _WITHOUT_EFFECT:
        return Done(Effect.NEXT, packet)
    if target == "ACCEPT":
        return Done(Effect.ACCEPT, packet)
    if target == "RETURN":
        return Done(Effect.RETURN, packet)
    if target == "DROP":
        return Done(Effect.DROP, packet)
    if target == "REJECT":
        return Done(Effect.REJECT, packet)
    if target == "DNAT":
        return _destination(options, packet)
    if target == "REDIRECT":
        return _redirect(options, packet)
    if target in ("MASQUERADE", "SNAT"):
        return Done(Effect.ACCEPT, replace(packet, masqueraded=True))
    if target == "MARK":
        return _mark(options, packet)
    if target == "CONNMARK":
        return _connection_mark(options, packet)
    if target == "NOTRACK" or (target == "CT" and "--notrack" in options):
        return Done(Effect.NEXT, replace(packet, untracked=True))
    if target == "CT":
        return Done(Effect.NEXT, packet)
    return Done(Effect.UNKNOWN, packet, f"target {target} is not understood")


def _destination(options: dict[str, Option], packet: PacketState) -> Done:
    found = options.get("--to-destination")
    match = _DESTINATION.fullmatch(found.values[0]) if found else None
    address = parse_address(match["six"] or match["four"] or match["bare"]) if match else None
    if found is None or match is None or address is None or int(address.family) != packet.family:
        return Done(Effect.UNKNOWN, packet, f"DNAT to {found.values[0] if found else 'nothing'} is not understood")
    port = int(match["port"]) if match["port"] else packet.port
    return Done(Effect.ACCEPT, replace(packet, destination=address.text, port=port, translated=True))


def _redirect(options: dict[str, Option], packet: PacketState) -> Done:
    """To this node: the address of the incoming interface, or loopback for what the node sends; loopback stands for both."""
    ports = options.get("--to-ports")
    if ports is not None and not ports.values[0].isdigit():
        return Done(Effect.UNKNOWN, packet, f"REDIRECT to {ports.values[0]} is not understood")
    here = "127.0.0.1" if packet.family == 4 else "::1"
    port = int(ports.values[0]) if ports is not None else packet.port
    return Done(Effect.ACCEPT, replace(packet, destination=here, port=port, translated=True), "to this node")


def _mark(options: dict[str, Option], packet: PacketState) -> Done:
    for name, option in options.items():
        changed = _new_mark(name, option.values[0], packet.mark)
        if changed is not None:
            return Done(Effect.NEXT, replace(packet, mark=changed), f"mark {changed:#x}")
    return Done(Effect.UNKNOWN, packet, "MARK is not understood")


def _new_mark(name: str, text: str, mark: int) -> int | None:
    value_text, _, mask_text = text.partition("/")
    try:
        value, mask = int(value_text, 0), int(mask_text, 0) if mask_text else _ALL
    except ValueError:
        return None
    if name == "--set-xmark":
        return ((mark & ~mask) ^ value) & _ALL
    if name == "--set-mark":
        return ((mark & ~mask) | value) & _ALL
    operations = {"--or-mark": mark | value, "--and-mark": mark & value, "--xor-mark": mark ^ value}
    return operations.get(name)


def _connection_mark(options: dict[str, Option], packet: PacketState) -> Done:
    try:
        here = int(options["--nfmask"].values[0], 0) if "--nfmask" in options else _ALL
        there = int(options["--ctmask"].values[0], 0) if "--ctmask" in options else _ALL
    except ValueError:
        return Done(Effect.UNKNOWN, packet, "CONNMARK is not understood")
    if "--save-mark" in options:
        saved = (packet.connection_mark & ~there) ^ (packet.mark & here)
        return Done(Effect.NEXT, replace(packet, connection_mark=saved & _ALL))
    if "--restore-mark" in options:
        restored = (packet.mark & ~here) ^ (packet.connection_mark & there)
        return Done(Effect.NEXT, replace(packet, mark=restored & _ALL))
    for name, option in options.items():
        changed = _new_mark(name, option.values[0], packet.connection_mark) if option.values else None
        if changed is not None:
            return Done(Effect.NEXT, replace(packet, connection_mark=changed))
    return Done(Effect.UNKNOWN, packet, "CONNMARK is not understood")
