"""Owns the roll-out of nodeproxy to a cluster: deploy/overlays/MODE, told this cluster's API server and pod addresses; and
that of the operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import yaml

from hack.kind import images, loading
from hack.kind.agent_image import REFERENCE, agent_image
from hack.kind.cluster import Cluster
from hack.kind.config import Shape
from hack.kind.places import REPOSITORY
from hack.kind.progress import say, step
from nodeproxy.sandbox.pace import scaled

MODES: Final = ("iptables", "ipvs")
_MADE_OF: Final = "nodeproxy.io/made-of"
_NAMESPACE: Final = "kube-system"
_PORT: Final = 6443
_LIMIT: Final = 180.0


@dataclass(frozen=True)
class Facts:
    """What the manifests have to know of a cluster and of the engine."""

    api_server: str
    pod_subnets: Sequence[str]
    image_id: str


def deploy(cluster: Cluster, mode: str = "iptables") -> None:
    """Have nodeproxy of this clone in the cluster, in this mode, on every node; and wait until it and CoreDNS are ready."""
    agent_image()
    loading.load(cluster, [REFERENCE])
    rendered = cluster.kubectl("kustomize", str(REPOSITORY / "deploy" / "overlays" / mode))
    facts = Facts(cluster.control_plane_address, _pods(cluster), images.identity(REFERENCE))
    documents = list(adapted(yaml.safe_load_all(rendered), facts))
    with step(f"rolling out nodeproxy, mode {mode}"):
        cluster.kubectl("apply", "--filename", "-", input=yaml.safe_dump_all(documents))
        _roll_out(cluster, "daemonset/nodeproxy")
    with step("waiting for CoreDNS"):
        _wait_for_dns(cluster)


def deploy_operator(cluster: Cluster) -> None:
    """Have the roll-out operator of this clone in the cluster, its definitions and its probes; wait until they are ready.

    Pods of an earlier image are replaced, as their name for it is the same.
    """
    agent_image()
    loading.load(cluster, [REFERENCE])
    documents = list(yaml.safe_load_all(cluster.kubectl("kustomize", str(REPOSITORY / "deploy" / "operator"))))
    made_of = images.identity(REFERENCE)
    for document in documents:
        if document["kind"] == "Deployment":
            document["spec"]["template"]["metadata"].setdefault("annotations", {})[_MADE_OF] = images.key([made_of])
    with step("rolling out the operator"):
        cluster.kubectl(
            "apply", "--server-side", "--force-conflicts", "--filename", "-", input=yaml.safe_dump_all(documents)
        )
        definitions = ("crd/proxyrollouts.nodeproxy.io", "crd/proxynodes.nodeproxy.io")
        cluster.kubectl("wait", "--for=condition=Established", *definitions, f"--timeout={scaled(_LIMIT):.0f}s")
        for name in ("nodeproxy-operator", "nodeproxy-probe"):
            _roll_out(cluster, f"deployment/{name}")


def adapted(documents: Iterable[dict[str, Any]], facts: Facts) -> Iterable[dict[str, Any]]:
    """The manifests of deploy/ with a cluster's facts in them.

    Pods are told, by an annotation, the image and the configuration that they were made for: either may be another
    under the same name, and then they are to be replaced now.
    """
    data = {"host": facts.api_server, "port": str(_PORT)}
    metadata = {"name": "nodeproxy-apiserver", "namespace": _NAMESPACE, "labels": {"k8s-app": "nodeproxy"}}
    yield {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
    kept, made_of = list(documents), ""
    for document in kept:
        name = document["metadata"]["name"]
        if document["kind"] == "ConfigMap" and name == "nodeproxy":
            configuration = yaml.safe_load(document["data"]["config.conf"])
            configuration["clusterCIDR"] = ",".join(facts.pod_subnets)
            document["data"]["config.conf"] = yaml.safe_dump(configuration, sort_keys=False)
            made_of = images.key([facts.image_id, document["data"]["config.conf"], facts.api_server])
    for document in kept:
        if document["kind"] == "DaemonSet":
            document["spec"]["template"]["metadata"].setdefault("annotations", {})[_MADE_OF] = made_of
        yield document


def _pods(cluster: Cluster) -> tuple[str, ...]:
    return Shape(cluster.name, ip_family=cluster.ip_family).pod_subnets


def _roll_out(cluster: Cluster, what: str) -> None:
    limit = f"--timeout={scaled(_LIMIT):.0f}s"
    cluster.kubectl("rollout", "status", what, "--namespace", _NAMESPACE, limit)


def _wait_for_dns(cluster: Cluster) -> None:
    """CoreDNS has waited for its cluster IP with longer and longer pauses: pods that still wait are made anew."""
    select = ("--namespace", _NAMESPACE, "--selector", "k8s-app=kube-dns")
    ready = 'jsonpath={range .items[*]}{.metadata.name} {.status.conditions[?(@.type=="Ready")].status}{"\\n"}{end}'
    lines = cluster.kubectl("get", "pods", *select, "--output", ready).splitlines()
    waiting = [line.split()[0] for line in lines if line.split()[1:] != ["True"]]
    if waiting:
        say(f"CoreDNS waits for its next attempt: {len(waiting)} pods are made anew")
        cluster.kubectl("delete", "pods", "--namespace", _NAMESPACE, "--wait=false", *waiting)
    _roll_out(cluster, "deployment/coredns")
