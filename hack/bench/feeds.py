"""Owns the cluster state that agents are fed with, and its one change: a directory of manifests, or an API server.

Either holds the N Services of a `Shape` with M endpoints each, the node, and one Service more, the probe, with a single
endpoint that `point_to` moves from one pod to another.
"""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from hack.controlplane import ControlPlane
from hack.controlplane.access import Access, ApiError, Json
from hack.controlplane.load import Shape, node
from hack.controlplane.processes import connect_in
from nodeproxy.sandbox.namespace import Namespace, unique_stem
from nodeproxy.sandbox.topology import Sandbox

NODE: Final = "bench-node"
NODE_ADDRESS: Final = "192.168.0.2"
NAMESPACE: Final = "load"
PROBE: Final = "probe"
PROBE_ADDRESS: Final = "10.96.0.200"
SERVICE_PORT: Final = 80
TARGET_PORT: Final = 8080

_SERVICES_PER_FILE = 2000
_SLICES_PATH = f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices"
_API_ADDRESS = "100.64.3.1"
_API_CLIENT = "100.64.3.2"
_API_PORT = 6443

Progress = Callable[[str], None]


def shape_of(services: int, endpoints: int, first: int = 0) -> Shape:
    """So many Services; every fourth endpoint is on this node."""
    nodes = (NODE, "node-1", "node-2", "node-3")
    return Shape(
        services=services, first=first, endpoints=endpoints, namespace=NAMESPACE, target_port=TARGET_PORT, nodes=nodes
    )


def addresses_of(shape: Shape) -> list[str]:
    """The cluster IP of every Service, the probe's not included."""
    return [shape.cluster_ips(number)[0] for number in shape.numbers]


def probe_service() -> Json:
    """The Service whose endpoint moves."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": PROBE, "namespace": NAMESPACE},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": PROBE_ADDRESS,
            "clusterIPs": [PROBE_ADDRESS],
            "ipFamilies": ["IPv4"],
            "ports": [{"name": "main", "port": SERVICE_PORT, "targetPort": TARGET_PORT, "protocol": "TCP"}],
        },
    }


def probe_slice(address: str) -> Json:
    """Its EndpointSlice, with its endpoint at this address."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": PROBE, "namespace": NAMESPACE, "labels": {"kubernetes.io/service-name": PROBE}},
        "addressType": "IPv4",
        "ports": [{"name": "main", "port": TARGET_PORT, "protocol": "TCP"}],
        "endpoints": [
            {"addresses": [address], "nodeName": NODE, "conditions": {"ready": True, "serving": True, "terminating": False}}
        ],
    }


class Feed(ABC):
    """A cluster state that agents can be pointed at."""

    name: str

    @abstractmethod
    def flags(self) -> list[str]:
        """What tells an agent to use it."""

    @contextmanager
    def reachable_from(self, box: Sandbox) -> Iterator[None]:
        """Makes it reachable from a sandbox's node for a while."""
        yield

    @abstractmethod
    def point_to(self, address: str) -> None:
        """Moves the probe's endpoint, and returns once that is written."""

    @abstractmethod
    def close(self) -> None:
        """Ends and removes everything."""


class ManifestFeed(Feed):
    """A directory of JSON manifests: few large files, and a small one for the slice that changes."""

    name = "manifests"

    def __init__(self, shape: Shape, endpoint: str) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="nodeproxy-bench-"))
        self._directory = self._root / "manifests"
        self._directory.mkdir()
        for start in range(0, shape.services, _SERVICES_PER_FILE):
            services = shape.numbers[start : start + _SERVICES_PER_FILE]
            objects = [item for service in services for item in (shape.service(service), *shape.slices(service))]
            self._write(f"bulk-{start}.json", objects)
        self._write("node.json", [node(NODE, [NODE_ADDRESS]), probe_service()])
        self.point_to(endpoint)

    def flags(self) -> list[str]:
        return ["--manifests", str(self._directory)]

    def point_to(self, address: str) -> None:
        self._write("probe.json", [probe_slice(address)])

    def close(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)

    def _write(self, name: str, objects: Iterable[Json]) -> None:
        """Drafts are written beside the directory, so that it sees one event: the file moved into place."""
        draft = self._root / name
        draft.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}))
        draft.rename(self._directory / name)


