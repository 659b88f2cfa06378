"""Owns what all tests share: which nodes they are about, servers and clients on them, and a client outside the cluster.

Everything is made when it is missing and taken as it is when it is there, so that several processes of pytest, and one run
after the other, use the same.

    node a (zone-a)        node b (zone-b)        any other node
    server-a-1             server-b
    server-a-2
    client-a               client-b               (node itself only)
"""

from __future__ import annotations

import functools
import ipaddress
import json
from dataclasses import dataclass
from typing import Final

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from e2e.harness.api import Api
from e2e.harness.objects import Object, server_pod, waiting_pod
from e2e.harness.places import Place, PlaceError, docker, node_place, pod_place
from e2e.harness.settings import AGNHOST, NAMESPACE
from e2e.harness.waiting import eventually
from hack.kind.cluster import Cluster, ClusterNode

ALL: Final = {"app": "server"}
ON_A: Final = {"app": "server", "on": "a"}
ON_B: Final = {"app": "server", "on": "b"}
A1, A2, B = "server-a-1", "server-a-2", "server-b"
SERVERS: Final = frozenset({A1, A2, B})
SOURCES: Final = 24
"""How many addresses the client outside has besides its first."""


@dataclass(frozen=True)
class Node:
    """A node: its letter in the tests, its name, its first address of each family, and its zone."""

    letter: str
    name: str
    addresses: tuple[str, ...]
    zone: str

    @property
    def address(self) -> str:
        return self.addresses[0]


def choose_nodes(cluster: Cluster) -> tuple[Node, ...]:
    """Node a and node b, which are workers where there are two, and the others."""
    ordered = sorted(cluster.nodes(), key=lambda node: (node.role == "control-plane", node.name))
    return tuple(
        Node("abcdefgh"[number], node.name, _addresses(node), "zone-b" if number == 1 else "zone-a")
        for number, node in enumerate(ordered)
    )


def _addresses(node: ClusterNode) -> tuple[str, ...]:
    return tuple(str(address) for address in node.addresses)


