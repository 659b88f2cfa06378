"""Owns the cluster state that agents are fed with, and changes it: a directory of manifests, or one of two API servers.

Each begins with the node and one Service, the probe, with a single endpoint that `point_to` moves from one pod to another,
and with what else a scenario needs; `add` adds the Services of a `Shape`. A `Writer` changes any EndpointSlice, several at
the same time if need be; that only API servers can.
"""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from hack.bench import static_api
from hack.bench.objects import NAMESPACE, NODE, NODE_ADDRESS, probe_service, probe_slice
from hack.controlplane import ControlPlane
from hack.controlplane.access import ApiError, Json
from hack.controlplane.load import Shape, node
from hack.controlplane.processes import StartError, connect_in
from hack.controlplane.seed import stored
from nodeproxy.sandbox.namespace import Namespace, unique_stem
from nodeproxy.sandbox.pace import scaled
from nodeproxy.sandbox.topology import Sandbox

_SERVICES_PER_FILE = 2000
_SLICES_PATH = f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices"
_API_ADDRESS = "100.64.3.1"
_API_CLIENT = "100.64.3.2"
_API_PORT = 6443
_START_TIMEOUT = 60.0
_LIST_BY_WATCH = "watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true&timeoutSeconds=1"


class Feed(ABC):
    """A cluster state that agents can be pointed at. `json_only`: its API server does not speak protobuf."""

    name: str
    json_only = False

    @abstractmethod
    def flags(self) -> list[str]:
        """What tells an agent to use it."""

    @abstractmethod
    def add(self, shape: Shape) -> None:
        """Adds Services, while no agent runs."""

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

    def __init__(self, probe_at: str, objects: Sequence[Json] = ()) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="nodeproxy-bench-"))
        self._directory = self._root / "manifests"
        self._directory.mkdir()
        self._write("node.json", [node(NODE, [NODE_ADDRESS]), probe_service(), *objects])
        self.point_to(probe_at)

    def flags(self) -> list[str]:
        return ["--manifests", str(self._directory)]

    def add(self, shape: Shape) -> None:
        for start in range(0, shape.services, _SERVICES_PER_FILE):
            numbers = shape.numbers[start : start + _SERVICES_PER_FILE]
            objects = [item for number in numbers for item in (shape.service(number), *shape.slices(number))]
            self._write(f"bulk-{numbers[0]}.json", objects)

    def point_to(self, address: str) -> None:
        self._write("probe.json", [probe_slice(address)])

    def close(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)

    def _write(self, name: str, objects: Iterable[Json]) -> None:
        """Drafts are written beside the directory, so that it sees one event: the file moved into place."""
        draft = self._root / name
        draft.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}))
        draft.rename(self._directory / name)


