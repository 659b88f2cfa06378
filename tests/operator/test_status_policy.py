"""An agent writes the status of its own ProxyNode and of no other one, whichever namespace the agents are in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import yaml

from hack.controlplane import ControlPlane
from hack.controlplane.access import Access, ApiError
from nodeproxy.sandbox.pace import scaled
from tests.operator.conftest import DEPLOY
from tests.operator.fleet import MERGE, PROXY_NODES, eventually

pytestmark = pytest.mark.controlplane
ADMISSION = "/apis/admissionregistration.k8s.io/v1"
COLLECTIONS = {
    "ValidatingAdmissionPolicy": f"{ADMISSION}/validatingadmissionpolicies",
    "ValidatingAdmissionPolicyBinding": f"{ADMISSION}/validatingadmissionpolicybindings",
}
ROLES, BINDINGS = (f"/apis/rbac.authorization.k8s.io/v1/{one}" for one in ("clusterroles", "clusterrolebindings"))
FORBIDDEN = "the agent of another node, or one without a pod's token"


def agent(cluster: ControlPlane, namespace: str) -> Access:
    """The credentials of the agent's pod on n0, in a namespace of that name, which is made."""
    cluster.request("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
    base = f"/api/v1/namespaces/{namespace}"
    cluster.request("POST", f"{base}/serviceaccounts", {"metadata": {"name": "nodeproxy"}})
    spec = {"serviceAccountName": "nodeproxy", "nodeName": "n0", "containers": [{"name": "c", "image": "none"}]}
    pod = cluster.request("POST", f"{base}/pods", {"metadata": {"name": "agent"}, "spec": spec})
    reference = {"apiVersion": "v1", "kind": "Pod", "name": "agent", "uid": pod["metadata"]["uid"]}
    body = {"spec": {"boundObjectRef": reference}}
    answer = cluster.request("POST", f"{base}/serviceaccounts/nodeproxy/token", body)
    return Access(url=cluster.url, ca=cluster.access.ca, token=answer["status"]["token"], netns=cluster.access.netns)


def test_an_agent_of_another_namespace_keeps_to_its_own(cluster: ControlPlane) -> None:
    documents = list(yaml.safe_load_all((DEPLOY / "operator" / "proxynode-status-policy.yaml").read_text()))
    for name in ("n0", "n1"):
        body = {"apiVersion": "nodeproxy.io/v1alpha1", "kind": "ProxyNode", "metadata": {"name": name}}
        cluster.request("POST", PROXY_NODES, body)
    rules = [{"apiGroups": ["nodeproxy.io"], "resources": ["proxynodes/status"], "verbs": ["patch"]}]
    cluster.request("POST", ROLES, {"metadata": {"name": "agents"}, "rules": rules})
    subject = {"kind": "ServiceAccount", "name": "nodeproxy", "namespace": "proxies"}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "agents"}
    cluster.request("POST", BINDINGS, {"metadata": {"name": "agents"}, "roleRef": role, "subjects": [subject]})
    access = agent(cluster, "proxies")
    write = _writer(access)
    try:
        eventually(lambda: write("n1") == "written", "its rights are known", scaled(20))
        for document in documents:
            cluster.request("POST", COLLECTIONS[document["kind"]], document)
        eventually(lambda: FORBIDDEN in write("n1"), "the policy counts", scaled(20))
        assert write("n0") == "written"
    finally:
        for document in reversed(documents):
            cluster.request("DELETE", f"{COLLECTIONS[document['kind']]}/{document['metadata']['name']}")
        for name in ("n0", "n1"):
            cluster.request("DELETE", f"{PROXY_NODES}/{name}")


def _writer(access: Access) -> Callable[[str], str]:
    """Writes the status of a ProxyNode each time; what came of it."""

    def write(name: str) -> str:
        body = {"status": {"mode": "iptables", "message": None}}
        try:
            access.request("PATCH", f"{PROXY_NODES}/{name}/status", body, content_type=MERGE)
        except ApiError as error:
            return str(error)
        return "written"

    return write
