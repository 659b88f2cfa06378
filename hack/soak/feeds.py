"""Owns telling agents about the cluster: a directory of manifests, or an API server that can be stopped and come back."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Final

import msgspec

from hack.bench import static_api
from hack.controlplane.processes import connect_in
from hack.soak.cluster import Object
from nodeproxy.sandbox.agent import http_get
from nodeproxy.sandbox.pace import scaled
from nodeproxy.sandbox.topology import Sandbox

_ADDRESS, _CLIENT, _PORT = "100.64.3.1", "100.64.3.2", 6443
_START_TIMEOUT: Final = 20.0
_PATHS: Final = {
    "EndpointSlice": "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices/{name}",
    "Service": "/api/v1/namespaces/{namespace}/services/{name}",
}


class Feed(ABC):
    """A cluster state that an agent can be pointed at."""

    @abstractmethod
    def flags(self) -> list[str]:
        """What tells an agent to use it."""

    @abstractmethod
    def put(self, objects: Sequence[Object]) -> None:
        """Write objects anew; returns once they are written."""

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """End it."""


class ManifestFeed(Feed):
    """A directory of JSON manifests, one file for what is fixed and one for what changes."""

    def __init__(self, box: Sandbox, fixed: Sequence[Object]) -> None:
        self._draft = box.directory / "draft.json"
        self._directory = box.directory / "manifests"
        self._directory.mkdir()
        self._write("fixed.json", fixed)

    def flags(self) -> list[str]:
        return ["--manifests", str(self._directory)]

    def put(self, objects: Sequence[Object]) -> None:
        self._write("changing.json", objects)

    def _write(self, name: str, objects: Sequence[Object]) -> None:
        self._draft.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))
        self._draft.rename(self._directory / name)


class ApiFeed(Feed):
    """An API server in a namespace of its own that keeps all versions ever written, and so goes on where it ended."""

    def __init__(self, box: Sandbox, fixed: Sequence[Object]) -> None:
        self._space = box.namespace("api")
        self._journal = box.directory / "objects"
        self._log = box.directory / "api.log"
        self._node = box.node
        self._process: subprocess.Popen[bytes] | None = None
        link = "cp0"
        box.node.ip(
            [
                f"link add {link} type veth peer name eth0 netns {self._space.name}",
                f"link set {link} up",
                f"addr add {_CLIENT}/32 dev {link}",
                f"route add {_ADDRESS}/32 dev {link} src {_CLIENT}",
            ]
        )
        self._space.ip(
            ["link set lo up", "link set eth0 up", f"addr add {_ADDRESS}/32 dev eth0", f"route add {_CLIENT}/32 dev eth0"]
        )
        box.node.wait_links_up([link])
        with self._journal.open("ab") as journal:
            _append(journal, fixed)

    def flags(self) -> list[str]:
        return ["--master", f"http://{_ADDRESS}:{_PORT}"]

    def put(self, objects: Sequence[Object]) -> None:
        """While it does not run, objects are there when it starts."""
        with self._journal.open("ab") as journal:
            _append(journal, objects)
        if self._process is None:
            return
        for item in objects:
            meta = item["metadata"]
            path = _PATHS[item["kind"]].format(namespace=meta["namespace"], name=meta["name"])
            self._space.run(_put, path, json.dumps(item).encode())

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", static_api.__name__, "--listen", f"{_ADDRESS}:{_PORT}", str(self._journal)]
        with self._log.open("ab") as output:
            self._process = self._space.spawn(command, output=output)
        deadline = time.monotonic() + scaled(_START_TIMEOUT)
        while time.monotonic() < deadline:
            with suppress(OSError):
                http_get(self._space, f"http://{_ADDRESS}:{_PORT}/version")
                return
            time.sleep(0.05)
        raise TimeoutError(f"the API server does not start: {self._log.read_text(errors='replace')}")

    def kill(self) -> None:
        """It dies: connections are reset, and new ones refused."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self, frozen: bool) -> None:
        """It hangs: connections stay, and nothing comes."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def close(self) -> None:
        self.kill()


def _append(journal: IO[bytes], objects: Sequence[Object]) -> None:
    journal.writelines(msgspec.json.encode(item) + b"\n" for item in objects)


def _put(path: str, body: bytes) -> None:
    """Runs in the API server's namespace."""
    head = f"PUT {path} HTTP/1.1\r\nHost: api\r\nContent-Type: application/json\r\nConnection: close\r\n"
    with connect_in(None, _ADDRESS, _PORT, scaled(10.0)) as sock:
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status = sock.makefile("rb").readline()
    if b" 200 " not in status:
        raise OSError(f"PUT {path}: {status!r}")