class Writer:
    """Writes EndpointSlices over one connection that stays open, unless it rested for long. `close` it."""

    def __init__(self, feed: ServerFeed) -> None:
        self._feed = feed
        self._connection: http.client.HTTPConnection | None = None

    def put(self, slice_: Json) -> None:
        """Replaces a slice, and returns once that is written: what is measured begins with the request. Raises ApiError."""
        try:
            self._put(slice_)
        except (ConnectionError, http.client.HTTPException):
            self.close()
            self._put(slice_)

    def _put(self, slice_: Json) -> None:
        if self._connection is None:
            self._connection = self._feed.connect()
        path = f"{_SLICES_PATH}/{slice_['metadata']['name']}"
        headers = {**self._feed.headers(), "Content-Type": "application/json"}
        self._connection.request("PUT", path, msgspec.json.encode(slice_), headers)
        response = self._connection.getresponse()
        body = response.read().decode()
        if response.status >= 400:
            raise ApiError("PUT", path, response.status, body)

    def close(self) -> None:
        """Ends the connection; the next write begins another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class ServerFeed(Feed):
    """An API server in a network namespace of its own, with a link to the node whose turn it is."""

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="nodeproxy-bench-"))
        self._links = 0
        self._writer = Writer(self)
        self._space = Namespace(f"{unique_stem()}-control")
        self._space.ip(["link set lo up", f"addr add {_API_ADDRESS}/32 dev lo"])

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
        self._writer.put(probe_slice(address))

    def close(self) -> None:
        self._writer.close()
        self._stop()
        self._space.close()
        shutil.rmtree(self._root, ignore_errors=True)

    @abstractmethod
    def connect(self) -> http.client.HTTPConnection:
        """A new connection to the server."""

    @abstractmethod
    def _stop(self) -> None:
        """Ends the server."""

    def headers(self) -> Mapping[str, str]:
        """What a request needs to be allowed."""
        return {}


class ApiServerFeed(ServerFeed):
    """A control plane: etcd and kube-apiserver."""

    name = "apiserver"

    def __init__(self, probe_at: str, objects: Sequence[Json] = ()) -> None:
        super().__init__()
        self._cluster = ControlPlane(
            self._root / "control-plane", netns=self._space.name, bind_address=_API_ADDRESS, port=_API_PORT
        )
        try:
            self._cluster.start()
            self._cluster.write_kubeconfig(self._root / "kubeconfig")
            namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
            self._cluster.request("POST", "/api/v1/namespaces", namespace)
            self._cluster.request("POST", "/api/v1/nodes", node(NODE, [NODE_ADDRESS]))
            self._cluster.request("POST", f"/api/v1/namespaces/{NAMESPACE}/services", probe_service())
            self._cluster.request("POST", _SLICES_PATH, probe_slice(probe_at))
            for item in objects:
                path = static_api.KINDS[item["kind"]].rpartition("/")
                self._cluster.request("POST", f"{path[0]}/namespaces/{NAMESPACE}/{path[2]}", item)
        except BaseException:
            self.close()
            raise

    def add(self, shape: Shape) -> None:
        """The API server restarts; the first to list and watch afterwards waits longer, so that is done here."""
        self._writer.close()
        self._cluster.seed(shape)
        for path in (static_api.KINDS[kind] for kind in ("Service", "EndpointSlice", "Node")):
            with closing(self.connect()) as connection:
                connection.request("GET", f"{path}?{_LIST_BY_WATCH}", headers=dict(self.headers()))
                connection.getresponse().read()

    def flags(self) -> list[str]:
        return ["--kubeconfig", str(self._root / "kubeconfig")]

    def connect(self) -> http.client.HTTPConnection:
        access = self._cluster.access
        parts = urlsplit(access.url)
        assert parts.hostname and parts.port
        context = access.ssl_context()
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, context=context)
        sock = _connected(access.netns, parts.hostname, parts.port)
        connection.sock = context.wrap_socket(sock, server_hostname=parts.hostname)
        return connection

    def headers(self) -> Mapping[str, str]:
        return self._cluster.access.headers

    def _stop(self) -> None:
        self._cluster.stop()


class StaticFeed(ServerFeed):
    """A process that serves the objects of a file (`hack.bench.static_api`): there in seconds even under emulation."""

    name = "static"
    json_only = True

    def __init__(self, probe_at: str, objects: Sequence[Json] = ()) -> None:
        super().__init__()
        self._file = self._root / "objects"
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._append([node(NODE, [NODE_ADDRESS]), probe_service(), probe_slice(probe_at), *objects])
        except BaseException:
            self.close()
            raise

    def add(self, shape: Shape) -> None:
        objects = (item for _, item in stored(shape, range(30000, 32768)))
        self._append(item for item in objects if item["kind"] in static_api.KINDS)

    def flags(self) -> list[str]:
        return ["--master", f"http://{_API_ADDRESS}:{_API_PORT}"]

    def _append(self, objects: Iterable[Json]) -> None:
        """Starts the server anew, with these objects besides the others."""
        self._stop()
        with self._file.open("ab") as file:
            file.writelines(msgspec.json.encode(item) + b"\n" for item in objects)
        command = [sys.executable, "-m", static_api.__name__, "--listen", f"{_API_ADDRESS}:{_API_PORT}", str(self._file)]
        log = self._root / "log"
        with log.open("wb") as output:
            self._process = self._space.spawn(command, output=output)
        deadline = time.monotonic() + scaled(_START_TIMEOUT)
        while True:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise StartError(f"the static API server does not start\n{log.read_text(errors='replace')}")
            with suppress(OSError):
                self.connect().close()
                return
            time.sleep(0.02)

    def connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(_API_ADDRESS, _API_PORT)
        connection.sock = _connected(self._space.name, _API_ADDRESS, _API_PORT)
        return connection

    def _stop(self) -> None:
        self._writer.close()
        if self._process is not None:
            self._process.kill()  # it has nothing to put in order, and would wait for its watchers
            self._process.wait()


def _connected(netns: str | None, host: str, port: int) -> socket.socket:
    sock = connect_in(netns, host, port, scaled(30.0))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else the body waits for the server to acknowledge the head
    return sock


_FEEDS: Final = {feed.name: feed for feed in (ManifestFeed, ApiServerFeed, StaticFeed)}
SOURCES: Final = tuple(_FEEDS)
SERVERS: Final = (ApiServerFeed.name, StaticFeed.name)


def open_feed(name: str, probe_at: str) -> Feed:
    """A feed by its name, with nothing but the probe in it, whose endpoint is at this address."""
    return _FEEDS[name](probe_at)


def open_server(name: str, probe_at: str, objects: Sequence[Json] = ()) -> ServerFeed:
    """One of `SERVERS`, with these Services and EndpointSlices besides."""
    feed: type[ApiServerFeed] | type[StaticFeed] = ApiServerFeed if name == ApiServerFeed.name else StaticFeed
    return feed(probe_at, objects)
