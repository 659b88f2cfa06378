"""Owns what is collected of a cluster in which something went wrong: kind's own collection, and the nodes' networking."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from hack.kind import parts
from hack.kind.cluster import Cluster
from hack.kind.command import environment, run
from hack.kind.places import KindError
from hack.kind.progress import say, step
from nodeproxy.sandbox.pace import scaled

# File name: a shell command in each node. ip_vs is told by /proc, which needs no program for it.
_IN_NODES: Final = {
    "iptables-nft.txt": "iptables-nft-save -c; ip6tables-nft-save -c",
    "iptables-legacy.txt": "iptables-legacy-save -c; ip6tables-legacy-save -c",
    "nftables.txt": "nft list ruleset",
    "ipset.txt": "ipset list",
    "ipvs.txt": "cat /proc/net/ip_vs; cat /proc/net/ip_vs_conn; cat /proc/net/ip_vs_stats",
    "conntrack.txt": "conntrack -L; conntrack -S",
    "addresses.txt": "ip address; ip route show table all; ip -6 route; ip rule; ip neighbour; ss -ltnup",
    "agent-metrics.txt": "curl -sS -m 5 http://127.0.0.1:10249/metrics",
    "agent-health.txt": "curl -sS -i -m 5 http://127.0.0.1:10256/healthz; curl -sS -i -m 5 http://127.0.0.1:10256/livez",
    "resolver.txt": "cat /etc/resolv.conf; getent ahosts $(hostname)",
}
_OBJECTS: Final = {
    "objects.txt": ("get", "nodes,services,endpointslices,pods,daemonsets,deployments", "-A", "-o", "wide"),
    "endpointslices.yaml": ("get", "services,endpointslices", "-A", "-o", "yaml"),
    "events.txt": ("get", "events", "-A", "--sort-by=.lastTimestamp"),
    "configmaps.yaml": ("get", "configmaps", "-n", "kube-system", "-o", "yaml"),
    "agents.txt": ("describe", "pods", "-n", "kube-system", "-l", "k8s-app=nodeproxy"),
    "rollouts.yaml": ("get", "proxyrollouts,proxynodes", "-o", "yaml"),
    "operator-logs.txt": ("logs", "-n", "kube-system", "-l", "k8s-app=nodeproxy-operator", "--prefix", "--tail=-1"),
    "agents-logs.txt": ("logs", "-n", "kube-system", "-l", "k8s-app=nodeproxy", "--prefix", "--tail=-1", "--timestamps"),
}


def collect(cluster: Cluster, directory: Path) -> None:
    """Write all that may tell what went wrong into `directory`; what cannot be had is noted there, not raised."""
    directory.mkdir(parents=True, exist_ok=True)
    with step(f"collecting logs in {directory}"), ThreadPoolExecutor(4) as pool:
        names = run(
            ["docker", "ps", "--filter", f"label=io.x-k8s.kind.cluster={cluster.name}", "--format", "{{.Names}}"]
        ).split()
        export = [str(parts.kind()), "export", "logs", "--name", cluster.name, str(directory)]
        work: list[Callable[[], None]] = [lambda: _write(directory / "kind-export.txt", export)]
        for name in names:
            for file, script in _IN_NODES.items():
                target, command = directory / "network" / name / file, ["docker", "exec", name, "sh", "-c", script]
                work.append(lambda target=target, command=command: _write(target, command))  # type: ignore[misc]
        kubectl = [str(parts.kubernetes_programs() / "kubectl"), "--kubeconfig", str(cluster.kubeconfig)]
        for file, arguments in _OBJECTS.items():
            target, command = directory / file, [*kubectl, "--request-timeout=20s", *arguments]
            work.append(lambda target=target, command=command: _write(target, command))  # type: ignore[misc]
        list(pool.map(lambda job: job(), work))


def try_to_collect(cluster: Cluster, directory: Path) -> None:
    """Collect, but let nothing that goes wrong here hide what went wrong before."""
    try:
        collect(cluster, directory)
    except (KindError, OSError) as error:
        say(f"logs were not collected: {error}")


def _write(target: Path, command: list[str]) -> None:
    """The output of a command as a file, whatever becomes of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w") as file:
        try:
            subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=scaled(120),
                env=environment(),
                check=False,
            )
        except subprocess.TimeoutExpired:
            file.write(f"\nnot done in time: {' '.join(command)}\n")
