"""Owns the objects of the tests as plain data: pods that serve or wait, Services, and EndpointSlices made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from e2e.harness.settings import AGNHOST

Object = dict[str, Any]

HTTP_PORT: Final = 8080
UDP_PORT: Final = 8081
OWNED: Final = "nodeproxy.e2e/owned"  # label: made by a test, and gone after it
_EVERYWHERE: Final = [{"operator": "Exists"}]


def server_pod(
    name: str,
    node: str,
    labels: Mapping[str, str],
    *,
    arguments: Sequence[str] = (),
    ports: Mapping[str, int] | None = None,
    probe: Mapping[str, Any] | None = None,
    grace: int = 1,
    host_network: bool = False,
) -> Object:
    """A pod on a node that says who it is: HTTP on 8080 and UDP on 8081, or as `arguments` of netexec say.

    `grace`: seconds between SIGTERM and SIGKILL; by itself netexec ends with SIGTERM, or after `--delay-shutdown`.
    """
    container: Object = {
        "name": "server",
        "image": AGNHOST,
        "args": ["netexec", *arguments],
        "ports": [
            {"name": port, "containerPort": number, "protocol": "UDP" if port.startswith("udp") else "TCP"}
            for port, number in (ports or {"http": HTTP_PORT, "udp": UDP_PORT}).items()
        ],
        **({"readinessProbe": {"periodSeconds": 1, **probe}} if probe else {}),
    }
    return _pod(name, node, labels, container, grace=grace, hostNetwork=host_network)


def waiting_pod(name: str, node: str, labels: Mapping[str, str]) -> Object:
    """A pod on a node that does nothing: requests are sent from its network namespace."""
    return _pod(name, node, labels, {"name": "client", "image": AGNHOST, "args": ["pause"]}, grace=1)


def _pod(name: str, node: str, labels: Mapping[str, str], container: Object, *, grace: int, **spec: Any) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": dict(labels)},
        "spec": {
            "nodeName": node,
            "tolerations": _EVERYWHERE,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": grace,
            "containers": [container],
            **spec,
        },
    }


def port(
    number: int = 80, target: int | str = HTTP_PORT, protocol: str = "TCP", name: str = "http", node_port: int | None = None
) -> Object:
    """A port of a Service."""
    made = {"name": name, "port": number, "targetPort": target, "protocol": protocol}
    return made if node_port is None else {**made, "nodePort": node_port}


def udp_port(number: int = 80, target: int | str = UDP_PORT, name: str = "udp") -> Object:
    """A UDP port of a Service."""
    return port(number, target, "UDP", name)


def service(
    name: str, *, ports: Sequence[Object], selector: Mapping[str, str] | None, labels: Mapping[str, str], **spec: Any
) -> Object:
    """A Service; without a selector its endpoints are made by hand."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": {OWNED: "", **labels}},
        "spec": {"ports": list(ports), **({"selector": dict(selector)} if selector else {}), **spec},
    }


def endpoint(address: str, node: str, *, zones: Sequence[str] = (), nodes: Sequence[str] = (), **conditions: bool) -> Object:
    """An endpoint of a slice, ready unless `conditions` say otherwise; hints as given."""
    hints = {
        **({"forZones": [{"name": zone} for zone in zones]} if zones else {}),
        **({"forNodes": [{"name": one} for one in nodes]} if nodes else {}),
    }
    return {
        "addresses": [address],
        "nodeName": node,
        "conditions": {"ready": True, **conditions},
        **({"hints": hints} if hints else {}),
    }


def endpoint_slice(
    name: str,
    of: str,
    endpoints: Sequence[Object],
    *,
    target: int = HTTP_PORT,
    port_name: str = "http",
    protocol: str = "TCP",
) -> Object:
    """An EndpointSlice made by hand, of the Service `of`."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "labels": {
                OWNED: "",
                "kubernetes.io/service-name": of,
                "endpointslice.kubernetes.io/managed-by": "e2e.nodeproxy",
            },
        },
        "addressType": "IPv6" if endpoints and ":" in endpoints[0]["addresses"][0] else "IPv4",
        "endpoints": list(endpoints),
        "ports": [{"name": port_name, "port": target, "protocol": protocol}],
    }
