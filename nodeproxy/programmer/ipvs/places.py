"""Owns the translation of one row of the forwarding table into places: what is at each address and port. Pure.

A place is either a virtual server or one of the answers that IPVS cannot give (reject, drop), with the ipsets that the
rules around IPVS look into. Two things that IPVS itself cannot do are done by redirecting (DNAT) a new connection from one
place to the virtual server at another, before IPVS sees it:

- *Short-cuts* of policy Local: a virtual server does not tell sources apart, so local pods and the node itself, who go to
  the Cluster set, are redirected to the virtual server that has it: the cluster IP's, or a stand-in where that one has the
  Local set, too.
- *Session affinity* holds for a ServicePort, and IPVS remembers clients for each virtual server. So all frontends of a row
  with affinity that lead to the same set share the virtual server of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from msgspec import Struct

from nodeproxy.forwarding.table import (
    Action,
    Backend,
    BackendSet,
    Family,
    Frontend,
    FrontendKind,
    Masquerade,
    ServicePort,
    ServicePortKey,
)
from nodeproxy.kernel.ipvs import Flag, VirtualServer, VirtualServerSettings
from nodeproxy.programmer.ipvs.names import STAND_IN_ADDRESS, SetName

# Kernels store and list all flags of a virtual server. This one, far from those that mean something, says that it is ours.
OURS = Flag(1 << 30)

_FORWARD, _DROP, _REJECT = Action.FORWARD, Action.DROP, Action.REJECT
_CLUSTER, _LOCAL = BackendSet.CLUSTER, BackendSet.LOCAL
_CLUSTER_IP, _NODE_PORT = FrontendKind.CLUSTER_IP, FrontendKind.NODE_PORT
_FORWARD_SET = {
    Masquerade.NOT_LOCAL_PODS: SetName.CLUSTER_IP,
    Masquerade.ALWAYS: SetName.MASQUERADED,
    Masquerade.NEVER: SetName.SOURCE_KEPT,
}


class Target(NamedTuple):
    """Address and port of a virtual server that connections are redirected to."""

    address: str
    port: int


class Server(Struct, frozen=True, gc=False):
    """A wanted virtual server: its settings and the real servers it has, all of equal weight."""

    settings: VirtualServerSettings
    backends: tuple[Backend, ...]


class Place(Struct, frozen=True, gc=False):
    """What is at one address and port: at most one of a virtual server and a redirect for everybody; sets; short-cut."""

    sets: tuple[SetName, ...]
    server: Server | None = None
    redirect: Target | None = None
    short_cut: Target | None = None
    allowed_sources: tuple[str, ...] = ()


class RowPlaces(Struct, frozen=True, gc=False):
    """A row as places. `addresses` are those the node must have for its sake; `node_ports` are at the node's own."""

    row: ServicePort
    addresses: tuple[str, ...]
    fixed: dict[VirtualServer, Place]
    node_ports: dict[VirtualServer, Place]


