"""Owns the shape of API objects: Service, EndpointSlice and Node, with the fields that decide forwarding and no others.

Field meanings are those of the Kubernetes API reference (core/v1, discovery.k8s.io/v1). Decoding is strict about types, so
that a malformed object is refused with the path of the field at fault (`msgspec.ValidationError`); whether values make
sense (addresses, port numbers) is decided in `nodeproxy.cluster`.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from msgspec import Struct, field


class Kind(enum.StrEnum):
    """The kinds of object that are watched; the value is the API's `kind`."""

    SERVICE = "Service"
    ENDPOINT_SLICE = "EndpointSlice"
    NODE = "Node"


class ObjectKey(NamedTuple):
    """Identity of an object: kind, namespace (empty for a Node) and name."""

    kind: Kind
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


class _ApiStruct(Struct, frozen=True, rename="camel", gc=False, omit_defaults=True):
    """Base of all API structs: immutable, camelCase on the wire, unknown fields ignored."""


class Labels(_ApiStruct, frozen=True):
    """The labels that are read. All others are dropped at decoding."""

    service_name: str | None = field(default=None, name="kubernetes.io/service-name")
    service_proxy_name: str | None = field(default=None, name="service.kubernetes.io/service-proxy-name")
    headless: str | None = field(default=None, name="service.kubernetes.io/headless")
    zone: str | None = field(default=None, name="topology.kubernetes.io/zone")


class Annotations(_ApiStruct, frozen=True):
    """The annotations that are read. All others are dropped at decoding."""

    last_change_trigger_time: str | None = field(default=None, name="endpoints.kubernetes.io/last-change-trigger-time")


class ObjectMeta(_ApiStruct, frozen=True):
    """metadata of any object. `resource_version` is opaque."""

    name: str
    namespace: str | None = None
    resource_version: str | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: Labels | None = None
    annotations: Annotations | None = None


class ServicePortSpec(_ApiStruct, frozen=True):
    """spec.ports[] of a Service. `node_port` 0 or null means none."""

    port: int
    name: str | None = None
    protocol: str | None = None
    node_port: int | None = None


class ClientIPConfig(_ApiStruct, frozen=True):
    """sessionAffinityConfig.clientIP; seconds."""

    timeout_seconds: int | None = None


class SessionAffinityConfig(_ApiStruct, frozen=True):
    """spec.sessionAffinityConfig."""

    client_ip: ClientIPConfig | None = field(default=None, name="clientIP")


class ServiceSpec(_ApiStruct, frozen=True):
    """spec of a Service."""

    ports: list[ServicePortSpec] | None = None
    cluster_ip: str | None = field(default=None, name="clusterIP")
    cluster_ips: list[str] | None = field(default=None, name="clusterIPs")
    type: str | None = None
    external_ips: list[str] | None = field(default=None, name="externalIPs")
    session_affinity: str | None = None
    session_affinity_config: SessionAffinityConfig | None = None
    load_balancer_source_ranges: list[str] | None = None
    external_traffic_policy: str | None = None
    internal_traffic_policy: str | None = None
    health_check_node_port: int | None = None


class LoadBalancerIngress(_ApiStruct, frozen=True):
    """status.loadBalancer.ingress[]; `ip_mode` unset means VIP (KEP-1860)."""

    ip: str | None = None
    ip_mode: str | None = None


class LoadBalancerStatus(_ApiStruct, frozen=True):
    """status.loadBalancer."""

    ingress: list[LoadBalancerIngress] | None = None


class ServiceStatus(_ApiStruct, frozen=True):
    """status of a Service."""

    load_balancer: LoadBalancerStatus | None = None


class Service(_ApiStruct, frozen=True):
    """A core/v1 Service."""

    metadata: ObjectMeta
    spec: ServiceSpec = ServiceSpec()
    status: ServiceStatus | None = None

    @property
    def key(self) -> ObjectKey:
        """Identity of this object."""
        return ObjectKey(Kind.SERVICE, self.metadata.namespace or "default", self.metadata.name)


class EndpointConditions(_ApiStruct, frozen=True):
    """endpoints[].conditions. Null: ready means true, serving means as ready, terminating means false (KEP-1672)."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class ForZone(_ApiStruct, frozen=True):
    """hints.forZones[] (KEP-2433)."""

    name: str


class ForNode(_ApiStruct, frozen=True):
    """hints.forNodes[] (KEP-3015)."""

    name: str


class EndpointHints(_ApiStruct, frozen=True):
    """endpoints[].hints."""

    for_zones: list[ForZone] | None = None
    for_nodes: list[ForNode] | None = None


class Endpoint(_ApiStruct, frozen=True):
    """endpoints[] of an EndpointSlice. Only the first address is used, as the API defines them to be fungible."""

    addresses: list[str]
    conditions: EndpointConditions | None = None
    node_name: str | None = None
    hints: EndpointHints | None = None


class EndpointPort(_ApiStruct, frozen=True):
    """ports[] of an EndpointSlice. A null port means: not usable here."""

    name: str | None = None
    protocol: str | None = None
    port: int | None = None


class EndpointSlice(_ApiStruct, frozen=True):
    """A discovery.k8s.io/v1 EndpointSlice."""

    metadata: ObjectMeta
    address_type: str
    endpoints: list[Endpoint] | None = None
    ports: list[EndpointPort] | None = None

    @property
    def key(self) -> ObjectKey:
        """Identity of this object."""
        return ObjectKey(Kind.ENDPOINT_SLICE, self.metadata.namespace or "default", self.metadata.name)


class Taint(_ApiStruct, frozen=True):
    """spec.taints[] of a Node."""

    key: str


class NodeSpec(_ApiStruct, frozen=True):
    """spec of a Node."""

    pod_cidr: str | None = field(default=None, name="podCIDR")
    pod_cidrs: list[str] | None = field(default=None, name="podCIDRs")
    taints: list[Taint] | None = None


class NodeAddress(_ApiStruct, frozen=True):
    """status.addresses[] of a Node: `type` is InternalIP, ExternalIP, Hostname, ..."""

    type: str
    address: str


class NodeStatus(_ApiStruct, frozen=True):
    """status of a Node."""

    addresses: list[NodeAddress] | None = None


class Node(_ApiStruct, frozen=True):
    """A core/v1 Node."""

    metadata: ObjectMeta
    spec: NodeSpec | None = None
    status: NodeStatus | None = None

    @property
    def key(self) -> ObjectKey:
        """Identity of this object."""
        return ObjectKey(Kind.NODE, "", self.metadata.name)


ApiObject = Service | EndpointSlice | Node

TYPE_OF_KIND: dict[Kind, type[Service] | type[EndpointSlice] | type[Node]] = {
    Kind.SERVICE: Service,
    Kind.ENDPOINT_SLICE: EndpointSlice,
    Kind.NODE: Node,
}
