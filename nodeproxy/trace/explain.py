"""Owns the why of a verdict, in sentences; where no frontend is met, what is near."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Final

from nodeproxy.api.objects import Kind, ObjectKey, Service
from nodeproxy.cluster.addresses import network
from nodeproxy.cluster.names import IPProtocol, ServiceName
from nodeproxy.forwarding.claims import Claim, claims_of
from nodeproxy.forwarding.table import Action, BackendSet, Frontend, FrontendKind, Masquerade, ServicePort
from nodeproxy.forwarding.verdict import Outcome, Packet, Verdict, may_come
from nodeproxy.programmer.base import LocalDetector
from nodeproxy.snapshot.model import left_out
from nodeproxy.snapshot.view import NodeView
from nodeproxy.trace.ends import endpoint_text
from nodeproxy.trace.results import Backend, Expected, TracedFrontend

_SHOWN: Final = 10  # of what could not be read


def set_in_force(verdict: Verdict, packet: Packet) -> BackendSet:
    """Which set decides for this packet: short-cuts lead to the Cluster set."""
    frontend = verdict.frontend
    if frontend is None or (frontend.short_cuts and (packet.from_local_pod or packet.from_node)):
        return BackendSet.CLUSTER
    return frontend.backend_set


def traced_frontend(view: NodeView, verdict: Verdict) -> TracedFrontend | None:
    """The frontend that was met."""
    row, frontend = verdict.row, verdict.frontend
    if row is None or frontend is None:
        return None
    service = view.state.services[row.key.name.service]
    internal = frontend.kind is FrontendKind.CLUSTER_IP
    local = service.internal_local if internal else service.external_local
    return TracedFrontend(
        service_port=str(row.key.name),
        kind=frontend.kind.value,
        at=f"{_at(frontend)}/{row.key.protocol}",
        policy=f"{'internalTrafficPolicy' if internal else 'externalTrafficPolicy'} {'Local' if local else 'Cluster'}",
        backend_set=frontend.backend_set.value,
        action=frontend.action.value,
        masquerade=frontend.masquerade.value,
        affinity_seconds=row.affinity_seconds,
        allowed_sources=frontend.allowed_sources,
    )


def expected(view: NodeView, packet: Packet, verdict: Verdict, topology: str) -> Expected:
    """What must become of the packet, and why."""
    count = len(verdict.backends) or 1
    backends = tuple(
        Backend(one.address, one.port, 1 / count, verdict.masquerade or one in verdict.hairpins) for one in verdict.backends
    )
    return Expected(verdict.outcome.value, backends, tuple(_why(view, packet, verdict, topology)))


def _why(view: NodeView, packet: Packet, verdict: Verdict, topology: str) -> Iterator[str]:
    row, frontend = verdict.row, verdict.frontend
    if verdict.health_check is not None:
        nobody = "let through, but the agent does not listen there: nodePortAddresses leaves it out"
        answer = "the node itself answers" if _listens(view, packet) else nobody
        yield f"health-check node port of Service {verdict.health_check}: {answer}"
    elif row is None or frontend is None:
        yield from _why_nothing(view, packet)
    else:
        yield from _why_frontend(view, packet, verdict, row, frontend)
        if verdict.outcome is Outcome.FORWARD:
            if topology:
                yield topology
            if row.affinity_seconds is not None:
                yield f"session affinity ClientIP: the same source stays with its endpoint for {row.affinity_seconds} s"
            yield from _why_hairpin(verdict)


def _listens(view: NodeView, packet: Packet) -> bool:
    """Whether the agent serves health-check node ports there: on loopback as well, unlike other node ports."""
    allowed = view.programmer_config.node_port_addresses.get(packet.family)
    if allowed is None:
        return False
    return allowed.cidrs is None or any(ipaddress.ip_address(packet.destination) in network(cidr) for cidr in allowed.cidrs)


def _why_frontend(view: NodeView, packet: Packet, verdict: Verdict, row: ServicePort, frontend: Frontend) -> Iterator[str]:
    if frontend.action is Action.REJECT:
        yield "no endpoint anywhere is ready, or serving while it terminates: everybody is rejected"
        return
    shortened = frontend.short_cuts and (packet.from_local_pod or packet.from_node)
    if verdict.outcome is Outcome.DROP:
        if not may_come(frontend, packet.source):
            ranges = ", ".join(frontend.allowed_sources or ())
            yield f"source {packet.source} is in none of loadBalancerSourceRanges ({ranges})"
        if not shortened and frontend.action is Action.DROP:
            yield "policy Local, and no usable endpoint is on this node"
        return
    if frontend.allowed_sources is not None:
        yield f"source {packet.source} is within loadBalancerSourceRanges"
    if frontend.short_cuts and packet.from_local_pod:
        yield "policy Local, but pods of this node take the short-cut to the Cluster set, as at the cluster IP; source kept"
    elif shortened:
        yield "policy Local, but the node itself takes the short-cut to the Cluster set; masqueraded"
    else:
        yield f"one of the {frontend.backend_set.value.capitalize()} set, all with equal chances"
        yield _why_masquerade(view, packet, frontend)


def _why_masquerade(view: NodeView, packet: Packet, frontend: Frontend) -> str:
    if frontend.masquerade is Masquerade.NEVER:
        return "policy Local of external traffic: the source is kept"
    if frontend.masquerade is Masquerade.ALWAYS:
        internal = frontend.kind is FrontendKind.CLUSTER_IP
        return "masquerade-all: masqueraded" if internal else "external traffic of policy Cluster is always masqueraded"
    how = _detector(view.programmer_config.local_detector, packet)
    if packet.from_local_pod is None:
        return "detect-local cannot tell local pods from others: the source is kept"
    if packet.from_local_pod:
        return f"from a pod of this node ({how}): the source is kept"
    return f"not from a pod of this node ({how}): masqueraded"


def _detector(detector: LocalDetector, packet: Packet) -> str:
    if detector.interface is not None:
        return f"detect-local: interface {detector.interface}"
    if detector.interface_prefix is not None:
        return f"detect-local: interfaces {detector.interface_prefix}*"
    return f"detect-local: {detector.cidrs.get(packet.family)}"


def _why_hairpin(verdict: Verdict) -> Iterator[str]:
    for backend in verdict.hairpins:
        at = endpoint_text(backend.address, backend.port)
        yield f"{at} is where the packet comes from: if it is chosen, masqueraded in any case (hairpin)"


def _why_nothing(view: NodeView, packet: Packet) -> Iterator[str]:
    """Why no frontend takes the packet, by what is near."""
    yield "no Service has a frontend there: the packet is left alone"
    for protocol in IPProtocol:
        other = view.index.get(Claim(packet.family, packet.destination, protocol, packet.port))
        if protocol is not packet.protocol and other is not None:
            yield f"{other.row.key.name} is there for {protocol.upper()}, not for {packet.protocol.upper()}"
    at_node_port = view.index.get(Claim(packet.family, None, packet.protocol, packet.port))
    if at_node_port is not None:
        yield from _why_no_node_port(view, packet, str(at_node_port.row.key.name))
    ports = sorted({f"{claim.port}/{claim.protocol}" for claim in view.index if claim.address == packet.destination})
    if ports:
        more = f" and {len(ports) - 10} more" if len(ports) > 10 else ""
        yield f"ports at {packet.destination}: {', '.join(ports[:10])}{more}"
    for service in view.snapshot.objects:
        if isinstance(service, Service) and (why := _ignored(service)) and packet.destination in _addresses(service):
            yield f"Service {service.key.namespace}/{service.metadata.name} names this address, but {why}"


def _why_no_node_port(view: NodeView, packet: Packet, name: str) -> Iterator[str]:
    if not packet.to_node:
        yield f"{packet.port} is the node port of {name}, but {packet.destination} is not an address of this node"
    elif packet.destination.startswith("127.") or packet.destination == "::1":
        why = "only in IPv4, in iptables mode, and with --iptables-localhost-nodeports"
        yield f"{packet.port} is the node port of {name}, and loopback serves node ports {why}"
    else:
        yield f"{packet.port} is the node port of {name}, but nodePortAddresses leaves out {packet.destination}"


def rivals(view: NodeView, packet: Packet, winner: ServiceName | None) -> Iterator[str]:
    """Other Services that claim the same address and port, and lost it."""
    addresses = (packet.destination, None) if packet.to_node_port_address else (packet.destination,)
    wanted = {Claim(packet.family, address, packet.protocol, packet.port) for address in addresses}
    for name, service in view.state.services.items():
        if name == winner:
            continue
        for claimed in claims_of(service, view.facts.families)[0]:
            if claimed.claim in wanted and claimed.port.protocol is packet.protocol:
                yield (
                    f"Service {name} claims {claimed.claim}, too ({claimed.field}), and does not get it: "
                    "a cluster IP comes before other addresses, then the older Service, then the name"
                )


def unread(view: NodeView, service: ServiceName | None) -> Iterator[str]:
    """What could not be read and may bear on packets to `service`; None: on packets that no Service takes."""
    found = [one for one in view.refused if _bears_on(one.key, service)]
    for one in found[:_SHOWN]:
        kept = "" if one.key is not None else " (an agent that runs keeps what it knew of it)"
        yield f"left out: {left_out(one)}{kept}"
    if len(found) > _SHOWN:
        yield f"left out: {len(found) - _SHOWN} more"


def _bears_on(key: ObjectKey | None, service: ServiceName | None) -> bool:
    """Whose a slice is says a label, which was not read: it may be anybody's of its namespace."""
    if key is None or key.kind is Kind.NODE:
        return True
    if service is None:
        return key.kind is Kind.SERVICE
    return key.namespace == service.namespace and (key.kind is Kind.ENDPOINT_SLICE or key.name == service.name)


