"""Owns the choice of endpoints (SPEC section 2): which of a ServicePort are in the Cluster and in the Local set, and why.

Sources: API reference of EndpointSlice; KEP-1669 (terminating endpoints), KEP-2433 (zone hints), KEP-3015 (node hints),
KEP-2086 (internalTrafficPolicy).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from msgspec import Struct

from nodeproxy.cluster.checked import CheckedEndpoint, CheckedSlice, Readiness
from nodeproxy.forwarding.node import NodeFacts
from nodeproxy.forwarding.table import Backend, BackendSet, Family, IPProtocol

# Members of an Enum are slow to look up, and this runs for every endpoint of the cluster.
_READY, _DRAINING = Readiness.READY, Readiness.DRAINING


class PortMatch(NamedTuple):
    """What ties a slice's port to a Service's: family, name and protocol. (The port numbers are each their own.)"""

    family: Family
    name: str
    protocol: IPProtocol


class PortSource(NamedTuple):
    """A slice that has endpoints for a ServicePort, and the port number that they listen on."""

    slice: CheckedSlice
    port: int


class Candidate(Struct, frozen=True, gc=False):
    """An endpoint of a ServicePort, after merging, whether or not it is chosen."""

    backend: Backend
    endpoint: CheckedEndpoint


class TopologyMode(enum.Enum):
    """Which endpoints the hints leave in the Cluster set."""

    ANY = "any"
    SAME_ZONE = "same zone"
    SAME_NODE = "same node"


_ANY = TopologyMode.ANY


class Choice(Struct, frozen=True, gc=False):
    """The two sets, unsorted. `any_usable` says whether any endpoint of the cluster could serve at all."""

    cluster: Sequence[Backend]
    local: Sequence[Backend]
    topology: TopologyMode
    any_usable: bool


class Reason(enum.Enum):
    """Why an endpoint is in a set, or is not."""

    CHOSEN = "chosen"
    NOT_READY = "not ready, and not serving while it terminates"
    DRAINING = "terminating, and others are ready"
    REMOTE = "on another node"
    OTHER_ZONE = "hinted for other zones"
    OTHER_NODE = "hinted for other nodes"


def group_by_port(slices: Mapping[str, CheckedSlice]) -> dict[PortMatch, list[PortSource]]:
    """The slices that serve each port, in the order of slice names, so that the outcome does not depend on history."""
    ordered = slices.values() if len(slices) < 2 else [slices[name] for name in sorted(slices)]
    groups: dict[PortMatch, list[PortSource]] = {}
    for slice_ in ordered:
        for port in slice_.ports:
            match = PortMatch(slice_.family, port.name, port.protocol)
            groups.setdefault(match, []).append(PortSource(slice_, port.port))
    return groups


def merge_endpoints(sources: Sequence[PortSource], node_name: str) -> list[Candidate]:
    """All endpoints of a ServicePort, each address and port once.

    Where several slices have it (while a slice is being replaced, or when an address got a new pod), the entry of the
    greater `Readiness` holds; then the one on this node; then the one in the slice whose name sorts first.
    """
    if len(sources) == 1:
        slice_, port = sources[0]
        endpoints = slice_.endpoints
        if len({endpoint.address for endpoint in endpoints}) == len(endpoints):  # nearly always: nothing to merge
            return [Candidate(Backend(e.address, port, e.node == node_name), e) for e in endpoints]
    best: dict[tuple[str, int], Candidate] = {}
    for slice_, port in sources:
        for endpoint in slice_.endpoints:
            local = endpoint.node == node_name
            key = (endpoint.address, port)
            rival = best.get(key)
            if rival is None or (endpoint.readiness, local) > (rival.endpoint.readiness, rival.backend.local):
                best[key] = Candidate(Backend(endpoint.address, port, local), endpoint)
    return list(best.values())


def choose(candidates: Sequence[Candidate], facts: NodeFacts) -> Choice:
    """The Cluster and the Local set."""
    ready = [candidate for candidate in candidates if candidate.endpoint.readiness is _READY]
    draining = [candidate for candidate in candidates if candidate.endpoint.readiness is _DRAINING]
    topology = topology_mode(ready, facts)
    local = [c.backend for c in ready if c.backend.local] or [c.backend for c in draining if c.backend.local]
    cluster = [c.backend for c in ready or draining if topology is _ANY or _hinted_here(c, topology, facts)]
    return Choice(cluster=cluster, local=local, topology=topology, any_usable=bool(ready or draining))


def topology_mode(ready: Sequence[Candidate], facts: NodeFacts) -> TopologyMode:
    """What the hints of the ready endpoints amount to: they count only where every one of them has some."""
    if not ready:
        return _ANY
    first = ready[0].endpoint
    if first.node_hints and _hints_hold(facts.name, [c.endpoint.node_hints for c in ready]):
        return TopologyMode.SAME_NODE
    if first.zone_hints and facts.zone and _hints_hold(facts.zone, [c.endpoint.zone_hints for c in ready]):
        return TopologyMode.SAME_ZONE
    return _ANY


def explain(candidate: Candidate, which: BackendSet, choice: Choice, facts: NodeFacts) -> Reason:
    """Why `candidate` is in one of the sets of `choice`, or is not."""
    if which is BackendSet.LOCAL and not candidate.backend.local:
        return Reason.REMOTE
    if candidate.backend in (choice.local if which is BackendSet.LOCAL else choice.cluster):
        return Reason.CHOSEN
    if candidate.endpoint.readiness is _READY:
        return Reason.OTHER_NODE if choice.topology is TopologyMode.SAME_NODE else Reason.OTHER_ZONE
    return Reason.DRAINING if candidate.endpoint.readiness is _DRAINING else Reason.NOT_READY


def ready_local_addresses(slices: Mapping[str, CheckedSlice], family: Family, node_name: str) -> set[str]:
    """Addresses of the Service's ready endpoints on this node, whatever the port: what a health check counts.

    Draining ones do not count: they may still serve, but the load balancer should stop sending (KEP-1669). Slices without
    a usable port do not count either, as in kube-proxy.
    """
    return {
        endpoint.address
        for slice_ in slices.values()
        if slice_.family is family and slice_.ports
        for endpoint in slice_.endpoints
        if endpoint.readiness is _READY and endpoint.node == node_name
    }


def _hints_hold(here: str, hints: Sequence[tuple[str, ...]]) -> bool:
    """Whether every endpoint has hints, and one of them is meant for here."""
    return all(hints) and any(here in of_endpoint for of_endpoint in hints)


def _hinted_here(candidate: Candidate, topology: TopologyMode, facts: NodeFacts) -> bool:
    if topology is TopologyMode.SAME_NODE:
        return facts.name in candidate.endpoint.node_hints
    return facts.zone in candidate.endpoint.zone_hints
