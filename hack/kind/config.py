"""Owns what a cluster is asked to be, as files: kind's configuration, the nodes' CNI configuration, their routes. Pure."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from hack.kind.images import key

DEFAULT_NAME: Final = "nodeproxy-e2e"
IP_FAMILIES: Final = ("ipv4", "dual")
PROXIES: Final = ("none", "iptables", "nftables", "ipvs")
_PATIENCE: Final = "10m0s"  # kubeadm's own limits suit a machine with nothing else to do
_TIMEOUTS: Final = (
    "controlPlaneComponentHealthCheck",
    "discovery",
    "etcdAPICall",
    "kubeletHealthCheck",
    "kubernetesAPICall",
    "tlsBootstrap",
    "upgradeManifests",
)


@dataclass(frozen=True)
class Shape:
    """A cluster: a control plane and `workers`, and which kube-proxy it starts with (`none`: ours comes later)."""

    name: str = DEFAULT_NAME
    workers: int = 2
    ip_family: str = "ipv4"
    kube_proxy: str = "none"

    @property
    def pod_subnets(self) -> tuple[str, ...]:
        """The addresses of pods; other clusters have others, so that the host can have routes to the pods of several."""
        number = 244 if self.name == DEFAULT_NAME else 128 + zlib.crc32(self.name.encode()) % 115
        return (f"10.{number}.0.0/16", f"fd00:10:{number:x}::/56")[: self._families]

    @property
    def service_subnets(self) -> tuple[str, ...]:
        """The addresses of Services."""
        return ("10.96.0.0/16", "fd00:10:96::/112")[: self._families]

    @property
    def _families(self) -> int:
        return 2 if self.ip_family == "dual" else 1

    def key(self, image_id: str, *more: Any) -> str:
        """A hash of all that makes the cluster what it is: one that was made with the same may be taken again."""
        return key([self.kind_config(), image_id, *more])

    def kind_config(self) -> str:
        """The configuration for `kind create cluster`."""
        roles = ["control-plane", *["worker"] * self.workers]
        return str(
            yaml.safe_dump(
                {
                    "kind": "Cluster",
                    "apiVersion": "kind.x-k8s.io/v1alpha4",
                    "name": self.name,
                    "networking": {
                        "ipFamily": self.ip_family,
                        "disableDefaultCNI": True,
                        "kubeProxyMode": self.kube_proxy,
                        "podSubnet": ",".join(self.pod_subnets),
                        "serviceSubnet": ",".join(self.service_subnets),
                    },
                    "nodes": [{"role": role, **_store(self.name, number)} for number, role in enumerate(roles)],
                    "kubeadmConfigPatches": [yaml.safe_dump(patch) for patch in _kubeadm_patches()],
                },
                sort_keys=False,
            )
        )


def _store(cluster: str, number: int) -> Mapping[str, Any]:
    """A node's containerd data made beforehand, with the images unpacked, where the environment says there is such."""
    place = Path(os.environ.get("NODEPROXY_NODE_STORES", "/nonexistent"), cluster, str(number))
    if not place.is_dir():
        return {}
    return {"extraMounts": [{"hostPath": str(place), "containerPath": "/var/lib/containerd"}]}


def _kubeadm_patches() -> Iterable[Mapping[str, Any]]:
    kubeadm = "kubeadm.k8s.io/v1beta4"
    timeouts = dict.fromkeys(_TIMEOUTS, _PATIENCE)
    yield {"apiVersion": kubeadm, "kind": "InitConfiguration", "timeouts": timeouts}
    yield {"apiVersion": kubeadm, "kind": "JoinConfiguration", "timeouts": timeouts}
    # There is one of each, and on a busy machine it would end itself for having been late; kind sets the provisioner.
    alone = {"name": "leader-elect", "value": "false"}
    manager = [{"name": "enable-hostpath-provisioner", "value": "true"}, alone]
    # Nobody needs the data of a cluster for tests after a power failure.
    no_fsync = [{"name": "unsafe-no-fsync", "value": "true"}]
    yield {
        "apiVersion": kubeadm,
        "kind": "ClusterConfiguration",
        "controllerManager": {"extraArgs": manager},
        "scheduler": {"extraArgs": [alone]},
        "etcd": {"local": {"extraArgs": no_fsync}},
    }
    yield {"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration", "failCgroupV1": False}


def cni_config(pod_subnets: Sequence[str]) -> str:
    """A node's CNI configuration: a bridge, on which a pod may reach itself by a Service, and nothing is masqueraded."""
    default_routes = [{"dst": "::/0" if ":" in subnet else "0.0.0.0/0"} for subnet in pod_subnets]
    ipam = {"type": "host-local", "ranges": [[{"subnet": subnet}] for subnet in pod_subnets], "routes": default_routes}
    bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "hairpinMode": True, "ipMasq": False, "ipam": ipam}
    host_ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    return json.dumps({"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, host_ports]}, indent=2)


def routes(node: str, pod_subnets: Mapping[str, Sequence[str]]) -> str:
    """What `node` has to know of the others' pods: a line `NODE SUBNET` for each subnet."""
    others = ((other, subnet) for other, subnets in pod_subnets.items() for subnet in subnets if other != node)
    return "".join(f"{other} {subnet}\n" for other, subnet in others)