def why_ignored(view: NodeView, name: ServiceName) -> str:
    """Why a Service of that name is not programmed, "" where it is, or where nothing is known of it."""
    if name in view.state.services:
        return ""
    for one in view.snapshot.objects:
        if isinstance(one, Service) and (one.key.namespace, one.metadata.name) == tuple(name):
            return _ignored(one) or "it could not be read"
    for refused in view.refused:
        if refused.key == (Kind.SERVICE, name.namespace, name.name):
            return refused.reason
    return ""


def _ignored(service: Service) -> str:
    spec = service.spec
    if spec.type == "ExternalName":
        return "it is an ExternalName: a name in DNS, nothing is programmed"
    if spec.cluster_ip == "None":
        return "it is headless (clusterIP: None): clients connect to the endpoints themselves"
    return "" if spec.cluster_ip or spec.cluster_ips else "it has no cluster IP yet"


def _addresses(service: Service) -> set[str]:
    spec, status = service.spec, service.status
    ingress = (status.load_balancer.ingress or ()) if status and status.load_balancer else ()
    found = {spec.cluster_ip, *(spec.cluster_ips or ()), *(spec.external_ips or ()), *(one.ip for one in ingress)}
    return {address for address in found if address}


def _at(frontend: Frontend) -> str:
    if frontend.address is None:
        return f"node port {frontend.port}"
    return f"{frontend.kind} {endpoint_text(frontend.address, frontend.port)}"
