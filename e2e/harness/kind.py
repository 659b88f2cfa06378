"""Owns bringing up the clusters that tests run against, by the command line of `hack.kind`, and taking them down again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from e2e.harness.settings import AGNHOST, MODE, PROXY
from e2e.harness.stage import remove_outside
from hack.kind.cluster import Cluster, existing


def hack_kind(*arguments: str) -> None:
    """Run a command of `hack.kind`; what it says is shown. Raises CalledProcessError."""
    subprocess.run([sys.executable, "-m", "hack.kind", *arguments], check=True)


def bring_up(name: str, *, workers: int = 2, ip_family: str = "ipv4", kube_proxy: str = "none") -> Cluster:
    """A cluster with the images of the tests and of the agent; one that is there already and fits is taken."""
    hack_kind("engine")
    remove_outside(name)  # it would keep the network of a cluster that is made anew
    hack_kind("image", "agnhost")
    hack_kind("image", "agent")
    shape = ("--workers", str(workers), "--ip-family", ip_family, "--kube-proxy", kube_proxy)
    hack_kind("up", "--name", name, *shape)
    for image in (AGNHOST, "nodeproxy:dev"):
        hack_kind("load", "--name", name, image)
    return existing(name)


def deploy(name: str) -> None:
    """Roll the agent out, in the mode of the suite."""
    hack_kind("deploy", "--name", name, "--mode", MODE)


def prepare(name: str, *, workers: int = 2) -> None:
    """The cluster of most tests, with the proxy that the suite is about."""
    bring_up(name, workers=workers, kube_proxy="none" if PROXY == "nodeproxy" else MODE)
    if PROXY == "nodeproxy":
        deploy(name)


def collect_logs(name: str, directory: Path) -> None:
    """What `hack.kind logs` collects of a cluster; trouble with it is told, and no more."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        hack_kind("logs", "--name", name, str(directory))
    except subprocess.CalledProcessError as error:
        print(f"no logs of {name}: {error}", file=sys.stderr)


def take_down(name: str) -> None:
    """Remove a cluster."""
    remove_outside(name)
    hack_kind("down", "--name", name)
