"""Owns the checking of EndpointSlices: from the API's shape to a `CheckedSlice`, with everything bad left out and named.

This runs for every endpoint of the cluster at start, and is written for speed.
"""

from __future__ import annotations

from sys import intern

from nodeproxy.api.objects import Endpoint, EndpointConditions, EndpointPort, EndpointSlice, ObjectKey
from nodeproxy.cluster.addresses import canonical_ipv4, canonical_ipv6, is_special
from nodeproxy.cluster.checked import CheckedEndpoint, CheckedSlice, CheckedSlicePort, Readiness
from nodeproxy.cluster.findings import Findings, is_label, is_port, is_subdomain, protocol_of, quoted
from nodeproxy.cluster.names import Family, ServiceName

_FAMILY_OF_TYPE = {"IPv4": Family.IPV4, "IPv6": Family.IPV6}
_READY, _DRAINING, _UNUSABLE, _GONE = Readiness.READY, Readiness.DRAINING, Readiness.UNUSABLE, Readiness.GONE


def service_of_slice(slice_: EndpointSlice, key: ObjectKey) -> ServiceName | None:
    """The Service that the slice belongs to: label kubernetes.io/service-name, in the slice's namespace."""
    labels = slice_.metadata.labels
    if labels is None or not labels.service_name:
        return None
    return ServiceName(intern(key.namespace), intern(labels.service_name))


def slice_identity_fault(key: ObjectKey, service: ServiceName | None) -> str | None:
    """Why a slice of `service` is refused as a whole, or None. Its names get into rule comments or into the log."""
    if not is_label(key.namespace):
        return f"metadata.namespace: {quoted(key.namespace)} is not a DNS label"
    if not is_subdomain(key.name):
        return f"metadata.name: {quoted(key.name)} is not a DNS subdomain"
    if service is not None and not is_label(service.name):
        return f"metadata.labels[kubernetes.io/service-name]: {quoted(service.name)} is not a DNS label"
    return None


def check_slice(slice_: EndpointSlice, service: ServiceName) -> CheckedSlice | None:
    """The usable part of a slice of `service`; None where its address type is no IP family (FQDN)."""
    family = _FAMILY_OF_TYPE.get(slice_.address_type)
    if family is None:
        return None
    findings = Findings(service, f"EndpointSlice {slice_.metadata.name}: ")
    ports = _check_ports(slice_.ports or (), findings)
    endpoints = _check_endpoints(slice_.endpoints or (), family, findings)
    return CheckedSlice(family=family, ports=ports, endpoints=endpoints, problems=findings.all())


def _check_ports(ports: list[EndpointPort] | tuple[()], findings: Findings) -> tuple[CheckedSlicePort, ...]:
    good = []
    for index, port in enumerate(ports):
        name = port.name or ""
        protocol = protocol_of(port.protocol)
        if port.port is None:
            continue  # the API's way to say: not usable here
        if name and not is_label(name):
            findings.add(f"ports[{index}].name", f"{quoted(name)} is not a DNS label")
        elif protocol is None:
            findings.add(f"ports[{index}].protocol", f"{quoted(port.protocol or '')} is not TCP, UDP or SCTP")
        elif not is_port(port.port):
            findings.add(f"ports[{index}].port", f"{port.port} is not in 1-65535")
        else:
            good.append(CheckedSlicePort(name=intern(name), protocol=protocol, port=port.port))
    return tuple(good)


def _check_endpoints(
    endpoints: list[Endpoint] | tuple[()], family: Family, findings: Findings
) -> tuple[CheckedEndpoint, ...]:
    canonical = canonical_ipv4 if family is Family.IPV4 else canonical_ipv6
    good = []
    for index, endpoint in enumerate(endpoints):
        addresses = endpoint.addresses
        # The addresses of an endpoint are defined to be fungible, and everybody uses the first (API reference).
        address = canonical(addresses[0]) if addresses else None
        if address is None or is_special(family, address):
            findings.add(f"endpoints[{index}].addresses", _address_fault(addresses, family, address))
            continue
        conditions, node, hints = endpoint.conditions, endpoint.node_name, endpoint.hints
        good.append(
            CheckedEndpoint(
                address,
                _READY if conditions is None or conditions.ready else _readiness(conditions),
                intern(node) if node else "",
                tuple([intern(zone.name) for zone in hints.for_zones]) if hints and hints.for_zones else (),
                tuple([intern(node.name) for node in hints.for_nodes]) if hints and hints.for_nodes else (),
            )
        )
    return tuple(good)


def _readiness(conditions: EndpointConditions) -> Readiness:
    """Null ready means true, null serving means as ready, null terminating means false (KEP-1672)."""
    if conditions.ready is not False:
        return _READY
    if not conditions.terminating:
        return _UNUSABLE
    return _DRAINING if conditions.serving else _GONE


def _address_fault(addresses: list[str], family: Family, canonical: str | None) -> str:
    if not addresses:
        return "is empty"
    if canonical is not None:
        return f"{canonical} is unspecified, loopback, link-local or multicast"
    return f"{quoted(addresses[0])} is not a canonical IPv{int(family)} address"