class Stage:
    """What all tests share, with the places to send requests from."""

    def __init__(self, cluster: Cluster, api: Api) -> None:
        self.cluster = cluster
        self.api = api
        self.nodes = choose_nodes(cluster)
        self.a, self.b = self.nodes[:2]
        self._prepare()

    def _prepare(self) -> None:
        self.api.ensure({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        for node in self.nodes:
            self.api.patch("Node", node.name, {"metadata": {"labels": {"topology.kubernetes.io/zone": node.zone}}})
        eventually(
            lambda: self.api.get("ServiceAccount", "default"), f"namespace {NAMESPACE} has a service account", within=60
        )
        pods = self._pods()
        for pod in pods:
            self.api.ensure(pod)
        self.wait_ready(*(pod["metadata"]["name"] for pod in pods))

    def _pods(self) -> list[Object]:
        a, b = self.a.name, self.b.name
        probe = {"httpGet": {"path": "/healthz", "port": 8080}, "periodSeconds": 5}
        servers = [
            server_pod(name, node, labels, probe=probe)
            for name, node, labels in ((A1, a, ON_A), (A2, a, ON_A), (B, b, ON_B))
        ]
        return [*servers, *(waiting_pod(f"client-{node.letter}", node.name, {"app": "client"}) for node in (self.a, self.b))]

    def wait_ready(self, *names: str, within: float = 90.0) -> None:
        """Wait until these pods are ready."""

        def ready() -> bool:
            pods = {pod["metadata"]["name"]: pod for pod in self.api.list("Pod")}
            late = [name for name in names if name not in pods or not is_ready(pods[name])]
            assert not late, f"not ready: {late}: {[pods[name]['status'] for name in late if name in pods][:1]}"
            return True

        eventually(ready, "pods are ready", within=within)

    @functools.cached_property
    def client_a(self) -> Place:
        """A pod on node a."""
        return self.pod("client-a")

    @functools.cached_property
    def client_b(self) -> Place:
        """A pod on node b."""
        return self.pod("client-b")

    @functools.cached_property
    def node_a(self) -> Place:
        """Node a itself: its own network namespace, as of kubelet and of pods with host network."""
        return node_place(self.a.name, self.a.addresses)

    @functools.cached_property
    def node_b(self) -> Place:
        """Node b itself."""
        return node_place(self.b.name, self.b.addresses)

    @functools.cached_property
    def outside(self) -> Place:
        """A machine outside the cluster, on the network of the nodes."""
        return outside_place(self.cluster.name, self.a, self.b)

    @functools.cached_property
    def outer_addresses(self) -> tuple[ipaddress.IPv4Network, ...]:
        """Addresses that the client outside sends to node a, and to node b: those of load balancers, and external IPs.

        They are of the nodes' network and nobody's there, so that what no proxy takes goes nowhere.
        """
        return outer_addresses(network_of(self.a.name)[1])

    @property
    def inside(self) -> tuple[Place, ...]:
        """Pods and nodes."""
        return self.client_a, self.client_b, self.node_a, self.node_b

    @property
    def everywhere(self) -> tuple[Place, ...]:
        """All of them."""
        return *self.inside, self.outside

    def pod(self, name: str) -> Place:
        """Where a pod is that has a network namespace of its own."""
        pod = self.api.get("Pod", name)
        addresses = [one["ip"] for one in pod["status"]["podIPs"]]
        return pod_place(pod["spec"]["nodeName"], name, addresses)

    def pod_address(self, name: str, family: int = 4) -> str:
        """The address of a pod."""
        found: str = next(
            one["ip"] for one in self.api.get("Pod", name)["status"]["podIPs"] if (":" in one["ip"]) == (family == 6)
        )
        return found

    def sources(self, count: int = SOURCES) -> list[str]:
        """More addresses of the client outside."""
        return list(self.outside.addresses[1 : 1 + count])

    def look_again(self) -> None:
        """Forget the places: nodes or pods may have been started anew."""
        for name in ("client_a", "client_b", "node_a", "node_b", "outside"):
            place = self.__dict__.pop(name, None)
            if place is not None:
                place.close()

    def close(self) -> None:
        """Let go of all places."""
        self.look_again()


def is_ready(pod: Object) -> bool:
    """Whether its status says so, and it is not on its way out."""
    conditions = {one["type"]: one["status"] for one in pod["status"].get("conditions") or []}
    return conditions.get("Ready") == "True" and not pod["metadata"].get("deletionTimestamp")


def outside_place(cluster: str, a: Node, b: Node) -> Place:
    """A container of Docker on the nodes' network, with more addresses and routes of its own."""
    container = f"{cluster}-outside"
    network, subnet = network_of(a.name)
    try:
        docker("run", "--detach", "--name", container, "--network", network, "--cap-drop", "ALL", AGNHOST, "pause")
    except PlaceError as error:
        if "is already in use" not in str(error):
            raise
        # Another process of pytest may just be making it: the name is taken a moment before there is a container.
        patience = Retrying(
            retry=retry_if_exception_type(PlaceError), stop=stop_after_delay(30), wait=wait_fixed(0.2), reraise=True
        )
        patience(docker, "start", container)
    settings = json.loads(docker("inspect", "--format", "{{json .NetworkSettings.Networks}}", container))[network]
    at_a, at_b, own = outer_addresses(subnet)
    sources = [str(address) for address in list(own.hosts())[:SOURCES]]
    ipv6 = [settings["GlobalIPv6Address"]] if settings["GlobalIPv6Address"] else []
    place = node_place(container, [settings["IPAddress"], *sources, *ipv6])
    for address in sources:
        place.command("ip", "address", "replace", f"{address}/32", "dev", "eth0")
    for addresses_at, node in ((at_a, a), (at_b, b)):
        place.command("ip", "route", "replace", str(addresses_at), "via", node.address)
    return place


def remove_outside(cluster: str) -> None:
    """Remove that container."""
    docker("rm", "--force", "--volumes", f"{cluster}-outside")


def network_of(container: str) -> tuple[str, ipaddress.IPv4Network]:
    """The network of Docker that a container is on, and its IPv4 subnet."""
    networks = json.loads(docker("inspect", "--format", "{{json .NetworkSettings.Networks}}", container))
    name = next(iter(networks))
    return name, ipaddress.IPv4Network(f"{networks[name]['IPAddress']}/{networks[name]['IPPrefixLen']}", strict=False)


def outer_addresses(subnet: ipaddress.IPv4Network) -> tuple[ipaddress.IPv4Network, ...]:
    """Three networks at the end of a subnet, which Docker gives away last: for node a, node b, and the client outside."""
    *_, at_a, at_b, own = subnet.subnets(new_prefix=max(24, subnet.prefixlen + 3))
    return at_a, at_b, own
