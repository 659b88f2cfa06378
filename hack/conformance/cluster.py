"""Owns what the tests run against: a kind cluster with the tests' images on its nodes, and nodeproxy or kube-proxy in it."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hack.kind import cluster as kind
from hack.kind import deploy, engine, loading, logs, parts, test_images
from hack.kind.cluster import Cluster
from hack.kind.command import run
from hack.kind.config import Shape
from hack.kind.places import REPOSITORY, KindError
from hack.kind.progress import say


@dataclass(frozen=True)
class Subject:
    """The service proxy under test, nodeproxy in `mode` or kube-proxy in the mode `peer`, and the cluster for it."""

    name: str
    workers: int
    all_nodes: bool
    ip_family: str
    mode: str
    peer: str | None

    @property
    def label(self) -> str:
        """As it stands in names of files."""
        return (f"kube-proxy-{self.peer}" if self.peer else self.mode) + ("-dual" if self.ip_family == "dual" else "")

    @property
    def usable_nodes(self) -> int:
        """How many nodes the tests may put pods on."""
        return self.workers + self.all_nodes

    @property
    def title(self) -> str:
        """As it stands in headings."""
        proxy = f"kube-proxy, {self.peer} mode" if self.peer else f"nodeproxy, {self.mode} mode"
        return f"{proxy}, dual stack" if self.ip_family == "dual" else proxy

    @contextmanager
    def running(self, logs_into: Path, *, keep: bool) -> Iterator[Cluster]:
        """The cluster, ready for the tests; afterwards its logs are in a directory, and it is removed unless `keep`."""
        engine.ensure()
        references = test_images.all_images()
        cluster = kind.up(Shape(self.name, self.workers, self.ip_family, self.peer or "none"))
        try:
            loading.load(cluster, references)
            _spread_over_zones(cluster)
            if self.all_nodes:
                _untaint(cluster)
            if self.peer is None:
                deploy.deploy(cluster, self.mode)
            try:
                yield cluster
            finally:
                logs.try_to_collect(cluster, logs_into)
        finally:
            if keep:
                say(f"the cluster is left running; python -m hack.kind down --name {self.name} removes it")
            else:
                kind.down(self.name)


def _spread_over_zones(cluster: Cluster) -> None:
    """A zone for each worker, as tests of topology want; the control plane is in the first."""
    zones = {node.name: max(index, 1) for index, node in enumerate(cluster.nodes())}
    for node, zone in zones.items():
        cluster.kubectl("label", "node", node, f"topology.kubernetes.io/zone=zone-{zone}", "--overwrite")


def _untaint(cluster: Cluster) -> None:
    """Have the scheduler use the control plane's node, too."""
    taint = "node-role.kubernetes.io/control-plane"
    if taint in cluster.kubectl("get", "node", cluster.control_plane, "--output", "jsonpath={.spec.taints[*].key}"):
        cluster.kubectl("taint", "node", cluster.control_plane, f"{taint}-")


def facts(cluster: Cluster) -> dict[str, str]:
    """Of the cluster and the machine, for the table: versions that a result depends on."""
    nodes = json.loads(cluster.kubectl("get", "nodes", "--output", "json"))["items"]
    info = nodes[0]["status"]["nodeInfo"]
    tables = cluster.exec(cluster.control_plane, "iptables", "--version").strip()
    return {
        "nodeproxy": _revision(),
        "Kubernetes": json.loads(cluster.kubectl("version", "--output", "json"))["serverVersion"]["gitVersion"],
        "nodes": f"{len(nodes)}, by kind {parts.KIND} in Docker; {info['osImage']}, {info['containerRuntimeVersion']}",
        "kernel": f"{platform.release()}, {platform.machine()}",
        "iptables in nodes": tables,
    }


def _revision() -> str:
    """The commit of this clone, and whether files differ from it."""
    try:
        return run(["git", "-C", REPOSITORY, "describe", "--always", "--dirty", "--abbrev=10"]).strip()
    except KindError:
        return "not in a git clone"
