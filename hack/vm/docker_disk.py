"""Owns the disk that Docker in the VM has its data on: made at native speed here, with images loaded, kept by their IDs.

A second dockerd works on the disk while it is mounted here; no VM writes to it: each has a copy-on-write file of its own.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hack.vm import debian, kind_nodes
from hack.vm.kind_nodes import Nodes
from hack.vm.places import VmError, built, cache

Report = Callable[[str], None]

NEEDS: Final = {
    "dockerd": "docker.io",
    "containerd": "containerd",
    "mke2fs": "e2fsprogs",
    "mount": "mount",
    "setpriv": "util-linux",
}
PLACE: Final = "/var/lib/docker"
"""Where the VM mounts it."""
STORES: Final = "node-stores"
"""The folder in it with the data of the nodes' containerd."""

_SIZE: Final = 24 << 30  # sparse: what is not written takes no room
_FORMAT: Final = "2"  # of what is made below
_START_LIMIT: Final = 60.0
_KEY_LENGTH: Final = 16


@dataclass(frozen=True)
class Content:
    """Images of this machine's Docker engine, and the nodes of a kind cluster.

    Those in `may_be_older` change often and are soon loaded in the VM: a disk that has another of the name will do.
    """

    images: tuple[str, ...] = ()
    nodes: Nodes | None = None
    may_be_older: tuple[str, ...] = ()

    def key(self) -> str:
        """What the content is made of: the images by their IDs."""
        references = {*self.images, *((self.nodes.image, *self.nodes.loaded) if self.nodes else ())}
        known = sorted((image, "" if image in self.may_be_older else _id_of(image)) for image in references)
        recipe = (_FORMAT, _SIZE, known, self, Path(kind_nodes.__file__).read_text())
        return hashlib.sha256(repr(recipe).encode()).hexdigest()[:_KEY_LENGTH]


def disk(content: Content, report: Report) -> Path:
    """A disk with this content, out of the cache or made now; others for the same purpose go, unless a VM has them open."""
    debian.need(NEEDS, report)
    purpose = f"docker-{content.nodes.cluster if content.nodes else 'images'}"
    target = cache() / f"{purpose}-{content.key()}"
    with built(target) as work:
        if work is not None:
            report("making the disk for Docker")
            _make(work, content)
    for old in cache().glob(f"{purpose}-{'[0-9a-f]' * _KEY_LENGTH}/disk"):
        if old.parent != target and not _open_somewhere(old):
            shutil.rmtree(old.parent, ignore_errors=True)
    return target / "disk"


def _id_of(image: str) -> str:
    done = subprocess.run(
        ["docker", "image", "inspect", "--format", "{{.Id}}", image], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise VmError(f"this machine's Docker engine has no image {image}: {done.stderr.strip()}")
    return done.stdout.strip()


def _make(work: Path, content: Content) -> None:
    images = list(content.images)
    if content.nodes:
        kind_nodes.build_light_image(content.nodes)
        images.append(content.nodes.light_image)
    file = work / "disk"
    with file.open("wb") as handle:
        handle.truncate(_SIZE)
    # 128 bytes an inode would do, but not beyond 2038; few inodes: an image has some ten thousand files.
    _run(["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-N", "1000000", "-m", "0", str(file)])
    place = work / "mounted"
    place.mkdir()
    _run(["mount", "-o", "loop,noatime", str(file), str(place)])
    try:
        with ThreadPoolExecutor() as pool:
            work_to_do = [pool.submit(_load, images, place)] if images else []
            if content.nodes:
                work_to_do.append(pool.submit(kind_nodes.fill, content.nodes, place / STORES))
            for each in work_to_do:
                each.result()
    finally:
        _run(["umount", str(place)])
    place.rmdir()


@contextlib.contextmanager
def _engine(root: Path) -> Iterator[str]:
    """A dockerd of our own with its data below `root`, which starts nothing and touches no packet filter: its address."""
    with tempfile.TemporaryDirectory(prefix="hack-vm-docker-") as name:
        folder = Path(name)
        socket = f"unix://{folder}/socket"
        arguments = [  # a network of its own: with --bridge=none, dockerd removes the docker0 of the machine's engine
            "unshare", "--net", "setpriv", "--pdeathsig", "TERM", "dockerd", "--config-file", str(folder / "none"),
            "--data-root", str(root), "--exec-root", str(folder / "exec"), "--pidfile", str(folder / "pid"),
            "--host", socket, "--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=overlay2",
        ]  # fmt: skip
        (folder / "none").write_text("{}")
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            _await(process, socket, folder / "log")
            yield socket
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await(process: subprocess.Popen[bytes], socket: str, log: Path) -> None:
    until = time.monotonic() + _START_LIMIT
    command = ["docker", "--host", socket, "version"]
    while subprocess.run(command, capture_output=True, check=False).returncode:
        if process.poll() is not None or time.monotonic() > until:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
            raise VmError(f"dockerd for the VM's disk does not start:\n{last}")
        time.sleep(0.1)


def _load(images: Sequence[str], root: Path) -> None:
    """Copy images of this machine's engine to one with its data below `root`."""
    with _engine(root) as socket:
        _copy(images, socket)


def _copy(images: Sequence[str], socket: str) -> None:
    save = subprocess.Popen(["docker", "save", *images], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    load = subprocess.run(
        ["docker", "--host", socket, "load"], stdin=save.stdout, capture_output=True, text=True, check=False
    )
    _, said = save.communicate()
    if save.returncode or load.returncode:
        raise VmError(f"images could not be copied to the VM's disk: {said.decode(errors='replace')}{load.stderr}")


def _open_somewhere(file: Path) -> bool:
    """Whether a process has a file open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link) == str(file):  # noqa: PTH115 - Path.readlink() is much slower for so many
                return True
    return False


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise VmError(f"{' '.join(command)} failed with status {done.returncode}: {done.stderr.strip()}")
