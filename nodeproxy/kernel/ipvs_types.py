"""Owns what IPVS is made of: virtual servers, their real servers, and the operations on them, as text and numbers.

Source: include/uapi/linux/ip_vs.h.
"""

from __future__ import annotations

from enum import IntFlag

from msgspec import Struct


class Flag(IntFlag):
    """Flags of a virtual server that its scheduler or the forwarding heeds. SH_* and MH_* are the same bits."""

    NONE = 0
    ONE_PACKET = 0x4
    SH_FALLBACK = 0x8
    SH_PORT = 0x10
    MH_FALLBACK = 0x8
    MH_PORT = 0x10
    SCHEDULER_3 = 0x20


class VirtualServer(Struct, frozen=True, gc=False):
    """Which virtual server. `family` is 4 or 6, `protocol` tcp, udp or sctp (a number as text where the kernel lists another
    one), `address` text as `ipaddress` writes it, `port` 0 to 65535 (0: all ports, for persistent ones)."""

    family: int
    protocol: str
    address: str
    port: int

    def __str__(self) -> str:
        return f"{self.protocol} {_endpoint(self.address, self.port)}"


class FirewallMark(Struct, frozen=True, gc=False):
    """A virtual server for packets of a family (4, 6) that carry a mark (1 to 2**32 - 1)."""

    family: int
    mark: int

    def __str__(self) -> str:
        return f"IPv{self.family} firewall mark {self.mark}"


class VirtualServerSettings(Struct, frozen=True, gc=False):
    """How a virtual server forwards. `persistence_seconds`: how long a client keeps its real server, None: not persistent.

    `persistence_prefix`: clients whose addresses are equal in so many bits share a real server; None: the whole address.
    """

    scheduler: str = "rr"
    persistence_seconds: int | None = None
    flags: Flag = Flag.NONE
    persistence_prefix: int | None = None


class RealServer(Struct, frozen=True, gc=False):
    """Which real server of a virtual server; of the same IP family. Addresses as in `VirtualServer`, port 0 to 65535."""

    address: str
    port: int

    def __str__(self) -> str:
        return _endpoint(self.address, self.port)


class RealServerState(Struct, frozen=True, gc=False):
    """A real server as the kernel lists it. `masquerade`: the forwarding method is NAT, the only one that we set."""

    server: RealServer
    weight: int
    active_connections: int
    inactive_connections: int
    persistent_connections: int
    masquerade: bool = True


class Statistics(Struct, frozen=True, gc=False):
    """What went through a virtual server since it was made: connections, packets, bytes; `in` is from clients."""

    connections: int = 0
    in_packets: int = 0
    out_packets: int = 0
    in_bytes: int = 0
    out_bytes: int = 0


class Timeouts(Struct, frozen=True, gc=False):
    """How long IPVS remembers an idle connection, in whole seconds: TCP established, TCP after a FIN, UDP."""

    tcp: int
    tcp_fin: int
    udp: int


class AddVirtualServer(Struct, frozen=True, gc=False):
    """EEXIST (17) if there, ENOENT (2) if the kernel does not have the scheduler."""

    server: VirtualServer | FirewallMark
    settings: VirtualServerSettings


class EditVirtualServer(Struct, frozen=True, gc=False):
    """Replaces all settings; real servers and connections stay. ESRCH (3) if absent, ENOENT (2) for the scheduler."""

    server: VirtualServer | FirewallMark
    settings: VirtualServerSettings


class DeleteVirtualServer(Struct, frozen=True, gc=False):
    """Deletes it with its real servers. ESRCH (3) if absent."""

    server: VirtualServer | FirewallMark


class AddRealServer(Struct, frozen=True, gc=False):
    """Masquerading. EEXIST (17) if there, ESRCH (3) without the virtual server, ERANGE (34) for a weight over 2**31 - 1."""

    server: VirtualServer | FirewallMark
    real: RealServer
    weight: int = 1


class EditRealServer(Struct, frozen=True, gc=False):
    """Sets the weight (0: no new connections). ENOENT (2) if absent, ESRCH (3) without the virtual server."""

    server: VirtualServer | FirewallMark
    real: RealServer
    weight: int


class DeleteRealServer(Struct, frozen=True, gc=False):
    """Its connections are dropped with the next packet (sysctl expire_nodest_conn). ENOENT (2) if absent, ESRCH (3)."""

    server: VirtualServer | FirewallMark
    real: RealServer


Operation = AddVirtualServer | EditVirtualServer | DeleteVirtualServer | AddRealServer | EditRealServer | DeleteRealServer


def _endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