class Translator:
    """Translates rows of one family. `stand_in_port` gives a row the port of its stand-in, always the same one."""

    def __init__(self, family: Family, scheduler: str, stand_in_port: Callable[[ServicePortKey], int]) -> None:
        self._family = int(family)
        self._stand_in = STAND_IN_ADDRESS[family]
        self._stand_in_port = stand_in_port
        self._scheduler = scheduler
        self._plain = VirtualServerSettings(scheduler=scheduler, flags=OURS)

    def translate(self, row: ServicePort, node_addresses: Sequence[str]) -> RowPlaces:
        """All places of a row. `node_addresses` are those that serve node ports."""
        addresses = dict.fromkeys(frontend.address for frontend in row.frontends if frontend.address is not None)
        fixed: dict[VirtualServer, Place] = {}
        node_ports: dict[VirtualServer, Place] = {}
        settings = self._settings(row)
        shared = self._shared_servers(row, settings)
        short_cut = None
        if any(frontend.short_cuts for frontend in row.frontends):
            short_cut = self._cluster_set(row, settings, shared, fixed, addresses)
        for frontend in row.frontends:
            place = _place(row, frontend, settings, shared, short_cut)
            if frontend.kind is _NODE_PORT:
                for address in node_addresses:
                    node_ports[self._at(row, address, frontend.port)] = place
            elif frontend.address is not None:
                fixed[self._at(row, frontend.address, frontend.port)] = place
        return RowPlaces(row, tuple(addresses), fixed, node_ports)

    def _at(self, row: ServicePort, address: str, port: int) -> VirtualServer:
        return VirtualServer(self._family, row.key.protocol.value, address, port)

    def _settings(self, row: ServicePort) -> VirtualServerSettings:
        if row.affinity_seconds is None:
            return self._plain
        return VirtualServerSettings(scheduler=self._scheduler, persistence_seconds=row.affinity_seconds, flags=OURS)

    @staticmethod
    def _shared_servers(row: ServicePort, settings: VirtualServerSettings) -> dict[BackendSet, Frontend]:
        """With affinity, the frontend whose virtual server all others of the same set share. Never a node port."""
        shared: dict[BackendSet, Frontend] = {}
        if settings.persistence_seconds is not None:
            for frontend in row.frontends:
                if frontend.action is _FORWARD and frontend.address is not None:
                    shared.setdefault(frontend.backend_set, frontend)
        return shared

    def _cluster_set(
        self,
        row: ServicePort,
        settings: VirtualServerSettings,
        shared: dict[BackendSet, Frontend],
        places: dict[VirtualServer, Place],
        addresses: dict[str, None],
    ) -> Target:
        """The virtual server with the Cluster set: a cluster IP's, else the stand-in, which is added to `places`."""
        candidates = [shared[_CLUSTER]] if _CLUSTER in shared else row.frontends
        for frontend in candidates:
            if frontend.kind is _CLUSTER_IP and frontend.action is _FORWARD and frontend.backend_set is _CLUSTER:
                assert frontend.address is not None
                return Target(frontend.address, frontend.port)
        target = Target(self._stand_in, self._stand_in_port(row.key))
        server = Server(settings, row.cluster_backends)
        places[self._at(row, *target)] = Place((SetName.SOURCE_KEPT,), server)
        addresses[target.address] = None
        return target


def _place(
    row: ServicePort,
    frontend: Frontend,
    settings: VirtualServerSettings,
    shared: dict[BackendSet, Frontend],
    short_cut: Target | None,
) -> Place:
    if frontend.action is _REJECT:
        return Place((SetName.REJECTED,))
    sets = list(_guards(frontend))
    sources = (frontend.allowed_sources or ()) if SetName.FIREWALLED in sets else ()
    detour = short_cut if frontend.short_cuts else None
    if frontend.action is _DROP:
        return Place((*sets, SetName.DROPPED), short_cut=detour, allowed_sources=sources)
    sets.append(_FORWARD_SET[frontend.masquerade])
    other = shared.get(frontend.backend_set, frontend)
    if other is not frontend and other.address is not None:
        redirect = Target(other.address, other.port)
        return Place((*sets, SetName.REDIRECTED), redirect=redirect, short_cut=detour, allowed_sources=sources)
    server = Server(settings, row.backends(frontend.backend_set))
    return Place(tuple(sets), server, short_cut=detour, allowed_sources=sources)


def _guards(frontend: Frontend) -> Iterator[SetName]:
    if frontend.short_cuts:
        yield SetName.SHORT_CUT
    # A range that holds everybody is no fence, and ipsets cannot hold it.
    if frontend.allowed_sources is not None and not any(cidr.endswith("/0") for cidr in frontend.allowed_sources):
        yield SetName.FIREWALLED


def entry(server: VirtualServer) -> str:
    """The place as an entry of a hash:ip,port set."""
    return f"{server.address},{server.protocol}:{server.port}"