class ApiServerFeed(Feed):
    """A control plane in a network namespace of its own, with a link to the node whose turn it is."""

    name = "apiserver"

    def __init__(self, shape: Shape, endpoint: str) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="nodeproxy-bench-"))
        self._links = 0
        self._connection: http.client.HTTPSConnection | None = None
        self._space = Namespace(f"{unique_stem()}-control")
        self._cluster = ControlPlane(
            self._root / "control-plane", netns=self._space.name, bind_address=_API_ADDRESS, port=_API_PORT
        )
        try:
            self._space.ip(["link set lo up", f"addr add {_API_ADDRESS}/32 dev lo"])
            self._cluster.start()
            self._cluster.write_kubeconfig(self._root / "kubeconfig")
            self._cluster.request("POST", "/api/v1/nodes", node(NODE, [NODE_ADDRESS]))
            self.add(shape)
            self._cluster.request("POST", f"/api/v1/namespaces/{NAMESPACE}/services", probe_service())
            self._cluster.request("POST", _SLICES_PATH, probe_slice(endpoint))
        except BaseException:
            self.close()
            raise

    def add(self, shape: Shape) -> None:
        """Adds more Services; the API server restarts."""
        self._disconnect()
        self._cluster.seed(shape)

    def flags(self) -> list[str]:
        return ["--kubeconfig", str(self._root / "kubeconfig")]

    @contextmanager
    def reachable_from(self, box: Sandbox) -> Iterator[None]:
        self._links += 1
        link = f"np{self._links}"
        box.node.ip(
            [
                f"link add cp0 type veth peer name {link} netns {self._space.name}",
                "link set cp0 up",
                f"addr add {_API_CLIENT}/32 dev cp0",
                f"route add {_API_ADDRESS}/32 dev cp0 src {_API_CLIENT}",
            ]
        )
        self._space.ip([f"link set {link} up", f"route add {_API_CLIENT}/32 dev {link} src {_API_ADDRESS}"])
        box.node.wait_links_up(["cp0"])
        try:
            yield
        finally:
            self._space.ip([f"link del {link}"])

    def point_to(self, address: str) -> None:
        """Over one connection that stays open: what is measured begins with the request."""
        access = self._cluster.access
        if self._connection is None:
            self._connection = _connect(access)
        headers = {**access.headers, "Content-Type": "application/json"}
        path = f"{_SLICES_PATH}/{PROBE}"
        self._connection.request("PUT", path, json.dumps(probe_slice(address)), headers)
        response = self._connection.getresponse()
        body = response.read().decode()
        if response.status >= 400:
            raise ApiError("PUT", path, response.status, body)

    def close(self) -> None:
        self._disconnect()
        self._cluster.stop()
        self._space.close()
        shutil.rmtree(self._root, ignore_errors=True)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _connect(access: Access) -> http.client.HTTPSConnection:
    parts = urlsplit(access.url)
    assert parts.hostname and parts.port
    context = access.ssl_context()
    connection = http.client.HTTPSConnection(parts.hostname, parts.port, context=context)
    sock = connect_in(access.netns, parts.hostname, parts.port, 30.0)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else the body waits for the server to acknowledge the head
    connection.sock = context.wrap_socket(sock, server_hostname=parts.hostname)
    return connection


def open_feed(name: str, shape: Shape, endpoint: str) -> Feed:
    """A feed by its name, filled."""
    return ManifestFeed(shape, endpoint) if name == ManifestFeed.name else ApiServerFeed(shape, endpoint)
