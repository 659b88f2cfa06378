"""Owns clusters: made by kind from our node image, taken again if one fits, removed without a trace.

Each has a Docker network of its own, named like the cluster, and `NODEPROXY_RUN`/clusters/NAME with its kubeconfig.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from hack.kind import engine, images, network, parts
from hack.kind.command import again, run
from hack.kind.config import DEFAULT_NAME, Shape
from hack.kind.node_image import node_image
from hack.kind.places import KindError, locked, state
from hack.kind.progress import say, step
from nodeproxy.sandbox.pace import scaled

_LABEL: Final = "io.x-k8s.kind.cluster"
_CREATION_LIMIT: Final = 600.0
_INOTIFY_INSTANCES: Final = 1024
_READY_LIMIT: Final = 120.0


@dataclass(frozen=True)
class ClusterNode:
    """A node: its name (also its container's), `control-plane` or `worker`, its addresses, IPv4 first."""

    name: str
    role: str
    addresses: tuple[str, ...]
    pod_subnets: tuple[str, ...]
    ready: bool

    @property
    def address(self) -> str:
        """The first address."""
        return self.addresses[0]


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs."""

    name: str
    kubeconfig: Path
    ip_family: str = "ipv4"

    def kubectl(self, *arguments: str, input: str | None = None, timeout: float | None = None) -> str:
        """What kubectl prints; KindError with what it says where it fails."""
        return run([self._kubectl, "--kubeconfig", self.kubeconfig, *arguments], input=input, timeout=timeout)

    def nodes(self) -> list[ClusterNode]:
        """The nodes as the API server knows them now, the control plane first."""
        items = json.loads(self.kubectl("get", "nodes", "--output", "json"))["items"]
        return sorted(map(_node, items), key=lambda node: (node.role != "control-plane", node.name))

    def exec(self, node: ClusterNode | str, *command: str, input: str | None = None, timeout: float | None = None) -> str:
        """Standard output of a command in a node."""
        name = node if isinstance(node, str) else node.name
        return run(["docker", "exec", *(["--interactive"] if input else []), name, *command], input=input, timeout=timeout)

    @property
    def control_plane(self) -> str:
        """The name of the control plane's node, by which containers of the cluster's network find it."""
        return f"{self.name}-control-plane"

    @property
    def control_plane_address(self) -> str:
        """The control plane's address, where the API server listens (port 6443) before any cluster IP works."""
        return self.nodes()[0].address

    @property
    def network(self) -> str:
        """The name of the cluster's Docker network."""
        return self.name

    @property
    def gateways(self) -> tuple[str, ...]:
        """This machine's addresses in the cluster's network, IPv4 first: an outside client's."""
        configurations = json.loads(run(["docker", "network", "inspect", "--format", "{{json .IPAM.Config}}", self.network]))
        return tuple(sorted((one["Gateway"] for one in configurations if "Gateway" in one), key=lambda one: ":" in one))

    @cached_property
    def _kubectl(self) -> Path:
        return parts.kubernetes_programs() / "kubectl"


def existing(name: str = DEFAULT_NAME) -> Cluster:
    """The cluster of this name, which has to be there."""
    known = _recorded(name)
    if known is None or not _containers(name):
        raise KindError(f"there is no cluster {name}: `python -m hack.kind up --name {name}` makes it")
    return Cluster(name, _directory(name) / "kubeconfig", known["ip_family"])


def up(shape: Shape | None = None) -> Cluster:
    """A cluster of this shape with all nodes ready: the one that is there if it fits, else a new one."""
    shape = shape or Shape()
    say(str(engine.ensure()))
    image = node_image()
    made_of = shape.key(images.identity(image), network.source(), parts.KIND)
    with locked(state() / "clusters" / f"{shape.name}.lock"):
        if cluster := _reusable(shape, made_of):
            return cluster
        with _removed_on_failure(shape):
            return _create(shape, image, made_of)


def down(name: str = DEFAULT_NAME) -> None:
    """Remove a cluster, its network, its routes and what is recorded of it; nothing if there is none."""
    if shutil.which("docker") is None or engine.answering() is None:
        say("no Docker engine answers: nothing to remove")
        return
    subnets = (_recorded(name) or {}).get("pod_subnets", Shape(name).pod_subnets)
    with step(f"removing cluster {name}"):
        if containers := _containers(name):
            run(["docker", "rm", "--force", "--volumes", *containers], timeout=scaled(120))
        network.forget_host_routes(subnets)
        network.forget_services(name)
        if run(["docker", "network", "ls", "--quiet", "--filter", f"name=^{name}$"]).strip():
            run(["docker", "network", "rm", name])
        shutil.rmtree(_directory(name), ignore_errors=True)


def wait_until(done: Callable[[], bool], what: str, *, within: float) -> None:
    """Wait until `done`, `within` seconds (scaled by the machine's pace); KindError names `what` was waited for."""
    deadline = time.monotonic() + scaled(within)
    while not done():
        if time.monotonic() > deadline:
            raise KindError(f"not within {scaled(within):.0f} s: {what}")
        time.sleep(0.3)


def _reusable(shape: Shape, made_of: str) -> Cluster | None:
    """The cluster that is there, if it fits; one that does not is removed."""
    containers = _containers(shape.name)
    if not containers:
        return None
    known = _recorded(shape.name)
    if known is None or known["key"] != made_of:
        say(f"cluster {shape.name} is there, but was made of something else: it is made anew")
    else:
        cluster = Cluster(shape.name, _directory(shape.name) / "kubeconfig", shape.ip_family)
        try:
            run(["docker", "start", *containers])
            _await_ready(cluster, 1 + shape.workers)
            _host_routes(cluster)
        except KindError as error:
            say(f"cluster {shape.name} is there, but not in order, and is made anew: {error}")
        else:
            say(f"cluster {shape.name} is taken again")
            return cluster
    down(shape.name)
    return None


def _allow_watches() -> None:
    """Let this machine have inotify instances for many nodes: with the usual 128, systemd fails in the ninth."""
    file = Path("/proc/sys/fs/inotify/max_user_instances")
    with suppress(OSError, ValueError):  # not root, or not ours to write: few nodes do with what is there
        if int(file.read_text()) < _INOTIFY_INSTANCES:
            file.write_text(f"{_INOTIFY_INSTANCES}\n")
            say(f"fs.inotify.max_user_instances raised to {_INOTIFY_INSTANCES}, for the nodes of kind")


@again
def _create(shape: Shape, image: str, made_of: str) -> Cluster:
    _allow_watches()
    if _containers(shape.name):
        down(shape.name)  # of an attempt that failed
    directory = _directory(shape.name)
    cluster = Cluster(shape.name, directory / "kubeconfig", shape.ip_family)
    (directory / "kind.yaml").write_text(shape.kind_config())
    options = ["--name", shape.name, "--image", image, "--config", directory / "kind.yaml"]
    options += ["--kubeconfig", cluster.kubeconfig]
    what = f"{1 + shape.workers} nodes, {shape.ip_family}, kube-proxy: {shape.kube_proxy}"
    with step(f"creating cluster {shape.name} ({what})"):
        # --retain: its logs are wanted where it fails.
        env = {"KIND_EXPERIMENTAL_PROVIDER": "docker", "KIND_EXPERIMENTAL_DOCKER_NETWORK": shape.name}
        run([parts.kind(), "create", "cluster", "--retain", *options], timeout=scaled(_CREATION_LIMIT), env=env)
    with step("network of pods"):
        wait_until(lambda: all(node.pod_subnets for node in cluster.nodes()), "every node has a subnet for pods", within=30)
        network.install({node.name: node.pod_subnets for node in cluster.nodes()})
        _host_routes(cluster)
    with step("waiting for nodes"):
        _await_ready(cluster, 1 + shape.workers)
    facts = {"key": made_of, "ip_family": shape.ip_family, "pod_subnets": shape.pod_subnets, "kube_proxy": shape.kube_proxy}
    (directory / "cluster.json").write_text(json.dumps(facts))
    return cluster


@contextmanager
def _removed_on_failure(shape: Shape) -> Iterator[None]:
    """Whatever ends the creation of a cluster, also Ctrl-C: nothing is left of it, unless E2E_KEEP=1 asks for it."""
    try:
        yield
    except BaseException as error:
        if os.environ.get("E2E_KEEP") == "1":
            say(f"cluster {shape.name} is left as it is (E2E_KEEP=1)")
        else:
            if isinstance(error, KindError) and _containers(shape.name):
                _keep_logs(shape.name)
            with suppress(KindError):
                down(shape.name)
        raise


def _keep_logs(name: str) -> None:
    target = state() / "failed" / name
    shutil.rmtree(target, ignore_errors=True)
    with suppress(KindError):
        run([parts.kind(), "export", "logs", "--name", name, target], timeout=scaled(120))
        say(f"the logs of the failed cluster are in {target}")


def _await_ready(cluster: Cluster, count: int) -> None:
    def ready() -> bool:
        try:
            nodes = cluster.nodes()
        except KindError:
            return False
        return len(nodes) == count and all(node.ready for node in nodes)

    wait_until(ready, f"all {count} nodes of {cluster.name} are ready", within=_READY_LIMIT)


def _host_routes(cluster: Cluster) -> None:
    nodes = cluster.nodes()
    network.host_routes({node.name: node.addresses for node in nodes}, {node.name: node.pod_subnets for node in nodes})
    network.keep_services_in(cluster.name, Shape(cluster.name, ip_family=cluster.ip_family).service_subnets)


def _node(item: dict[str, Any]) -> ClusterNode:
    labels, status = item["metadata"].get("labels", {}), item.get("status", {})
    role = "control-plane" if "node-role.kubernetes.io/control-plane" in labels else "worker"
    addresses = (one["address"] for one in status.get("addresses", []) if one["type"] == "InternalIP")
    ready = any(one["type"] == "Ready" and one["status"] == "True" for one in status.get("conditions", []))
    ordered = tuple(sorted(addresses, key=lambda one: ":" in one))
    return ClusterNode(item["metadata"]["name"], role, ordered, tuple(item["spec"].get("podCIDRs", ())), ready)


def _containers(name: str) -> Sequence[str]:
    return run(["docker", "ps", "--all", "--filter", f"label={_LABEL}={name}", "--format", "{{.Names}}"]).split()


def _directory(name: str) -> Path:
    path = state() / "clusters" / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def _recorded(name: str) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        facts: dict[str, Any] = json.loads((_directory(name) / "cluster.json").read_text())
        return facts
    return None
