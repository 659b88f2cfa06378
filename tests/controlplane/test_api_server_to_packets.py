"""A Service made with the API is answered by its pods: through a real control plane, agent and kernel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hack.controlplane import ControlPlane
from hack.controlplane.load import node as node_object
from nodeproxy.sandbox.agent import AgentFlags, AgentProcess, nodeproxy_command
from nodeproxy.sandbox.client import Answered, Probe, Rejected, Verdict, probe_many
from nodeproxy.sandbox.topology import Sandbox

pytestmark = [pytest.mark.kernel, pytest.mark.controlplane]

NODE, NODE_ADDRESS = "test-node", "192.168.0.2"
POD_A, POD_B, CLIENT = "10.1.0.1", "10.1.0.2", "10.1.0.9"
COLLECTIONS = {
    "ServiceAccount": "/api/v1/namespaces/kube-system/serviceaccounts",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
}
DEPLOY = Path(__file__).parents[2] / "deploy"


class Node:
    """A node whose agent reads a real API server with the service account of deploy/base/rbac.yaml."""

    def __init__(self, box: Sandbox, cluster: ControlPlane) -> None:
        self.box = box
        self.cluster = cluster
        for document in yaml.safe_load_all((DEPLOY / "base" / "rbac.yaml").read_text()):
            cluster.request("POST", COLLECTIONS[document["kind"]], document)
        cluster.request("POST", "/api/v1/nodes", node_object(NODE, [NODE_ADDRESS]))
        kubeconfig = box.directory / "kubeconfig"
        cluster.service_account_access("kube-system", "nodeproxy").write_kubeconfig(kubeconfig)
        command = nodeproxy_command(AgentFlags(hostname=NODE), master="unused")
        position = command.index("--master")
        command[position : position + 2] = ["--kubeconfig", str(kubeconfig)]
        self.agent = AgentProcess(box, command)

    def pod(self, name: str, address: str, ready: bool = True) -> None:
        """A Pod object on this node whose status says what kubelet would say."""
        pods = "/api/v1/namespaces/default/pods"
        spec = {"nodeName": NODE, "containers": [{"name": "c", "image": "none"}], "automountServiceAccountToken": False}
        pod: dict[str, Any] = {"metadata": {"name": name, "labels": {"app": "web"}}, "spec": spec}
        self.cluster.request("POST", pods, {"apiVersion": "v1", "kind": "Pod", **pod})
        status = {
            "phase": "Running",
            "podIP": address,
            "podIPs": [{"ip": address}],
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        }
        patch = "application/merge-patch+json"
        self.cluster.request("PATCH", f"{pods}/{name}/status", {"status": status}, content_type=patch)

    def remove_pod(self, name: str) -> None:
        """Delete a Pod at once."""
        self.cluster.request("DELETE", f"/api/v1/namespaces/default/pods/{name}?gracePeriodSeconds=0")

    def service(self, **spec: Any) -> dict[str, Any]:
        """A Service `web` that selects the pods; returns it as the API server made it."""
        ports = [{"name": "http", "port": 80, "targetPort": 8080}]
        body = {"metadata": {"name": "web"}, "spec": {"selector": {"app": "web"}, "ports": ports, **spec}}
        made: dict[str, Any] = self.cluster.request(
            "POST", "/api/v1/namespaces/default/services", {"apiVersion": "v1", "kind": "Service", **body}
        )
        return made

    def ask(self, destination: str, port: int, count: int = 10) -> set[str | Verdict]:
        """Who answers a pod."""
        verdicts = probe_many(self.box.pods[CLIENT], [Probe(destination, port)] * count)
        return {verdict.name if isinstance(verdict, Answered) else verdict for verdict in verdicts}


@pytest.fixture
def node() -> Iterator[Node]:
    with Sandbox(node_addresses=[NODE_ADDRESS]) as box:
        for name, address in (("a", POD_A), ("b", POD_B), ("client", CLIENT)):
            box.serve(box.add_pod(address), address, 8080, name=name)
        with ControlPlane(netns=box.node.name, bind_address=NODE_ADDRESS, controller_manager=True) as cluster:
            yield Node(box, cluster)


def settle(done: Callable[[], bool], node: Node, what: str, timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not done():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}\n{node.agent.log_tail()}"
        time.sleep(0.1)


def test_from_the_api_server_to_packets(node: Node) -> None:
    with node.agent:
        made = node.service(type="NodePort")
        cluster_ip, node_port = made["spec"]["clusterIP"], made["spec"]["ports"][0]["nodePort"]
        settle(lambda: node.ask(cluster_ip, 80) == {Rejected()}, node, "a Service without endpoints is rejected")
        node.pod("a", POD_A)
        node.pod("b", POD_B)
        settle(lambda: node.ask(cluster_ip, 80) == {"a", "b"}, node, "both pods answer at the cluster IP")
        assert node.ask(NODE_ADDRESS, node_port) == {"a", "b"}
        # the API server's own Service: a pod reaches it through its cluster IP
        api = probe_many(node.box.pods[CLIENT], [Probe("10.96.0.1", 443)])
        assert api != [Rejected()]

        # the API server goes, traffic does not; what changed meanwhile is programmed once it is back
        node.cluster.kill_apiserver()
        assert node.ask(cluster_ip, 80, 50) == {"a", "b"}
        node.cluster.start_apiserver()
        node.remove_pod("a")
        settle(lambda: node.ask(cluster_ip, 80) == {"b"}, node, "only the pod that is left answers")
        node.cluster.request("DELETE", "/api/v1/namespaces/default/services/web")
        settle(lambda: "b" not in node.ask(cluster_ip, 80, 3), node, "the deleted Service answers no more")
    assert "Traceback" not in node.agent.log_text()


def test_the_role_holds_nothing_to_spare(node: Node) -> None:
    agent = node.cluster.service_account_access("kube-system", "nodeproxy")
    review = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews"
    kind = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview"}
    answer = agent.request("POST", review, {**kind, "spec": {"namespace": "default"}})
    ours = [rule for rule in answer["status"]["resourceRules"] if "authorization.k8s.io" not in rule["apiGroups"][0]]
    allowed = {
        (group, resource): set(rule["verbs"])
        for rule in ours
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        if group != "authentication.k8s.io"
    }
    assert allowed == {
        ("", "services"): {"list", "watch"},
        ("", "nodes"): {"list", "watch"},
        ("discovery.k8s.io", "endpointslices"): {"list", "watch"},
        ("events.k8s.io", "events"): {"create", "patch"},
        ("nodeproxy.io", "proxynodes"): {"list", "watch"},
        ("nodeproxy.io", "proxynodes/status"): {"patch"},
    }
