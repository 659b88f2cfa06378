"""Owns the programs that a cluster is made of, built from their Go modules into the cache: kind, containerd, CNI, CoreDNS.

Kubernetes' own programs come from hack/controlplane/build.py. What is already on PATH is not used: versions are ours.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hack.controlplane import build as kubernetes
from hack.kind.command import run
from hack.kind.images import key
from hack.kind.places import HERE, KindError, built, cache
from hack.kind.progress import step

CONTAINERD: Final = "v2.3.7"
CNI: Final = "v1.9.1"
KIND: Final = "v0.33.0"
_MODULES: Final = HERE / "gomod"


@dataclass(frozen=True)
class Part:
    """Programs that are built together: packages as `path@version`, or the folder of a module in gomod/."""

    name: str
    packages: tuple[str, ...]
    module: Path | None = None
    stamps: str = ""

    @property
    def key(self) -> str:
        """The hash of what it is made of."""
        return key([platform.machine(), *self.packages, self.stamps, *([self.module] if self.module else [])])

    def build(self) -> Path:
        """The directory of the programs, built if the cache lacks it."""
        target = cache() / f"{self.name}-{self.key}"
        with built(target) as work:
            if work is not None:
                work.mkdir()
                with step(f"building {self.name} with Go"):
                    self._compile(work)
        return target

    def _compile(self, target: Path) -> None:
        env = {"CGO_ENABLED": "0", "GOWORK": "off", "GOFLAGS": "-buildvcs=false", "GOBIN": str(target)}
        flags = ["-trimpath", "-ldflags", f"-s -w {self.stamps}".strip()]
        if self.module is None:
            run([_go(), "install", *flags, *self.packages], env=env, cwd=Path("/"))
        else:
            run([_go(), "build", *flags, "-o", f"{target}/", *self.packages], env=env, cwd=self.module)


_CONTAINERD_MODULE: Final = "github.com/containerd/containerd/v2"
_CNI_PLUGINS: Final = ("main/bridge", "main/loopback", "ipam/host-local", "meta/portmap")

CONTAINERD_PART: Final = Part(
    "containerd",
    tuple(
        f"{_CONTAINERD_MODULE}/cmd/{program}@{CONTAINERD}" for program in ("containerd", "containerd-shim-runc-v2", "ctr")
    ),
    stamps=f"-X {_CONTAINERD_MODULE}/version.Version={CONTAINERD}",
)
CNI_PART: Final = Part(
    "cni-plugins",
    tuple(f"github.com/containernetworking/plugins/plugins/{plugin}@{CNI}" for plugin in _CNI_PLUGINS),
    stamps=f"-X github.com/containernetworking/plugins/pkg/utils/buildversion.BuildVersion={CNI}",
)
KIND_PART: Final = Part("kind", (f"sigs.k8s.io/kind@{KIND}",))
COREDNS_PART: Final = Part("coredns", (".",), module=_MODULES / "coredns")
CRICTL_PART: Final = Part("crictl", ("sigs.k8s.io/cri-tools/cmd/crictl",), module=_MODULES / "crictl")
PAUSE_PART: Final = Part("pause", (".",), module=_MODULES / "pause")


def kind() -> Path:
    """The program kind."""
    return KIND_PART.build() / "kind"


def coredns() -> Path:
    """The program coredns."""
    return COREDNS_PART.build() / "coredns"


def coredns_key() -> str:
    """The hash of what coredns is made of."""
    return COREDNS_PART.key


def kubernetes_programs() -> Path:
    """The directory of kubectl, kubeadm, kubelet and the others: links to one static program."""
    try:
        return kubernetes.build()
    except kubernetes.BuildError as error:
        raise KindError(str(error)) from error


def kubernetes_version() -> str:
    """As `v1.36.2`."""
    return kubernetes.version()


def tools() -> Sequence[Path]:
    """Directories for PATH: kind's, and that of kubectl and the other programs."""
    return [kind().parent, kubernetes_programs()]


def _go() -> str:
    go = shutil.which("go", path=f"{os.environ.get('PATH', '')}:/usr/local/go/bin")
    if go is None:
        raise KindError(
            "there is no `go` on PATH: kind and the node's programs are built from their Go modules. Unpack a release from "
            "Go's download page into /usr/local and put /usr/local/go/bin on PATH"
        )
    return go
