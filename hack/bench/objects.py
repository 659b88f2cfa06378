"""Owns the objects of the benchmark's cluster state: its node, the probe, and the Services and slices that scenarios add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from hack.controlplane.access import Json
from hack.controlplane.load import Shape

NODE: Final = "bench-node"
NODE_ADDRESS: Final = "192.168.0.2"
NAMESPACE: Final = "load"
PROBE: Final = "probe"
PROBE_ADDRESS: Final = "10.96.0.200"
SERVICE_PORT: Final = 80
TARGET_PORT: Final = 8080


def shape_of(services: int, endpoints: int, first: int = 0) -> Shape:
    """So many Services; every fourth endpoint is on this node."""
    nodes = (NODE, "node-1", "node-2", "node-3")
    return Shape(
        services=services, first=first, endpoints=endpoints, namespace=NAMESPACE, target_port=TARGET_PORT, nodes=nodes
    )


def addresses_of(shape: Shape) -> list[str]:
    """The cluster IP of every Service, the probe's not included."""
    return [shape.cluster_ips(number)[0] for number in shape.numbers]


def service(name: str, address: str) -> Json:
    """A Service at this cluster IP."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": address,
            "clusterIPs": [address],
            "ipFamilies": ["IPv4"],
            "ports": [{"name": "main", "port": SERVICE_PORT, "targetPort": TARGET_PORT, "protocol": "TCP"}],
        },
    }


def slice_of(service_name: str, name: str, endpoints: Sequence[Json]) -> Json:
    """An EndpointSlice of a Service."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": {"kubernetes.io/service-name": service_name}},
        "addressType": "IPv4",
        "ports": [{"name": "main", "port": TARGET_PORT, "protocol": "TCP"}],
        "endpoints": list(endpoints),
    }


def endpoint(address: str, *, node_name: str, ready: bool, serving: bool, terminating: bool) -> Json:
    """An endpoint of an EndpointSlice."""
    conditions = {"ready": ready, "serving": serving, "terminating": terminating}
    return {"addresses": [address], "nodeName": node_name, "conditions": conditions}


def probe_service() -> Json:
    """The Service whose endpoint moves."""
    return service(PROBE, PROBE_ADDRESS)


def probe_slice(address: str) -> Json:
    """Its EndpointSlice, with its endpoint at this address."""
    return slice_of(PROBE, PROBE, [endpoint(address, node_name=NODE, ready=True, serving=True, terminating=False)])
