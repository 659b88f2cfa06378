"""Owns the checking of Services and of the Node: from the API's shape to checked values, everything bad left out and named.

A bad name refuses the object as a whole. Anything else that is bad (a port, an address, a range) costs only itself. Where
an enum has an unknown value, what holds is what kube-proxy does with it.
"""

from __future__ import annotations

import re
from sys import intern

from nodeproxy.api.objects import LoadBalancerIngress, Node, ObjectKey, Service, ServicePortSpec, ServiceSpec
from nodeproxy.cluster.addresses import Address, Cidr, is_local_only, is_special, parse_address, parse_cidr
from nodeproxy.cluster.checked import CheckedNode, CheckedService, CheckedServicePort
from nodeproxy.cluster.findings import Findings, is_label, is_port, is_subdomain, protocol_of, quoted
from nodeproxy.cluster.names import Family, ServiceName

DEFAULT_AFFINITY_SECONDS = 10800
MAX_AFFINITY_SECONDS = 86400

_TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)
_AUTOSCALER_TAINT = "ToBeDeletedByClusterAutoscaler"


def service_identity_fault(key: ObjectKey) -> str | None:
    """Why the Service is refused as a whole, or None."""
    if not is_label(key.namespace):
        return f"metadata.namespace: {quoted(key.namespace)} is not a DNS label"
    if not is_label(key.name):
        return f"metadata.name: {quoted(key.name)} is not a DNS label"
    return None


def check_service(service: Service, name: ServiceName) -> CheckedService | None:
    """The usable part of a Service whose name is `name` and good; None where it is not to be programmed at all.

    That is: clusterIP None or empty, or type ExternalName (SPEC section 1).
    """
    spec = service.spec
    texts = _cluster_ip_texts(spec)
    if not texts or spec.type == "ExternalName":
        return None
    findings = Findings(name)
    type_ = _enum(spec.type, ("ClusterIP", "NodePort", "LoadBalancer"), "spec.type", findings)
    cluster_ips = _check_cluster_ips(texts, findings)
    families = {address.family for address in cluster_ips}
    ranges, unreadable = _check_source_ranges(spec.load_balancer_source_ranges, findings)
    external_local = _external_local(spec, type_, findings)
    status = service.status.load_balancer if service.status else None
    return CheckedService(
        name=name,
        created=_check_timestamp(service.metadata.creation_timestamp),
        ports=_check_ports(spec.ports or [], type_, findings),
        cluster_ips=cluster_ips,
        external_ips=_check_external_ips(spec.external_ips or [], families, findings),
        load_balancer_ips=_check_ingress((status.ingress if status else None) or [], findings),
        source_ranges=ranges,
        source_ranges_unreadable=unreadable,
        affinity_seconds=_check_affinity(spec, findings),
        internal_local=_policy(spec.internal_traffic_policy, "spec.internalTrafficPolicy", findings),
        external_local=external_local,
        health_check_port=_check_health_port(spec, findings) if type_ == "LoadBalancer" and external_local else 0,
        problems=findings.all(),
    )


def check_node(node: Node) -> CheckedNode:
    """What matters of a Node. Addresses and CIDRs that do not parse are left out: the kubelet owns them, not a user."""
    metadata, spec, status = node.metadata, node.spec, node.status
    addresses = [
        address
        for wanted in ("InternalIP", "ExternalIP")  # in this order, as for kube-proxy: the first of a family is primary
        for entry in (status.addresses if status else None) or []
        if entry.type == wanted and (address := parse_address(entry.address))
    ]
    cidr_texts = ((spec.pod_cidrs or ([spec.pod_cidr] if spec.pod_cidr else [])) if spec else None) or []
    doomed = any(taint.key == _AUTOSCALER_TAINT for taint in (spec.taints if spec else None) or [])
    return CheckedNode(
        name=metadata.name,
        zone=(metadata.labels.zone if metadata.labels else None) or None,
        addresses=tuple(dict.fromkeys(addresses)),
        pod_cidrs=tuple(cidr for text in cidr_texts if (cidr := parse_cidr(text))),
        eligible=not doomed and metadata.deletion_timestamp is None,
    )


def node_identity_fault(key: ObjectKey) -> str | None:
    """Why the Node is refused as a whole, or None."""
    return None if is_subdomain(key.name) else f"metadata.name: {quoted(key.name)} is not a DNS subdomain"


def _cluster_ip_texts(spec: ServiceSpec) -> list[str]:
    """clusterIPs, or clusterIP where only that is given; empty for a Service without one."""
    if spec.cluster_ip == "None":
        return []
    texts = [text for text in spec.cluster_ips or [] if text] or ([spec.cluster_ip] if spec.cluster_ip else [])
    return [] if "None" in texts else texts


def _enum(value: str | None, known: tuple[str, ...], field: str, findings: Findings) -> str:
    """`value`, or the first of `known` where it is absent or unknown."""
    if value in known:
        return value
    if value:
        findings.add(field, f"{quoted(value)} is unknown; taken as {known[0]}")
    return known[0]


def _policy(value: str | None, field: str, findings: Findings) -> bool:
    return _enum(value, ("Cluster", "Local"), field, findings) == "Local"


def _external_local(spec: ServiceSpec, type_: str, findings: Findings) -> bool:
    """externalTrafficPolicy Local, as far as the Service has such frontends: by its type, or by externalIPs."""
    local = _policy(spec.external_traffic_policy, "spec.externalTrafficPolicy", findings)
    return local and (type_ != "ClusterIP" or bool(spec.external_ips))


