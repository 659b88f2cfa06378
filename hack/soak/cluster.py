"""Owns the Services of a load test and their backends, as API objects; endpoints go through the states of a pod's life.

All Services select the same pods, so each replacement of a pod concerns all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from enum import Enum
from typing import Any, Final, NamedTuple

from nodeproxy.sandbox.load.plan import Target

Object = dict[str, Any]

NODE: Final = "test-node"
NODE_ADDRESS: Final = "192.168.0.2"
NAMESPACE: Final = "load"
CLUSTER_CIDRS: Final = "10.244.0.0/16,fd00:10:244::/56"
BACKEND_PORT: Final = 8080
LOCAL_PREFIX, ANY_PREFIX = "web-local-", "web-"


class Life(Enum):
    """What an EndpointSlice says of a pod: KEP-1669, and the API reference of EndpointConditions."""

    READY = (True, True, False)
    TERMINATING = (False, True, True)
    FINISHED = (False, False, True)

    @property
    def conditions(self) -> dict[str, bool]:
        """As in an EndpointSlice."""
        return dict(zip(("ready", "serving", "terminating"), self.value, strict=True))


class Pod(NamedTuple):
    """A backend: its server's name, its two addresses, and whether it is on this node."""

    name: str
    address: str
    address6: str
    local: bool


def new_pods() -> tuple[Iterator[Pod], Iterator[Pod]]:
    """Endless pods with addresses of their own: those on this node, and those on another."""

    def made(prefix: str, network: int, local: bool) -> Iterator[Pod]:
        for number in itertools.count(1):
            high, low = divmod(number, 250)
            host = f"{network + high}.{low + 1}"
            yield Pod(f"{prefix}{number}", f"10.244.{host}", f"fd00:10:244:{network}::{number:x}", local)

    return made(LOCAL_PREFIX, 1, True), made("web-remote-", 101, False)


class Entry(NamedTuple):
    """A Service: name, cluster IP, ports and node port, and what else its spec holds."""

    name: str
    cluster_ips: tuple[str, ...]
    port: int
    node_port: int
    protocol: str
    external_ip: str
    spec: Object


WEB = Entry("web", ("10.96.1.10", "fd00:10:96::10"), 80, 30080, "TCP", "198.51.100.10", {})
LOCAL = Entry("local", ("10.96.1.11",), 80, 30081, "TCP", "198.51.100.11", {"externalTrafficPolicy": "Local"})
STICKY = Entry(
    "sticky",
    ("10.96.1.12",),
    80,
    30082,
    "TCP",
    "198.51.100.12",
    {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10800}}},
)
DNS = Entry("dns", ("10.96.1.13",), 53, 30053, "UDP", "198.51.100.13", {})
ENTRIES: Final = (WEB, LOCAL, STICKY, DNS)


def _service(entry: Entry) -> Object:
    port = {
        "name": "p",
        "port": entry.port,
        "targetPort": BACKEND_PORT,
        "protocol": entry.protocol,
        "nodePort": entry.node_port,
    }
    families = ["IPv6" if ":" in address else "IPv4" for address in entry.cluster_ips]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": entry.name, "namespace": NAMESPACE, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {
            "type": "NodePort",
            "clusterIP": entry.cluster_ips[0],
            "clusterIPs": list(entry.cluster_ips),
            "ipFamilies": families,
            "externalIPs": [entry.external_ip],
            "ports": [port],
            "internalTrafficPolicy": "Cluster",
            "externalTrafficPolicy": "Cluster",
            "sessionAffinity": "None",
            **entry.spec,
        },
    }


def _bystander(number: int) -> Iterator[Object]:
    """A Service that nobody uses, so that the node has a bit more to program than what is loaded."""
    entry = Entry(f"other-{number}", (f"10.96.2.{number + 1}",), 80, 31000 + number, "TCP", f"198.51.101.{number + 1}", {})
    yield _service(entry)
    pods = [Pod(f"other-{number}-{one}", f"10.244.200.{number * 3 + one + 1}", "", False) for one in range(3)]
    yield _slice(entry, "IPv4", dict.fromkeys(pods, Life.READY))


def _slice(entry: Entry, family: str, pods: dict[Pod, Life]) -> Object:
    endpoints = [
        {
            "addresses": [pod.address if family == "IPv4" else pod.address6],
            "nodeName": NODE if pod.local else "other-node",
            "conditions": life.conditions,
        }
        for pod, life in pods.items()
    ]
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{entry.name}-{family.lower()}",
            "namespace": NAMESPACE,
            "labels": {"kubernetes.io/service-name": entry.name},
        },
        "addressType": family,
        "ports": [{"name": "p", "port": BACKEND_PORT, "protocol": entry.protocol}],
        "endpoints": endpoints,
    }


def fixed_objects(bystanders: int) -> list[Object]:
    """The Node, the Services, and so many Services that nobody uses."""
    node = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": NODE, "labels": {"kubernetes.io/hostname": NODE}},
        "spec": {"podCIDR": "10.244.0.0/16", "podCIDRs": CLUSTER_CIDRS.split(",")},
        "status": {"addresses": [{"type": "InternalIP", "address": NODE_ADDRESS}]},
    }
    others = (item for number in range(bystanders) for item in _bystander(number))
    return [node, *(_service(entry) for entry in ENTRIES), *others]


def slices(pods: dict[Pod, Life]) -> list[Object]:
    """The EndpointSlices of the Services that are loaded."""
    return [_slice(entry, "IPv6" if ":" in address else "IPv4", pods) for entry in ENTRIES for address in entry.cluster_ips]


def tcp_targets(*, inside: bool) -> tuple[Target, ...]:
    """What is loaded over TCP, from inside the cluster (pod, node) or from outside.

    From outside, a Service of policy Local must be answered by pods of this node; from inside its external addresses lead
    to all, as its cluster IP does.
    """
    local = ANY_PREFIX if inside else LOCAL_PREFIX
    found = [
        Target("web cluster IP", WEB.cluster_ips[0], 80, ANY_PREFIX),
        Target("web node port", NODE_ADDRESS, WEB.node_port, ANY_PREFIX),
        Target("web external IP", WEB.external_ip, 80, ANY_PREFIX),
        Target("local external IP", LOCAL.external_ip, 80, local),
        Target("local node port", NODE_ADDRESS, LOCAL.node_port, local),
        Target("sticky cluster IP", STICKY.cluster_ips[0], 80, ANY_PREFIX, sticky=True),
    ]
    if inside:
        found.append(Target("web cluster IPv6", WEB.cluster_ips[1], 80, ANY_PREFIX))
    return tuple(found)


def udp_targets() -> tuple[Target, ...]:
    """What is loaded over UDP."""
    return (
        Target("dns cluster IP", DNS.cluster_ips[0], DNS.port, ANY_PREFIX),
        Target("dns node port", NODE_ADDRESS, DNS.node_port, ANY_PREFIX),
        Target("dns external IP", DNS.external_ip, DNS.port, ANY_PREFIX),
    )
