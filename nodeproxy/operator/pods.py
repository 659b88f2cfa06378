"""Owns the pods that the operator makes: probes on two nodes, and the cleanup of a node that kube-proxy serves again."""

from __future__ import annotations

from typing import Any, Final

from nodeproxy.api.proxy_node import API_VERSION
from nodeproxy.operator.api import ProxyRollout
from nodeproxy.operator.probe import Destination

VERIFICATION_LABEL: Final = "nodeproxy.io/verification"
CLEANUP_LABEL: Final = "app.kubernetes.io/name"
CLEANUP_NAME: Final = "nodeproxy-cleanup"
NODE_ANNOTATION: Final = "nodeproxy.io/node"
_XTABLES_LOCK: Final = "/run/xtables.lock"


def probe_pod(
    name: str, verification: str, node: str, destinations: list[Destination], *, image: str, rollout: ProxyRollout
) -> dict[str, Any]:
    """A pod on one node that connects, and leaves what became of it in its termination message."""
    probes = rollout.spec.checks.probes
    args = ["probe", f"--count={probes.count}", f"--timeout={probes.timeout_seconds:g}s"]
    args += [f"--{'named' if one.named else 'target'}={one}" for one in destinations]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "labels": {"k8s-app": "nodeproxy-probe-client", VERIFICATION_LABEL: verification},
            "ownerReferences": [owner(rollout)],
        },
        "spec": {
            "nodeName": node,
            "restartPolicy": "Never",
            "activeDeadlineSeconds": rollout.spec.timeouts.verification_seconds,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": 0,
            "tolerations": [{"operator": "Exists"}],
            "containers": [
                {
                    "name": "probe",
                    "image": image,
                    "args": args,
                    "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}},
                    "securityContext": {
                        "runAsUser": 65534,
                        "runAsGroup": 65534,
                        "runAsNonRoot": True,
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                }
            ],
        },
    }


def owner(rollout: ProxyRollout) -> dict[str, Any]:
    """What belongs to a roll-out goes with it, also where no operator runs."""
    meta = rollout.metadata
    return {"apiVersion": API_VERSION, "kind": "ProxyRollout", "name": meta.name, "uid": meta.uid or ""}


def cleanup_pod(node: str, image: str, drain_seconds: float, rollout: ProxyRollout) -> dict[str, Any]:
    """As deploy/migration/cleanup.yaml (a test compares them), but that it waits for connections only so long."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": cleanup_name(node),
            "labels": {CLEANUP_LABEL: CLEANUP_NAME},
            "annotations": {NODE_ANNOTATION: node},
            "ownerReferences": [owner(rollout)],
        },
        "spec": {
            "nodeName": node,
            "hostNetwork": True,
            "restartPolicy": "OnFailure",
            "automountServiceAccountToken": False,
            "priorityClassName": "system-node-critical",
            "tolerations": [{"operator": "Exists"}],
            "containers": [
                {
                    "name": "cleanup",
                    "image": image,
                    "args": ["cleanup", f"--ipvs-drain-timeout={drain_seconds:g}s"],
                    "securityContext": {
                        "runAsUser": 0,
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"]},
                        "seccompProfile": {"type": "RuntimeDefault"},
                        "seLinuxOptions": {"type": "spc_t"},
                    },
                    "volumeMounts": [{"name": "xtables-lock", "mountPath": _XTABLES_LOCK}],
                }
            ],
            "volumes": [{"name": "xtables-lock", "hostPath": {"path": _XTABLES_LOCK, "type": "FileOrCreate"}}],
        },
    }


def cleanup_name(node: str) -> str:
    """Name of the pod."""
    return f"{CLEANUP_NAME}-{node}"[:253]
