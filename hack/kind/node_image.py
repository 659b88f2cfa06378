"""Owns the image of a kind node: `kindest/node` of our Kubernetes version where it can be pulled, else made here.

Ours is Debian with systemd, containerd, kubelet and kubeadm, and has Kubernetes' own images in containerd's content
store (imported by the node's containerd itself, then `docker commit`). `NODEPROXY_NODE_IMAGE` names another image.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from hack.kind import images, parts
from hack.kind.base_image import base_image
from hack.kind.command import again, run, succeeds
from hack.kind.images import KEY_LABEL, Image
from hack.kind.places import HERE, KindError, cache
from hack.kind.progress import step
from nodeproxy.sandbox.pace import scaled

_SOURCES: Final = HERE / "node"
_RECIPE: Final = "2"  # counts changes of this module that change the image
_KUBERNETES: Final = "kubernetes"  # the program that all of Kubernetes' names link to
_CONTROL_PLANE: Final = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "etcd")
_ON_NODES: Final = ("kubelet", "kubeadm", "kubectl")
_PARTS: Final = (parts.CONTAINERD_PART, parts.CNI_PART, parts.CRICTL_PART, parts.COREDNS_PART, parts.PAUSE_PART)


def node_image() -> str:
    """The reference of the node image, which is in the engine."""
    if named := os.environ.get("NODEPROXY_NODE_IMAGE"):
        return named
    ours, official = _ours(), f"kindest/node:{parts.kubernetes_version()}"
    if images.fits(ours):
        return ours.reference
    if images.fits(Image(official)) or (not ours.archive.exists() and images.pulled(official)):
        return official
    return images.ensure(ours, lambda: _build(ours))


def kubernetes_images() -> dict[str, str]:
    """The references of the images that kubeadm runs, by component: as `kubeadm config images list` prints them."""
    kubeadm = parts.kubernetes_programs() / "kubeadm"
    listed = run([kubeadm, "config", "images", "list", "--kubernetes-version", parts.kubernetes_version()]).split()
    return {reference.rsplit("/", 1)[1].split(":")[0]: reference for reference in listed}


def _ours() -> Image:
    program = (parts.kubernetes_programs() / _KUBERNETES).resolve()
    made_of = images.key(
        [
            program.parent.parent.name,  # its directory carries the key of its build
            *(part.key for part in _PARTS),
            _RECIPE,
            *(path for path in sorted(_SOURCES.iterdir()) if path.name != "network"),
        ]
    )
    return Image(f"nodeproxy/node:{parts.kubernetes_version()}-{made_of}", made_of)


def _build(image: Image) -> None:
    references = kubernetes_images()
    base = base_image()
    with _context(_SOURCES / "node.Dockerfile") as context:
        _node_files(context, references)
        with step("node image: Debian packages, programs"):
            images.build(context, f"{image.reference}-base", key="", arguments={"BASE": base})
    _component_images(references, base)
    with step("node image: Kubernetes' images into its content store"):
        _commit(image, list(references.values()))
    # What they are made of lives on in the node image.
    run(["docker", "rmi", *references.values(), f"{image.reference}-base"])


def _node_files(context: Path, references: dict[str, str]) -> None:
    """The build context of the node's root file system."""
    shutil.copytree(_SOURCES / "files", context / "files")
    configuration = context / "files/etc/containerd/config.toml"
    configuration.write_text(configuration.read_text().replace("@PAUSE@", references["pause"]))
    version = context / "files/kind/version"  # kind asks for it
    version.parent.mkdir()
    version.write_text(parts.kubernetes_version())
    programs = _kubernetes_links(context / "bin", _ON_NODES)
    for part in (parts.CONTAINERD_PART, parts.CRICTL_PART):
        for program in part.build().iterdir():
            _link(program, programs / program.name)
    for plugin in parts.CNI_PART.build().iterdir():
        _link(plugin, context / "opt/cni/bin" / plugin.name)


def _component_images(references: dict[str, str], base: str) -> None:
    with step("node image: Kubernetes' images"):
        with _context(_SOURCES / "control-plane.Dockerfile") as context:
            _kubernetes_links(context / "root/kubernetes", (*_CONTROL_PLANE, "kube-proxy"))
            images.build(context, references[_CONTROL_PLANE[0]], key="")
            # The same context, so that both have the same layer: every node has a copy of it.
            shutil.copyfile(_SOURCES / "kube-proxy.Dockerfile", context / "Dockerfile")
            images.build(context, references["kube-proxy"], key="", arguments={"BASE": base})
        for component in _CONTROL_PLANE[1:]:
            run(["docker", "tag", references[_CONTROL_PLANE[0]], references[component]])
        for name, part in (("coredns", parts.COREDNS_PART), ("pause", parts.PAUSE_PART)):
            with _context(_SOURCES / f"{name}.Dockerfile") as context:
                _link(part.build() / name, context / name)
                images.build(context, references[name], key="")


@again
def _commit(image: Image, references: Sequence[str]) -> None:
    """Run the node's containerd, have it import the images, and make an image of that container."""
    name = f"nodeproxy-node-image-{uuid.uuid4().hex[:8]}"
    base = f"{image.reference}-base"
    try:
        run(["docker", "run", "--detach", "--privileged", "--name", name, "--entrypoint", "containerd", base])
        ctr = ["docker", "exec", "--interactive", name, "ctr", "--namespace", "k8s.io"]
        with tempfile.TemporaryDirectory() as directory:
            archive = Path(directory, "images.tar")
            run(["docker", "save", "--output", archive, *references])
            _await_containerd(ctr)
            options = ["--no-unpack", "--label", "io.cri-containerd.pinned=pinned"]
            with archive.open("rb") as file:
                run([*ctr, "images", "import", *options, "-"], stdin=file, timeout=scaled(300))
        found = set(run([*ctr, "images", "list", "--quiet"]).split())
        if missing := sorted(set(references) - found):
            raise KindError(f"the node's containerd did not import {' '.join(missing)}")
        run(["docker", "stop", "--time", "10", name])
        entrypoint = 'ENTRYPOINT ["/usr/local/bin/entrypoint", "/sbin/init"]'
        changes = (entrypoint, "CMD []", f"LABEL {KEY_LABEL}={image.key}")
        run(["docker", "commit", *(word for change in changes for word in ("--change", change)), name, image.reference])
    finally:
        succeeds(["docker", "rm", "--force", "--volumes", name])


def _await_containerd(ctr: Sequence[str]) -> None:
    script = "for i in $(seq 100); do ctr version >/dev/null 2>&1 && exit 0; sleep 0.1; done; ctr version"
    run([*ctr[: ctr.index("ctr")], "sh", "-c", script], timeout=scaled(60))


def _kubernetes_links(target: Path, names: Sequence[str]) -> Path:
    """A directory with Kubernetes' program, and links to it by these names."""
    _link((parts.kubernetes_programs() / _KUBERNETES).resolve(), target / _KUBERNETES)
    for name in names:
        (target / name).symlink_to(_KUBERNETES)
    return target


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


@contextmanager
def _context(dockerfile: Path) -> Iterator[Path]:
    """A build context, on the cache's file system so that programs are linked, not copied."""
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache(), prefix=".context-") as directory:
        shutil.copyfile(dockerfile, Path(directory, "Dockerfile"))
        yield Path(directory)
