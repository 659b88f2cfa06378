"""Owns the rows of one Service (SPEC section 3): frontends and backends, from the checked Service, its slices and the node.

Sources: API reference of Service; KEP-2086 (internalTrafficPolicy), KEP-1860 (ipMode), KEP-563 (dual stack). Where the API
reference is silent, kube-proxy's iptables mode is followed, and the comment says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from nodeproxy.cluster.addresses import contains
from nodeproxy.cluster.checked import CheckedService, CheckedServicePort, CheckedSlice
from nodeproxy.forwarding.claims import Claimed
from nodeproxy.forwarding.endpoints import (
    Choice,
    PortMatch,
    choose,
    group_by_port,
    merge_endpoints,
    ready_local_addresses,
)
from nodeproxy.forwarding.node import NodeFacts
from nodeproxy.forwarding.table import (
    Action,
    BackendSet,
    Family,
    Frontend,
    FrontendKind,
    HealthCheck,
    Masquerade,
    ServicePort,
    ServicePortKey,
    ServicePortName,
)

# Members of an Enum are slow to look up, and this runs for every frontend of the cluster.
_CLUSTER, _LOCAL = BackendSet.CLUSTER, BackendSet.LOCAL
_FORWARD, _DROP, _REJECT = Action.FORWARD, Action.DROP, Action.REJECT
_NEVER, _NOT_LOCAL_PODS, _ALWAYS = Masquerade.NEVER, Masquerade.NOT_LOCAL_PODS, Masquerade.ALWAYS
_CLUSTER_IP, _LOAD_BALANCER_IP = FrontendKind.CLUSTER_IP, FrontendKind.LOAD_BALANCER_IP


class Route(NamedTuple):
    """What a traffic policy makes of a ServicePort's endpoints."""

    action: Action
    backend_set: BackendSet
    masquerade: Masquerade
    short_cuts: bool


def build_rows(
    service: CheckedService, slices: Mapping[str, CheckedSlice], claims: Sequence[Claimed], facts: NodeFacts
) -> list[ServicePort]:
    """The rows of a Service with those of its frontends that it gets. `claims` are ordered by port, then family."""
    sources = group_by_port(slices)
    rows = []
    for (port, family), frontends in groupby(claims, key=_port_and_family):
        match = PortMatch(family, port.name, port.protocol)
        choice = choose(merge_endpoints(sources.get(match, ()), facts.name), facts)
        key = ServicePortKey(family, ServicePortName(*service.name, port.name), port.protocol)
        rows.append(_build_row(key, service, list(frontends), choice, facts))
    return rows


def health_check(service: CheckedService, slices: Mapping[str, CheckedSlice], facts: NodeFacts) -> HealthCheck | None:
    """The health-check node port of the Service, if it has one.

    An endpoint counts once, however many ports it serves. In a dual-stack Service its pods show up in both families, so the
    larger of the two counts is taken.
    """
    families = [address.family for address in service.cluster_ips if address.family in facts.families]
    if not service.health_check_port or not families:
        return None
    counts = (len(ready_local_addresses(slices, family, facts.name)) for family in families)
    return HealthCheck(service.name, service.health_check_port, max(counts), tuple(sorted(set(families))))


def internal_route(service: CheckedService, choice: Choice, facts: NodeFacts) -> Route:
    """How traffic to the cluster IP goes (internalTrafficPolicy)."""
    backend_set = _LOCAL if service.internal_local else _CLUSTER
    masquerade = _ALWAYS if facts.masquerade_all else _NOT_LOCAL_PODS
    return Route(_action(backend_set, choice), backend_set, masquerade, short_cuts=False)


def external_route(service: CheckedService, choice: Choice) -> Route:
    """How traffic to node port, external IPs and load balancer IPs goes (externalTrafficPolicy)."""
    if not service.external_local:
        return Route(_action(_CLUSTER, choice), _CLUSTER, _ALWAYS, short_cuts=False)
    # Without any usable endpoint there is nothing to take a short-cut to, and everybody is rejected.
    return Route(_action(_LOCAL, choice), _LOCAL, _NEVER, short_cuts=choice.any_usable)


def allowed_sources(service: CheckedService, family: Family, facts: NodeFacts) -> tuple[str, ...] | None:
    """loadBalancerSourceRanges of a family; None where everybody may come.

    Ranges of the other family alone do not close this one, as in kube-proxy. An unreadable entry, which the API server
    would not have let through, allows nobody: somebody meant to keep others out.
    """
    if service.source_ranges is None:
        return None
    ranges = [cidr for cidr in service.source_ranges if cidr.family is family]
    if not ranges and not service.source_ranges_unreadable:
        return None
    return tuple(sorted(cidr.text for cidr in ranges))


def _port_and_family(claimed: Claimed) -> tuple[CheckedServicePort, Family]:
    return claimed.port, claimed.claim.family


def _build_row(
    key: ServicePortKey, service: CheckedService, claims: Sequence[Claimed], choice: Choice, facts: NodeFacts
) -> ServicePort:
    internal, external = internal_route(service, choice, facts), external_route(service, choice)
    frontends = tuple(
        _frontend(claimed, internal if claimed.kind is _CLUSTER_IP else external, service, facts) for claimed in claims
    )
    used = {frontend.backend_set for frontend in frontends}
    uses_cluster = _CLUSTER in used or any(frontend.short_cuts for frontend in frontends)
    return ServicePort(
        key=key,
        frontends=frontends,
        cluster_backends=tuple(sorted(choice.cluster)) if uses_cluster else (),
        local_backends=tuple(sorted(choice.local)) if _LOCAL in used else (),
        affinity_seconds=service.affinity_seconds,
    )


def _frontend(claimed: Claimed, route: Route, service: CheckedService, facts: NodeFacts) -> Frontend:
    family, address, _, port = claimed.claim
    sources = None
    if claimed.kind is _LOAD_BALANCER_IP and service.source_ranges is not None:
        sources = _sources_of_frontend(service, family, route.action, facts)
    return Frontend(
        kind=claimed.kind,
        address=address,
        port=port,
        action=route.action,
        backend_set=route.backend_set,
        masquerade=route.masquerade,
        short_cuts=route.short_cuts,
        allowed_sources=sources,
    )


def _sources_of_frontend(
    service: CheckedService, family: Family, action: Action, facts: NodeFacts
) -> tuple[str, ...] | None:
    if action is _REJECT:
        return None  # everybody is rejected, in or out of the ranges, as in kube-proxy
    ranges = allowed_sources(service, family, facts)
    if ranges is None or not _holds_node(service, family, facts):
        return ranges
    # A node that has the load balancer IP on an interface of its own, as many load balancers make it, talks to it from it,
    # or from another of the Service's, as in kube-proxy.
    own = {f"{address.text}/{family.address_bits}" for address in service.load_balancer_ips if address.family is family}
    return tuple(sorted({*ranges, *own}))


def _holds_node(service: CheckedService, family: Family, facts: NodeFacts) -> bool:
    addresses = facts.addresses_of(family)
    return any(contains(cidr, address) for cidr in service.source_ranges or () for address in addresses)


def _action(backend_set: BackendSet, choice: Choice) -> Action:
    if not choice.any_usable:
        return _REJECT
    if backend_set is _LOCAL and not choice.local:
        return _DROP
    return _FORWARD