def _check_timestamp(text: str | None) -> str:
    """The API server writes whole seconds in UTC, which sort as text. Empty where the age is unknown."""
    return text if text and _TIMESTAMP.fullmatch(text) else ""


def _check_cluster_ips(texts: list[str], findings: Findings) -> tuple[Address, ...]:
    good: dict[Family, Address] = {}
    for index, text in enumerate(texts):
        field = f"spec.clusterIPs[{index}]"
        address = parse_address(text)
        if address is None or is_local_only(address):
            findings.add(field, f"{quoted(text)} is not a usable canonical IP address")
        elif address.family in good:
            findings.add(field, f"a second IPv{int(address.family)} address")
        else:
            good[address.family] = address
    return tuple(good.values())


def _check_external_ips(texts: list[str], families: set[Family], findings: Findings) -> tuple[Address, ...]:
    good: dict[Address, None] = {}
    for index, text in enumerate(texts):
        field = f"spec.externalIPs[{index}]"
        address = parse_address(text)
        if address is None:
            findings.add(field, f"{quoted(text)} is not a canonical IP address")
        elif is_special(*address):
            findings.add(field, f"{address.text} is unspecified, loopback, link-local or multicast")
        elif address.family not in families:
            findings.add(field, f"{address.text}: the Service has no IPv{int(address.family)} cluster IP")
        else:
            good[address] = None
    return tuple(good)


def _check_ingress(ingress: list[LoadBalancerIngress], findings: Findings) -> tuple[Address, ...]:
    """Addresses that the node must answer for: ipMode unset or VIP (KEP-1860). Families are sorted out later.

    A load balancer may well have an address of a family that the Service lacks, and that is no fault of the Service.
    """
    good: dict[Address, None] = {}
    for index, entry in enumerate(ingress):
        field = f"status.loadBalancer.ingress[{index}]"
        if not entry.ip:
            continue  # a host name only
        address = parse_address(entry.ip)
        if address is None or is_local_only(address):
            findings.add(f"{field}.ip", f"{quoted(entry.ip)} is not a usable canonical IP address")
        elif entry.ip_mode in {None, "", "VIP"}:
            good[address] = None
        elif entry.ip_mode != "Proxy":
            findings.add(f"{field}.ipMode", f"{quoted(entry.ip_mode or '')} is unknown; taken as Proxy")
    return tuple(good)


def _check_ports(ports: list[ServicePortSpec], type_: str, findings: Findings) -> tuple[CheckedServicePort, ...]:
    good: dict[tuple[str, str], CheckedServicePort] = {}
    for index, port in enumerate(ports):
        field, name, protocol = f"spec.ports[{index}]", port.name or "", protocol_of(port.protocol)
        if name and not is_label(name):
            findings.add(f"{field}.name", f"{quoted(name)} is not a DNS label")
        elif protocol is None:
            findings.add(f"{field}.protocol", f"{quoted(port.protocol or '')} is not TCP, UDP or SCTP")
        elif not is_port(port.port):
            findings.add(f"{field}.port", f"{port.port} is not in 1-65535")
        elif (name, protocol) in good:
            findings.add(f"{field}.name", f"{quoted(name)} ({protocol.upper()}) is already the name of another port")
        else:
            node_port = _check_node_port(port.node_port or 0, type_, f"{field}.nodePort", findings)
            good[name, protocol] = CheckedServicePort(index, intern(name), protocol, port.port, node_port)
    return tuple(good.values())


def _check_node_port(number: int, type_: str, field: str, findings: Findings) -> int:
    """0 where there is none: allocateLoadBalancerNodePorts is false, or the Service has no such type."""
    if number == 0:
        return 0
    if not is_port(number):
        findings.add(field, f"{number} is not in 1-65535")
        return 0
    if type_ == "ClusterIP":
        findings.add(field, "a Service of type ClusterIP has no node port")
        return 0
    return number


def _check_source_ranges(texts: list[str] | None, findings: Findings) -> tuple[tuple[Cidr, ...] | None, bool]:
    if not texts:
        return None, False
    good: dict[Cidr, None] = {}
    unreadable = False
    for index, text in enumerate(texts):
        cidr = parse_cidr(text)
        if cidr is None:
            unreadable = True
            findings.add(f"spec.loadBalancerSourceRanges[{index}]", f"{quoted(text)} is not a canonical CIDR")
        else:
            good[cidr] = None
    return tuple(good), unreadable


def _check_affinity(spec: ServiceSpec, findings: Findings) -> int | None:
    if _enum(spec.session_affinity, ("None", "ClientIP"), "spec.sessionAffinity", findings) == "None":
        return None
    config = spec.session_affinity_config.client_ip if spec.session_affinity_config else None
    seconds = config.timeout_seconds if config else None
    if seconds is None:
        return DEFAULT_AFFINITY_SECONDS
    if not 1 <= seconds <= MAX_AFFINITY_SECONDS:
        findings.add(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            f"{seconds} is not in 1-{MAX_AFFINITY_SECONDS}; taken as {DEFAULT_AFFINITY_SECONDS}",
        )
        return DEFAULT_AFFINITY_SECONDS
    return seconds


def _check_health_port(spec: ServiceSpec, findings: Findings) -> int:
    number = spec.health_check_node_port or 0
    if number and not is_port(number):
        findings.add("spec.healthCheckNodePort", f"{number} is not in 1-65535")
        return 0
    return number
