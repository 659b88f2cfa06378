"""Owns the packet that is walked through the kernel's rules, as it is at one point of its way."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

UNKNOWN_INTERFACE: Final = "?"
"""An interface whose name is not known, and which is not the loopback interface."""


class PacketState(Struct, frozen=True):
    """The first packet of a connection: conntrack calls it NEW.

    `protocol` is tcp, udp or sctp. The source port is not known: the client's kernel chooses it. `incoming` and `outgoing`
    are interfaces, "" where the packet has none at this point. `translated` and `masqueraded`: conntrack has a DNAT or an
    SNAT for the connection. `untracked`: the raw table took it out of conntrack. `carried`: IPVS has rewritten it.
    """

    family: int
    protocol: str
    source: str
    destination: str
    port: int
    incoming: str = ""
    outgoing: str = ""
    mark: int = 0
    connection_mark: int = 0
    translated: bool = False
    masqueraded: bool = False
    untracked: bool = False
    carried: bool = False
