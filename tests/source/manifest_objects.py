"""Owns small objects as they stand in manifests."""

from __future__ import annotations

from typing import Any


def service(name: str, port: Any = 80, **metadata: Any) -> dict[str, Any]:
    """A Service with one port."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "shop", **metadata},
        "spec": {"clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"], "ports": [{"name": "http", "port": port}]},
    }


def endpoint_slice(name: str, addresses: list[str], **metadata: Any) -> dict[str, Any]:
    """An EndpointSlice of the Service of the same name."""
    labels = {"kubernetes.io/service-name": name, **metadata.pop("labels", {})}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": "shop", "labels": labels, **metadata},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": [
            {"addresses": [address], "conditions": {"ready": True}, "nodeName": f"node-{i}"}
            for i, address in enumerate(addresses)
        ],
    }


def node(name: str) -> dict[str, Any]:
    """A Node with one address."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name},
        "spec": {"podCIDR": "10.244.1.0/24"},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.168.0.11"}]},
    }
