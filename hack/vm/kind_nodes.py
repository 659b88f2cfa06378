"""Owns what a kind cluster's nodes in the VM start from: a light node image, containerd's data with all images unpacked.

Unpacking at native speed here, once, instead of in every node of every cluster in the VM is what makes a cluster there fast.
hack/kind/config.py mounts `STORES`/CLUSTER/NUMBER into the nodes, if NODEPROXY_NODE_STORES says where they are.
"""

import os
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hack.vm.places import VmError

_DATA: Final = "/var/lib/containerd"
_LIGHT: Final = f"FROM %s\nRUN rm -rf {_DATA}\n"
_UNPACK: Final = """set -e
for i in $(seq 300); do ctr version >/dev/null 2>&1 && break; sleep 0.1; done
ctr -n k8s.io images import - >/dev/null
for image in $(ctr -n k8s.io images list -q | grep -v ^sha256:); do
  ctr -n k8s.io images mount "$image" /mnt >/dev/null && ctr -n k8s.io images unmount --rm /mnt >/dev/null
done
sync"""


@dataclass(frozen=True)
class Nodes:
    """The nodes of one cluster: their image, the images that each has, and how many there may be."""

    cluster: str
    image: str
    loaded: tuple[str, ...]
    count: int = 2

    @property
    def light_image(self) -> str:
        """The name of the node image without what is in the stores."""
        return f"{self.image}-vm"


def build_light_image(nodes: Nodes) -> None:
    """Have the light node image in the engine."""
    # Without BuildKit, which would not take the node image of this engine for one that exists.
    environment = {**os.environ, "DOCKER_BUILDKIT": "0"}
    _run(["docker", "build", "--quiet", "--tag", nodes.light_image, "-"], input=_LIGHT % nodes.image, env=environment)


def fill(nodes: Nodes, place: Path) -> None:
    """Make the stores below `place`, by the node image's own containerd."""
    first, *others = (place / nodes.cluster / str(number) for number in range(nodes.count))
    first.mkdir(parents=True)
    name = f"hack-vm-{uuid.uuid4().hex[:8]}"
    at_work = ["docker", "run", "--name", name, "--privileged", "--network", "none"]
    _run([*at_work, "--rm", "--volume", f"{first}:/store", "--entrypoint", "cp", nodes.image, "-a", f"{_DATA}/.", "/store/"])
    _run([*at_work, "--detach", "--volume", f"{first}:{_DATA}", "--entrypoint", "containerd", nodes.image])
    try:
        _unpack(name, nodes.loaded)
        _run(["docker", "stop", "--time", "10", name])
    finally:
        subprocess.run(["docker", "rm", "--force", "--volumes", name], capture_output=True, check=False)
    for other in others:
        _run(["cp", "-a", str(first), str(other)])


def _unpack(container: str, images: Sequence[str]) -> None:
    save = subprocess.Popen(["docker", "save", *images], stdout=subprocess.PIPE)
    command = ["docker", "exec", "--interactive", container, "sh", "-c", _UNPACK]
    done = subprocess.run(command, stdin=save.stdout, capture_output=True, text=True, check=False)
    if save.wait() or done.returncode:
        raise VmError(f"images could not be unpacked for the VM's nodes: {done.stdout}{done.stderr}")


def _run(command: Sequence[str], *, input: str | None = None, env: dict[str, str] | None = None) -> None:

    done = subprocess.run(command, input=input, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise VmError(f"{' '.join(command)} failed with status {done.returncode}: {done.stdout}{done.stderr}")
