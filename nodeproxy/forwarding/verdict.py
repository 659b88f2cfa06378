"""Owns the oracle: what must happen to one packet, by the forwarding table alone.

It is the definition that the kernel is measured against: tests, `trace` and `compare` ask it, no programmer does.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Mapping
from typing import NamedTuple

from msgspec import Struct

from nodeproxy.cluster.addresses import network
from nodeproxy.forwarding.claims import Claim
from nodeproxy.forwarding.table import (
    Action,
    Backend,
    BackendSet,
    Family,
    ForwardingTable,
    Frontend,
    IPProtocol,
    Masquerade,
    ServiceName,
    ServicePort,
)


class Packet(Struct, frozen=True):
    """The first packet of a connection, and what the node can tell of it.

    Addresses are canonical. `from_local_pod` is None where detect-local cannot tell. `to_node` says that the destination is
    an address of the node, `to_node_port_address` that nodePortAddresses allows it as well (loopback by its own rule).
    """

    family: Family
    source: str
    destination: str
    port: int
    protocol: IPProtocol = IPProtocol.TCP
    from_local_pod: bool | None = False
    from_node: bool = False
    to_node: bool = False
    to_node_port_address: bool = False


class Outcome(enum.Enum):
    """What happens to a packet."""

    FORWARD = "forward"
    REJECT = "reject"
    DROP = "drop"
    ACCEPT = "accept"
    """Let through to the node itself: a health-check node port."""
    NO_MATCH = "no match"


class Verdict(Struct, frozen=True):
    """What happens to a packet, and by which frontend.

    A forwarded packet goes to any one of `backends`; to those in `hairpins`, which is where it came from, it goes with its
    source rewritten even where `masquerade` is false.
    """

    outcome: Outcome
    backends: tuple[Backend, ...] = ()
    masquerade: bool = False
    hairpins: tuple[Backend, ...] = ()
    row: ServicePort | None = None
    frontend: Frontend | None = None
    health_check: ServiceName | None = None


class Located(NamedTuple):
    """A frontend and the row that it is of."""

    row: ServicePort
    frontend: Frontend


def index_frontends(table: ForwardingTable) -> Mapping[Claim, Located]:
    """All frontends by where they are; made once, it makes many verdicts fast."""
    return {
        Claim(row.key.family, frontend.address, row.key.protocol, frontend.port): Located(row, frontend)
        for row in table.rows.values()
        for frontend in row.frontends
    }


def verdict(table: ForwardingTable, packet: Packet, index: Mapping[Claim, Located] | None = None) -> Verdict:
    """What must happen to `packet`. `index` is that of `table`, where the caller has one."""
    index = index_frontends(table) if index is None else index
    found = index.get(Claim(packet.family, packet.destination, packet.protocol, packet.port))
    if found is None and packet.to_node_port_address:
        found = index.get(Claim(packet.family, None, packet.protocol, packet.port))
    if found is not None:
        return _at_frontend(found.row, found.frontend, packet)
    if packet.to_node and packet.protocol is IPProtocol.TCP:
        for check in table.health_checks.values():
            if check.port == packet.port and packet.family in check.families:
                return Verdict(Outcome.ACCEPT, health_check=check.service)
    return Verdict(Outcome.NO_MATCH)


def _at_frontend(row: ServicePort, frontend: Frontend, packet: Packet) -> Verdict:
    if frontend.action is Action.REJECT:
        return Verdict(Outcome.REJECT, row=row, frontend=frontend)
    # The firewall of a load balancer IP comes before the short-cuts: they are for traffic that may come at all.
    if not may_come(frontend, packet.source):
        return Verdict(Outcome.DROP, row=row, frontend=frontend)
    if frontend.short_cuts and packet.from_local_pod:
        return _forward(row, frontend, BackendSet.CLUSTER, packet, masquerade=False)
    if frontend.short_cuts and packet.from_node:
        return _forward(row, frontend, BackendSet.CLUSTER, packet, masquerade=True)
    if frontend.action is Action.DROP:
        return Verdict(Outcome.DROP, row=row, frontend=frontend)
    masquerade = frontend.masquerade is Masquerade.ALWAYS or (
        frontend.masquerade is Masquerade.NOT_LOCAL_PODS and packet.from_local_pod is False
    )
    return _forward(row, frontend, frontend.backend_set, packet, masquerade=masquerade)


def _forward(row: ServicePort, frontend: Frontend, which: BackendSet, packet: Packet, *, masquerade: bool) -> Verdict:
    backends = row.backends(which)
    hairpins = tuple(backend for backend in backends if backend.address == packet.source)
    return Verdict(Outcome.FORWARD, backends, masquerade, hairpins, row, frontend)


def may_come(frontend: Frontend, source: str) -> bool:
    """Whether the frontend's loadBalancerSourceRanges, if it has any, let this source in."""
    if frontend.allowed_sources is None:
        return True
    address = ipaddress.ip_address(source)
    return any(address in network(cidr) for cidr in frontend.allowed_sources)
