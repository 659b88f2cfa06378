"""Owns the roll-outs of a cluster, from outside: made, changed and read as with kubectl; and the operator's pods."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from kubernetes.dynamic.exceptions import DynamicApiError, NotFoundError

from e2e.harness.agents import SYSTEM
from e2e.harness.api import Api
from e2e.harness.objects import Object
from e2e.harness.stage import is_ready
from e2e.harness.waiting import eventually

FINISHED: Final = ("Completed", "Failed", "Aborted")
OPERATOR: Final = "nodeproxy-operator"
_LIMIT: Final = 120.0


class Rollouts:
    """The roll-outs of the cluster that tests run against."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.made: list[str] = []

    def start(self, name: str, target: Object, **spec: Any) -> str:
        """Make a roll-out to all nodes, quick unless told otherwise: one node first, no soaking."""
        body = {
            "apiVersion": "nodeproxy.io/v1alpha1",
            "kind": "ProxyRollout",
            "metadata": {"name": name},
            "spec": {
                "target": target,
                "nodes": {"selector": {}},
                "steps": [1, "100%"],
                "soakSeconds": 0,
                "timeouts": {"nodeReadySeconds": 120, "verificationSeconds": 60},
                **spec,
            },
        }
        self.api.create(body, namespace=None)
        self.made.append(name)
        return name

    def change(self, name: str, **spec: Any) -> None:
        """Change fields of its spec."""
        self.api.patch("ProxyRollout", name, {"spec": spec}, namespace=None)

    def status(self, name: str) -> Object:
        """What it says of itself."""
        found: Object = self.api.get("ProxyRollout", name, namespace=None).get("status") or {}
        return found

    def nodes(self, name: str) -> dict[str, str]:
        """The phase of each of its nodes."""
        return {line["name"]: line["phase"] for line in self.status(name).get("nodes") or []}

    def wait(self, name: str, what: str, done: Callable[[Object], object], within: float = _LIMIT) -> Object:
        """Wait until its status is so. Returns it."""

        def look() -> Object:
            status = self.status(name)
            assert done(status), _told(status)
            return status

        return eventually(look, f"roll-out {name}: {what}", within=within)

    def ends(self, name: str, phase: str, within: float = _LIMIT) -> Object:
        """Wait until it has ended, in this phase. Returns its status."""
        status = self.wait(name, "has ended", lambda status: status.get("phase") in FINISHED, within)
        assert status["phase"] == phase, _told(status)
        return status

    def remove(self, name: str, within: float = _LIMIT) -> None:
        """Delete it, and wait until the operator has let it go."""
        self.api.delete("ProxyRollout", name, namespace=None)

        def gone() -> bool:
            try:
                status = self.status(name)
            except NotFoundError:
                return True
            raise AssertionError(_told(status))

        eventually(gone, f"roll-out {name} is gone", within=within)

    def close(self) -> None:
        """Remove what was made, and what nodes were told."""
        for name in self.made:
            self.remove(name)
        for node in self.api.list("ProxyNode", namespace=None):
            self.api.delete("ProxyNode", node["metadata"]["name"], namespace=None)

    def node(self, name: str) -> Object:
        """The ProxyNode of a node; empty where there is none."""
        try:
            return self.api.get("ProxyNode", name, namespace=None)
        except NotFoundError:
            return {}

    def kill_operators(self) -> None:
        """Remove all pods of the operator at once, as when their nodes lose power."""
        for pod in self.api.list("Pod", f"k8s-app={OPERATOR}", SYSTEM):
            self.api.delete("Pod", pod["metadata"]["name"], SYSTEM, at_once=True)

    def operator_ready(self) -> None:
        """Wait until the operator's pods are ready again."""
        eventually(
            lambda: all(is_ready(pod) for pod in self.api.list("Pod", f"k8s-app={OPERATOR}", SYSTEM)),
            "the operator is ready",
        )

    @contextmanager
    def transcript(self, name: str) -> Iterator[list[str]]:
        """What `kubectl get proxyrollout NAME -w` would tell meanwhile, one line for each change, printed at the end."""
        lines: list[str] = []
        stop = threading.Event()
        began = time.monotonic()

        def look() -> None:
            try:
                status = self.status(name)
            except DynamicApiError:  # not made yet, or gone
                return
            line = " ".join(str(status.get(field, "-")) for field in ("phase", "stepText", "progress", "message"))
            if not lines or not lines[-1].endswith(line):
                lines.append(f"{time.monotonic() - began:6.1f} s  {line}")

        def watch() -> None:
            while not stop.wait(0.25):
                look()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield lines
        finally:
            stop.set()
            thread.join()
            look()
            print(f"roll-out {name}", *lines, sep="\n")


def phases(status: Object) -> list[str]:
    """The phases of the nodes of a roll-out, sorted."""
    return sorted(line["phase"] for line in status.get("nodes") or [])


def line_of(status: Object, phase: str) -> Object:
    """The line of the one node in this phase."""
    found: Sequence[Object] = [line for line in status.get("nodes") or [] if line["phase"] == phase]
    assert len(found) == 1, _told(status)
    return found[0]


def _told(status: Object) -> str:
    lines = [f"{line['name']}: {line['phase']} {line.get('reason', '')}" for line in status.get("nodes") or []]
    return f"{status.get('phase')}: {status.get('message')}; {'; '.join(lines)}"
