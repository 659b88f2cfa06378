"""An agent does what its ProxyNode says, and answers: on a real API server and kernel, with the rights of deploy/."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from structlog.testing import capture_logs

from hack.controlplane import ControlPlane
from hack.controlplane.access import Access, ApiError
from hack.controlplane.load import node as node_object
from nodeproxy.api.proxy_node import ProxyNode
from nodeproxy.sandbox.agent import AgentFlags, AgentProcess, nodeproxy_command
from nodeproxy.sandbox.pace import scaled
from nodeproxy.sandbox.topology import Sandbox
from nodeproxy.source.apiserver import proxy_nodes
from nodeproxy.source.apiserver.credentials import Credentials
from nodeproxy.source.apiserver.proxy_nodes import ProxyNodes
from tests.ways import lacks_ipvs, needs_ipvs

pytestmark = [pytest.mark.kernel, pytest.mark.controlplane]

NODE, NODE_ADDRESS = "test-node", "192.168.0.2"
DEPLOY = Path(__file__).parents[2] / "deploy"
MERGE = "application/merge-patch+json"
PROXY_NODES = "/apis/nodeproxy.io/v1alpha1/proxynodes"
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
ADMISSION = "/apis/admissionregistration.k8s.io/v1"
COLLECTIONS = {
    "ServiceAccount": "/api/v1/namespaces/kube-system/serviceaccounts",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    "ValidatingAdmissionPolicy": f"{ADMISSION}/validatingadmissionpolicies",
    "ValidatingAdmissionPolicyBinding": f"{ADMISSION}/validatingadmissionpolicybindings",
}


def agent_access(cluster: ControlPlane, node: str) -> Access:
    """The credentials that kubelet of a node gives to the agent's pod there."""
    pods = "/api/v1/namespaces/kube-system/pods"
    spec = {"serviceAccountName": "nodeproxy", "nodeName": node, "containers": [{"name": "c", "image": "none"}]}
    pod = cluster.request("POST", pods, {"metadata": {"name": f"agent-{node}"}, "spec": spec})
    reference = {"apiVersion": "v1", "kind": "Pod", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
    path = "/api/v1/namespaces/kube-system/serviceaccounts/nodeproxy/token"
    answer = cluster.request("POST", path, {"spec": {"boundObjectRef": reference}})
    admin = cluster.access
    return Access(url=admin.url, ca=admin.ca, token=answer["status"]["token"], netns=admin.netns)


def define(cluster: ControlPlane) -> None:
    """Install the CRD of ProxyNodes, and wait until they are served."""
    definition = yaml.safe_load((DEPLOY / "operator" / "crds" / "proxynodes.yaml").read_text())
    cluster.request("POST", DEFINITIONS, definition)
    deadline = time.monotonic() + scaled(20)
    while True:
        try:
            cluster.request("GET", PROXY_NODES)
        except ApiError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        else:
            return


class Place:
    """A node, its agent with a configuration file, and a control plane."""

    def __init__(self, box: Sandbox, cluster: ControlPlane) -> None:
        self.box = box
        self.cluster = cluster
        for path in ("base/rbac.yaml", "operator/proxynode-status-policy.yaml"):
            for document in yaml.safe_load_all((DEPLOY / path).read_text()):
                cluster.request("POST", COLLECTIONS[document["kind"]], document)
        cluster.request("POST", "/api/v1/nodes", node_object(NODE, [NODE_ADDRESS]))
        self.kubeconfig = box.directory / "kubeconfig"
        agent_access(cluster, NODE).write_kubeconfig(self.kubeconfig)
        self.file = box.directory / "config.conf"
        self.configure()
        command = nodeproxy_command(AgentFlags(hostname=NODE), master="unused")
        own = ["--config", str(self.file), "--hostname-override", NODE]
        self.agent = AgentProcess(box, [command[0], "run", *own, "-v", "4"])

    def configure(self, **fields: Any) -> None:
        """Write the agent's own configuration file."""
        document = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clusterCIDR": "10.0.0.0/8",
            "conntrack": {"maxPerCore": 0},
            "healthzBindAddress": "127.0.0.1:10256",
            "clientConnection": {"kubeconfig": str(self.kubeconfig)},
            **fields,
        }
        self.file.write_text(yaml.safe_dump(document))

    def define(self) -> None:
        """Install the CRD of ProxyNodes."""
        define(self.cluster)

    def tell(self, **spec: Any) -> None:
        """Make the ProxyNode, which says this."""
        body = {"apiVersion": "nodeproxy.io/v1alpha1", "kind": "ProxyNode", "metadata": {"name": NODE}, "spec": spec}
        self.cluster.request("POST", PROXY_NODES, body)

    def change(self, **spec: Any) -> None:
        """Change fields of the spec."""
        self.cluster.request("PATCH", f"{PROXY_NODES}/{NODE}", {"spec": spec}, content_type=MERGE)

    def object(self) -> Any:
        return self.cluster.request("GET", f"{PROXY_NODES}/{NODE}")

    def answer(self, verification: str) -> Any:
        """The status with the answer to a verification."""
        found: Any = {}

        def answered() -> bool:
            found.update(self.object())
            return bool(found.get("status", {}).get("verification", {}).get("id") == verification)

        self.settle(answered, f"verification {verification} is answered")
        assert found["status"]["observedGeneration"] == found["metadata"]["generation"]
        return found["status"]

    def rules(self) -> str:
        """The agent's rules."""
        return self.box.node.run(_save)

    def masquerades_all(self) -> bool:
        """Whether everything to a cluster IP is masqueraded, as `masqueradeAll` says."""
        services = [line for line in self.rules().splitlines() if "-j KUBE-MARK-MASQ" in line and "! -s" not in line]
        return any("10.96." in line for line in services)

    def settle(self, done: Callable[[], bool], what: str, timeout: float = 20) -> None:
        deadline = time.monotonic() + scaled(timeout)
        while not done():
            assert time.monotonic() < deadline, f"not within {timeout} s: {what}\n{self.agent.log_tail()}"
            time.sleep(0.1)


