"""Owns how images of the engine get into the nodes: imported by each node's containerd, all nodes at once."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hack.kind import images
from hack.kind.cluster import Cluster
from hack.kind.command import run
from hack.kind.progress import step
from nodeproxy.sandbox.pace import scaled


def load(cluster: Cluster, references: Sequence[str]) -> None:
    """Have these images of the engine in every node; nodes that have them are left alone."""
    identities = {reference: images.identity(reference) for reference in references}
    nodes = [node.name for node in cluster.nodes()]
    with ThreadPoolExecutor(len(nodes)) as pool:
        wanting = list(pool.map(lambda node: _missing(node, identities), nodes))
        missing = sorted(set().union(*wanting))
        if not missing:
            return
        with step(f"loading {', '.join(missing)} into {len(nodes)} nodes"), tempfile.TemporaryDirectory() as directory:
            archive = Path(directory, "images.tar")
            run(["docker", "save", "--output", archive, *missing], timeout=scaled(300))
            chosen = [node for node, lacks in zip(nodes, wanting, strict=True) if lacks]
            list(pool.map(lambda node: _import(node, archive), chosen))


def _missing(node: str, identities: dict[str, str]) -> set[str]:
    """Which of the images (by reference, with their ids) a node lacks, or has in another version."""
    listed = json.loads(run(["docker", "exec", node, "crictl", "images", "--output", "json"]))["images"]
    found = {tag: image["id"] for image in listed for tag in image.get("repoTags") or ()}
    return {reference for reference, identity in identities.items() if found.get(canonical(reference)) != identity}


def canonical(reference: str) -> str:
    """The reference as containerd has it: with its registry."""
    first, *rest = reference.split("/")
    if not rest:
        return f"docker.io/library/{reference}"
    return reference if "." in first or ":" in first or first == "localhost" else f"docker.io/{reference}"


def _import(node: str, archive: Path) -> None:
    # --local: by the client itself, which takes a third of the time that containerd's service does. Layers are unpacked
    # when a pod first needs them, so that nodes without such pods save the time.
    options = ["--local", "--no-unpack"]
    command = ["docker", "exec", "--interactive", node, "ctr", "--namespace", "k8s.io", "images", "import", *options, "-"]
    with archive.open("rb") as file:
        run(command, stdin=file, timeout=scaled(300))
