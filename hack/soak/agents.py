"""Owns the programs that run on the node of a load test: nodeproxy with flags, nodeproxy with a configuration file that is
rewritten, and kube-proxy by path."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Final

from hack.controlplane import build
from hack.soak.cluster import CLUSTER_CIDRS, NODE
from hack.soak.feeds import Feed
from nodeproxy.sandbox.agent import (
    HEALTHZ,
    METRICS,
    AgentError,
    AgentFlags,
    AgentProcess,
    Variant,
    http_get,
    kube_proxy_command,
    variant_environment,
)
from nodeproxy.sandbox.pace import scaled
from nodeproxy.sandbox.topology import Sandbox

KUBE_PROXY_SYNCED: Final = "kubeproxy_sync_proxy_rules_last_timestamp_seconds"
_ENVIRONMENT: Final = {"PYTHONFAULTHANDLER": "1"}  # where it crashes or hangs, its log says where
_NODEPROXY: Final = str(Path(sys.executable).with_name("nodeproxy"))


def flags_of(mode: str) -> AgentFlags:
    """What nodeproxy and kube-proxy are told alike."""
    return AgentFlags(hostname=NODE, mode=mode, cluster_cidr=CLUSTER_CIDRS)


def nodeproxy(box: Sandbox, feed: Feed, mode: str, variant: Variant) -> AgentProcess:
    """nodeproxy with flags."""
    command = [_NODEPROXY, "run", "--mode", mode, *feed.flags(), "--iptables-variant", variant]
    return AgentProcess(box, [*command, *flags_of(mode).arguments()], environment=_ENVIRONMENT, name="nodeproxy")


def write_config(file: Path, mode: str) -> None:
    """A configuration file as kubeadm writes it, moved into place."""
    config = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": mode,
        "hostnameOverride": NODE,
        "clusterCIDR": CLUSTER_CIDRS,
        "detectLocalMode": "ClusterCIDR",
        "nodePortAddresses": ["0.0.0.0/0"],
        "healthzBindAddress": HEALTHZ,
        "metricsBindAddress": METRICS,
        "conntrack": {"maxPerCore": 0, "min": 0},
        "iptables": {"minSyncPeriod": "0s", "syncPeriod": "30s"},
        "ipvs": {"minSyncPeriod": "0s", "syncPeriod": "30s"},
    }
    draft = file.with_suffix(".tmp")
    draft.write_text(json.dumps(config, indent=1))
    draft.rename(file)


def configured_nodeproxy(box: Sandbox, feed: Feed, file: Path, variant: Variant) -> AgentProcess:
    """nodeproxy with a configuration file."""
    command = [_NODEPROXY, "run", "--config", str(file), *feed.flags(), "--iptables-variant", variant]
    return AgentProcess(box, command, environment=_ENVIRONMENT, name="nodeproxy")


def wait_mode(agent: AgentProcess, mode: str, timeout: float) -> float:
    """Wait until a running agent says that it is in a mode; the seconds it took. Raises AgentError."""
    start = time.monotonic()
    while time.monotonic() - start < scaled(timeout):
        if not agent.running():
            raise AgentError(f"the agent ended\n{agent.log_tail()}")
        if http_get(agent.node, f"http://{METRICS}/proxyMode") == (200, mode):
            return time.monotonic() - start
        time.sleep(0.02)
    raise AgentError(f"not in mode {mode} after {timeout:g} s\n{agent.log_tail()}")


def kube_proxy_binary() -> Path | None:
    """The kube-proxy of this machine, if it can be run."""
    found = build.kube_proxy()
    return found if found is not None and os.access(found, os.X_OK) else None


def kube_proxy(box: Sandbox, feed: Feed, binary: Path, mode: str, variant: Variant) -> AgentProcess:
    """kube-proxy, which needs an API server."""
    command = kube_proxy_command(binary, flags_of(mode), master=feed.flags()[1])
    return AgentProcess(box, command, environment=variant_environment(box, variant), name="kube-proxy")