def _save() -> str:
    return subprocess.run(["iptables-save"], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def place() -> Iterator[Place]:
    with (
        Sandbox(node_addresses=[NODE_ADDRESS]) as box,
        ControlPlane(netns=box.node.name, bind_address=NODE_ADDRESS) as cluster,
    ):
        yield Place(box, cluster)


def test_it_does_what_it_is_told_and_answers(place: Place) -> None:
    """From before its start on, through changes of the object and of its own file, until the object goes."""
    place.define()
    place.tell(configuration={"iptables": {"masqueradeAll": True}}, verification="one")
    with place.agent:
        status = place.answer("one")
        assert (status["mode"], status["inSync"], status["audit"]["clean"]) == ("iptables", True, True)
        assert "message" not in status
        assert place.masquerades_all()

        # its own file changes what the object leaves open
        place.configure(nodePortAddresses=["192.0.2.0/24"], iptables={"masqueradeAll": False})
        place.settle(lambda: "192.0.2.0/24" in place.rules(), "node ports are where the file says")
        assert place.masquerades_all()

        # the object changes; what cannot be is told, and what was in force stays
        place.change(configuration={"iptables": {"masqueradeAll": None, "masqueradeBit": 20}}, verification="two")
        assert "message" not in place.answer("two")
        assert "0x100000" in place.rules()
        assert not place.masquerades_all()
        place.change(configuration={"clusterCIDR": "10.0.0.0/8,10.1.0.0/16"}, verification="three")
        status = place.answer("three")
        assert status["message"] == "spec.configuration.clusterCIDR: at most one CIDR for each IP family"
        assert "0x100000" in place.rules()

        # a restart answers nothing anew, and says the same of the object
        before = place.object()["status"]
        place.agent.stop()
        place.agent.start()
        place.agent.wait_ready()
        place.settle(lambda: "is not in force" in place.agent.log_tail(10), "the object is read")
        assert place.object()["status"] == before

        place.cluster.request("DELETE", f"{PROXY_NODES}/{NODE}")
        place.settle(lambda: "0x100000" not in place.rules(), "its own configuration is in force again")
        assert "192.0.2.0/24" in place.rules()
    assert "Traceback" not in place.agent.log_text()


@needs_ipvs
def test_the_mode_is_what_it_says(place: Place) -> None:
    """From the start on, and while it runs: each mode is verified, and the other one's rules go."""
    place.define()
    place.tell(mode="ipvs", verification="one")
    with place.agent:
        status = place.answer("one")
        assert (status["mode"], status["inSync"], status["audit"]["clean"]) == ("ipvs", True, True)
        assert "-j DNAT" not in place.rules()
        assert "mode switched" not in place.agent.log_text()
        place.change(mode="iptables", verification="two")
        status = place.answer("two")
        assert (status["mode"], status["inSync"], status["audit"]["clean"]) == ("iptables", True, True)
        assert "-j DNAT" in place.rules()
        place.change(mode="ipvs", verification="three")
        assert place.answer("three")["mode"] == "ipvs"
        place.cluster.request("DELETE", f"{PROXY_NODES}/{NODE}")
        place.settle(lambda: "-j DNAT" in place.rules(), "its own mode is in force again", 60)
    assert "Traceback" not in place.agent.log_text()


@pytest.mark.skipif(not lacks_ipvs(), reason="this kernel has IPVS")
def test_a_mode_that_cannot_be_had(place: Place) -> None:
    """IPVS mode without IPVS in the kernel: told while it runs and before it starts, the agent serves and says why not."""
    place.define()
    place.tell(mode="ipvs", verification="one")
    with place.agent:
        status = place.answer("one")
        assert (status["mode"], status["inSync"], status["audit"]["clean"]) == ("iptables", True, True)
        assert "ip_vs" in status["message"]
        assert "KUBE-SERVICES" in place.rules()
        place.configure(nodePortAddresses=["192.0.2.0/24"])
        place.settle(lambda: "192.0.2.0/24" in place.rules(), "its own file still counts")

        place.change(mode="iptables", verification="two")
        assert "message" not in place.answer("two")
        place.change(mode="ipvs", verification="three")
        assert place.answer("three")["message"] == status["message"]
    assert "Traceback" not in place.agent.log_text()


class Followed:
    """What a ProxyNode was seen as, with the rights of an agent."""

    def __init__(self, cluster: ControlPlane, kubeconfig: Path, name: str) -> None:
        agent_access(cluster, name).write_kubeconfig(kubeconfig)
        self.nodes = ProxyNodes(Credentials(kubeconfig), name)
        self.seen: list[ProxyNode | None] = []

    async def until(self, done: Callable[[ProxyNode | None], bool]) -> ProxyNode | None:
        async with asyncio.timeout(scaled(70)):  # between two tries are up to 30 s
            while not self.seen or not done(self.seen[-1]):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        return self.seen[-1]


@pytest.fixture
def cluster() -> Iterator[ControlPlane]:
    with ControlPlane() as made:
        yield made


async def test_what_the_server_has_is_followed(
    cluster: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rights, no such resource, one that comes, changes and goes, and a server that is away meanwhile."""
    for seconds in ("_SOON_SECONDS", "_ABSENT_SECONDS"):
        monkeypatch.setattr(proxy_nodes, seconds, (0.2, 0.3))
    monkeypatch.setattr(proxy_nodes, "_CONFIRM_SECONDS", 0.2)

    def call(method: str, path: str, body: Any = None, content_type: str = "application/json") -> Awaitable[Any]:
        return asyncio.to_thread(cluster.request, method, path, body, content_type=content_type)

    await call("POST", COLLECTIONS["ServiceAccount"], {"metadata": {"name": "nodeproxy"}})
    followed = Followed(cluster, tmp_path / "kubeconfig", NODE)
    with capture_logs() as log:
        task = asyncio.create_task(followed.nodes.follow(followed.seen.append))
        assert await followed.nodes.look() is None
        await asyncio.sleep(1)
        for document in yaml.safe_load_all((DEPLOY / "base" / "rbac.yaml").read_text()):
            if document["kind"] != "ServiceAccount":
                await call("POST", COLLECTIONS[document["kind"]], document)
        await asyncio.sleep(1)
        assert await followed.nodes.look() is None
        assert followed.seen == []
        await call("POST", DEFINITIONS, yaml.safe_load((DEPLOY / "operator" / "crds" / "proxynodes.yaml").read_text()))
        await followed.until(lambda node: node is None)
        body = {
            "apiVersion": "nodeproxy.io/v1alpha1",
            "kind": "ProxyNode",
            "metadata": {"name": NODE},
            "spec": {"mode": "ipvs"},
        }
        await call("POST", PROXY_NODES, body)
        await followed.until(lambda node: node is not None and node.spec.mode == "ipvs")
        other = body | {"metadata": {"name": "other"}}
        await call("POST", PROXY_NODES, other)
        await asyncio.to_thread(cluster.kill_apiserver)
        await asyncio.to_thread(cluster.start_apiserver)
        await call("PATCH", f"{PROXY_NODES}/{NODE}", {"spec": {"verification": "v"}}, MERGE)
        await followed.until(lambda node: node is not None and node.spec.verification == "v")
        written = await followed.nodes.write_status({"mode": "ipvs", "message": None})
        assert (written.status.mode, written.metadata.generation) == ("ipvs", 2)
        await call("DELETE", DEFINITIONS + "/proxynodes.nodeproxy.io")
        await followed.until(lambda node: node is None)
        assert {node.metadata.name for node in followed.seen if node is not None} == {NODE}
        task.cancel()
    said = [(entry["log_level"], entry["event"]) for entry in log]
    # For each change, not for each of many attempts: one that has just started knows neither all rights nor resources yet.
    assert 1 <= said.count(("info", "may not read ProxyNodes, so that no roll-out reaches this node")) <= 3
    assert 1 <= said.count(("debug", "the API server has no ProxyNodes")) <= 3
    assert not [entry for entry in said if entry[0] in ("warning", "error")]


def test_an_agent_writes_the_status_of_its_own_node_only(cluster: ControlPlane) -> None:
    for path in ("base/rbac.yaml", "operator/proxynode-status-policy.yaml"):
        for document in yaml.safe_load_all((DEPLOY / path).read_text()):
            cluster.request("POST", COLLECTIONS[document["kind"]], document)
    define(cluster)
    for name in ("one", "two"):
        body = {"apiVersion": "nodeproxy.io/v1alpha1", "kind": "ProxyNode", "metadata": {"name": name}}
        cluster.request("POST", PROXY_NODES, body)
    agent = agent_access(cluster, "one")
    unbound = cluster.service_account_access("kube-system", "nodeproxy")
    status = {"status": {"mode": "iptables"}}

    def write(access: Access, path: str, body: Any = status) -> str:
        try:
            access.request("PATCH", f"{PROXY_NODES}/{path}", body, content_type=MERGE)
        except ApiError as error:
            return str(error)
        return "written"

    deadline = time.monotonic() + scaled(20)
    while "the agent of another node" not in (said := write(agent, "two/status")):  # a policy counts a moment later
        assert time.monotonic() < deadline, said
        time.sleep(0.2)
    assert "the agent of another node" in write(unbound, "one/status")
    assert write(agent, "one/status") == "written"
    assert "cannot patch" in write(agent, "one", {"spec": {"mode": "ipvs"}})
