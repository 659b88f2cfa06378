"""Owns what a walk asks of a kernel: rules, routes, ipsets, virtual servers. What answers may be live or saved in files."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from nodeproxy.kernel.ipset_messages import SetContents
from nodeproxy.kernel.ipvs_types import RealServerState, VirtualServerSettings
from nodeproxy.trace.packet import PacketState
from nodeproxy.trace.saved_tables import SavedTables


class RouteKind(enum.StrEnum):
    """Where the routing tables send a packet."""

    LOCAL = "local"
    """To this node."""
    UNICAST = "unicast"
    """Out by an interface."""
    OTHER = "other"
    """Broadcast or multicast."""
    NONE = "none"
    """Nowhere: no route, a route that rejects, or a packet that the kernel takes for a martian."""


class Route(NamedTuple):
    """A routing decision. `interface` is the one it leaves by; `source` what the node would send from; `fault` why not."""

    kind: RouteKind
    interface: str = ""
    source: str | None = None
    fault: str = ""


class VirtualServerFound(NamedTuple):
    """The virtual server that takes a packet."""

    name: str
    settings: VirtualServerSettings
    real_servers: Sequence[RealServerState]


class KernelViewError(Exception):
    """The kernel, or what was saved of it, cannot be read. One line."""


class KernelView(Protocol):
    """One network namespace's kernel, looked at. Methods raise KernelViewError."""

    origin: str
    """In words: where this comes from."""

    def not_followed(self) -> Sequence[str]:
        """What may decide about packets as well and is not followed, in words."""

    def tables(self) -> Mapping[str, SavedTables]:
        """The packet filter's tables of the view's family, by variant. A kernel passes those of both variants."""

    def route(self, destination: str, *, source: str | None = None, incoming: str = "", mark: int = 0) -> Route:
        """The routing decision for a packet that comes in by `incoming`, or ("") is sent by the node itself."""

    def own_addresses(self) -> frozenset[str] | None:
        """The node's addresses, without those that it has for the sake of Services; None where they are not known."""

    def ip_set(self, name: str) -> SetContents | None:
        """An ipset; None where there is none of that name, or it is not known."""

    def virtual_server(self, packet: PacketState) -> VirtualServerFound | None:
        """The IPVS virtual server for a packet, if any."""

    def recent(self, name: str, address: str, seconds: int | None) -> bool | None:
        """Whether a list of the `recent` match holds an address, seen in so many seconds; None where that is not known."""
