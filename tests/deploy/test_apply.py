"""The manifests on a real API server, applied with kubectl; without kubelets, so no pod runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hack.controlplane import ControlPlane
from hack.controlplane.build import binary
from hack.controlplane.load import node as node_object
from nodeproxy.sandbox.pace import scaled

pytestmark = pytest.mark.controlplane

DEPLOY = Path(__file__).parents[2] / "deploy"
AGENTS = ["overlays/iptables", "overlays/ipvs", "migration/iptables", "migration/ipvs"]
OPERATOR = "github.com/prometheus-operator/prometheus-operator@v0.86.1"
OPERATOR_SUM = "h1:pHUuiRErcFb3nFDox7RxoxpEN0FyT24GtYOkr2GBu04="

Kubectl = Callable[..., str]


@pytest.fixture(scope="module")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubectl]:
    kubeconfig = tmp_path_factory.mktemp("deploy") / "kubeconfig"
    with ControlPlane(controller_manager=True) as cluster:
        cluster.write_kubeconfig(kubeconfig)
        for name in ("one", "two"):
            node = node_object(name, ["192.0.2.1"])
            node["metadata"].setdefault("labels", {})["kubernetes.io/os"] = "linux"
            cluster.request("POST", "/api/v1/nodes", node)

        def run(*arguments: str, input: str | None = None) -> str:
            command = [binary("kubectl"), "--kubeconfig", kubeconfig, *arguments]
            done = subprocess.run(command, input=input, capture_output=True, text=True, check=False, cwd=DEPLOY.parent)
            assert done.returncode == 0, done.stderr
            assert "Warning" not in done.stderr, done.stderr
            return done.stdout

        yield run


def eventually(look: Callable[[], object], wanted: object, seconds: float = 20) -> None:
    deadline = time.monotonic() + scaled(seconds)
    while (found := look()) != wanted:
        assert time.monotonic() < deadline, f"after {scaled(seconds):.0f} s still {found}"
        time.sleep(0.2)


@pytest.mark.parametrize("overlay", AGENTS)
def test_the_server_accepts_it(kubectl: Kubectl, overlay: str) -> None:
    answers = kubectl("apply", "--dry-run=server", "-k", f"deploy/{overlay}").splitlines()
    assert len(answers) == 5
    assert all(answer.endswith("(server dry run)") for answer in answers)
    listed = json.loads(kubectl("apply", "--dry-run=server", "--output=json", "-k", f"deploy/{overlay}"))["items"]
    found = {item["kind"]: item for item in listed}
    assert found.keys() == {"ServiceAccount", "ClusterRole", "ClusterRoleBinding", "ConfigMap", "DaemonSet"}
    assert {item["metadata"].get("namespace", "kube-system") for item in listed} == {"kube-system"}
    configuration = yaml.safe_load(found["ConfigMap"]["data"]["config.conf"])
    assert configuration["mode"] == overlay.rpartition("/")[2]
    selector = found["DaemonSet"]["spec"]["template"]["spec"]["nodeSelector"]
    label = {"nodeproxy.io/proxy": "nodeproxy"} if overlay.startswith("migration") else {}
    assert selector == {"kubernetes.io/os": "linux", **label}


def test_the_server_accepts_the_operator(kubectl: Kubectl) -> None:
    listed = json.loads(kubectl("apply", "--dry-run=server", "--output=json", "-k", "deploy/operator"))["items"]
    found: dict[str, list[str]] = {}
    for item in listed:
        found.setdefault(item["kind"], []).append(item["metadata"]["name"])
    operator, probe = "nodeproxy-operator", "nodeproxy-probe"
    assert {kind: sorted(names) for kind, names in found.items()} == {
        "CustomResourceDefinition": ["proxynodes.nodeproxy.io", "proxyrollouts.nodeproxy.io"],
        "ServiceAccount": [operator],
        "ClusterRole": [operator],
        "ClusterRoleBinding": [operator],
        "Role": [operator],
        "RoleBinding": [operator],
        "Deployment": [operator, probe],
        "Service": [probe],
        "ValidatingAdmissionPolicy": ["nodeproxy-proxynode-status"],
        "ValidatingAdmissionPolicyBinding": ["nodeproxy-proxynode-status"],
    }
    assert {item["metadata"].get("namespace", "kube-system") for item in listed} == {"kube-system"}


def test_the_roll_out_of_the_guide_is_taken_as_it_stands(kubectl: Kubectl) -> None:
    kubectl("apply", "-k", "deploy/operator/crds")
    for plural in ("proxyrollouts", "proxynodes"):
        kubectl("wait", "--for=condition=Established", f"crd/{plural}.nodeproxy.io", "--timeout=60s")
    (example,) = re.findall(r"```yaml\n(.*?)```", (DEPLOY / "docs" / "rollout.md").read_text(), re.DOTALL)
    answer = kubectl("create", "--dry-run=server", "--validate=strict", "--output=json", "-f", "-", input=example)
    assert json.loads(answer)["spec"]["target"]["mode"] == "ipvs"
    columns = kubectl("get", "proxyrollouts", "--output=wide")
    assert columns == ""  # none: kubectl says so on standard error
    kubectl("create", "-f", "-", input=example)
    titles = kubectl("get", "pxr", "--output=wide").splitlines()[0].split()
    assert titles == ["NAME", "TARGET", "PHASE", "STEP", "NODES", "MESSAGE", "STARTED", "FINISHED", "AGE"]
    assert kubectl("get", "nodeproxy").count("to-ipvs") == 1  # the category of all of ours
    kubectl("delete", "-k", "deploy/operator/crds")


@pytest.mark.parametrize("overlay", ["overlays/kubeadm", "migration/kubeadm"])
def test_the_server_accepts_what_takes_kube_proxys_configuration(kubectl: Kubectl, overlay: str) -> None:
    listed = json.loads(kubectl("apply", "--dry-run=server", "--output=json", "-k", f"deploy/{overlay}"))["items"]
    found = {item["kind"]: item for item in listed}
    assert found.keys() == {"ServiceAccount", "ClusterRole", "ClusterRoleBinding", "DaemonSet"}
    pod = found["DaemonSet"]["spec"]["template"]["spec"]
    assert {volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume} == {"kube-proxy"}
    assert "nodeproxy-apiserver" not in json.dumps(pod)
    assert ("nodeproxy.io/proxy" in pod["nodeSelector"]) == overlay.startswith("migration")


def test_the_overlay_of_the_readme_is_one(kubectl: Kubectl, tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", (DEPLOY / "README.md").read_text(), re.DOTALL)
    (tmp_path / "kustomization.yaml").write_text(
        textwrap.dedent(example).replace("nodeproxy/deploy/", f"{os.path.relpath(DEPLOY, tmp_path)}/")
    )
    text = (DEPLOY / "overlays" / "ipvs" / "config.conf").read_text()
    (tmp_path / "config.conf").write_text(text.replace('clusterCIDR: ""', "clusterCIDR: 10.244.0.0/16"))
    found = {one["kind"]: one for one in yaml.safe_load_all(kubectl("kustomize", str(tmp_path)))}
    (container,) = found["DaemonSet"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry.example/nodeproxy:0.1.0"
    assert found["ConfigMap"]["metadata"]["name"] == "nodeproxy"
    configuration = yaml.safe_load(found["ConfigMap"]["data"]["config.conf"])
    assert (configuration["mode"], configuration["clusterCIDR"]) == ("ipvs", "10.244.0.0/16")
    kubectl("apply", "--dry-run=server", "-k", str(tmp_path))


def test_the_metrics_component_opens_the_address_and_nothing_else(kubectl: Kubectl, tmp_path: Path) -> None:
    path = DEPLOY / "overlays" / "iptables"
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(path, tmp_path)],
        "components": [os.path.relpath(DEPLOY / "components" / "metrics", tmp_path)],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    texts = [kubectl("kustomize", str(where)) for where in (path, tmp_path)]
    plain, opened = ({one["kind"]: one for one in yaml.safe_load_all(text)} for text in texts)
    arguments = opened["DaemonSet"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments.pop() == "--metrics-bind-address=0.0.0.0:10249"
    assert plain == opened


def test_monitoring_is_as_the_operator_has_it(kubectl: Kubectl) -> None:
    """Against the operator's own definitions, which are in its Go module."""
    env = os.environ | {"GONOSUMDB": OPERATOR.partition("@")[0], "GOFLAGS": "-mod=mod"}
    command = ["go", "mod", "download", "-json", OPERATOR]
    done = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, check=False)
    module: dict[str, Any] = json.loads(done.stdout)
    assert module.get("Sum") == OPERATOR_SUM, done.stdout + done.stderr
    for name in ("servicemonitors", "prometheusrules"):
        definition = Path(module["Dir"], "example", "prometheus-operator-crd", f"monitoring.coreos.com_{name}.yaml")
        kubectl("create", "-f", str(definition))
        kubectl("wait", "--for=condition=Established", f"crd/{name}.monitoring.coreos.com", "--timeout=60s")
    answers = kubectl("apply", "--dry-run=server", "--validate=strict", "-k", "deploy/monitoring").splitlines()
    kinds = {answer.partition("/")[0] for answer in answers}
    assert kinds == {"configmap", "service", "servicemonitor.monitoring.coreos.com", "prometheusrule.monitoring.coreos.com"}


def test_applying_it_again_keeps_what_the_cluster_set(kubectl: Kubectl) -> None:
    address = ["--from-literal=host=192.0.2.9", "--from-literal=port=6443"]
    kubectl("-n", "kube-system", "create", "configmap", "nodeproxy-apiserver", *address)
    kubectl("apply", "-k", "deploy/overlays/iptables")
    again = kubectl("apply", "-k", "deploy/overlays/iptables").splitlines()
    assert all(line.endswith("unchanged") for line in again), again
    kept = json.loads(kubectl("-n", "kube-system", "get", "configmap", "nodeproxy-apiserver", "--output=json"))["data"]
    assert kept == {"host": "192.0.2.9", "port": "6443"}
    kubectl("delete", "-k", "deploy/overlays/iptables")


def test_a_label_moves_a_node_from_kube_proxy_and_back(kubectl: Kubectl) -> None:
    """The DaemonSet controller makes and deletes the pods; no kubelet runs them."""
    kube_proxy = {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "kube-proxy", "namespace": "kube-system"},
        "spec": {
            "selector": {"matchLabels": {"k8s-app": "kube-proxy"}},
            "template": {
                "metadata": {"labels": {"k8s-app": "kube-proxy"}},
                "spec": {"containers": [{"name": "kube-proxy", "image": "none"}], "tolerations": [{"operator": "Exists"}]},
            },
        },
    }
    kubectl("apply", "-f", "-", input=json.dumps(kube_proxy))
    patch = "deploy/migration/keep-kube-proxy-off.yaml"
    kubectl("-n", "kube-system", "patch", "daemonset", "kube-proxy", "--patch-file", patch)
    kubectl("apply", "-k", "deploy/migration/ipvs")

    pods = "/api/v1/namespaces/kube-system/pods"

    def proxies() -> dict[str, list[str]]:
        """The pods of proxies by node. Here is done, too, what a scheduler and kubelets would do."""
        found: dict[str, list[str]] = {"one": [], "two": []}
        for pod in json.loads(kubectl("get", "--raw", pods))["items"]:
            name, affinity = pod["metadata"]["name"], pod["spec"]["affinity"]["nodeAffinity"]
            (field,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"][0]["matchFields"]
            (node,) = field["values"]
            if "deletionTimestamp" in pod["metadata"]:
                kubectl("delete", "--raw", f"{pods}/{name}?gracePeriodSeconds=0")
                continue
            if "nodeName" not in pod["spec"]:
                target = {"apiVersion": "v1", "kind": "Node", "name": node}
                binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target}
                kubectl("create", "--raw", f"{pods}/{name}/binding", "-f", "-", input=json.dumps(binding))
            found[node].append(pod["metadata"]["labels"]["k8s-app"])
        return found

    eventually(proxies, {"one": ["kube-proxy"], "two": ["kube-proxy"]})
    kubectl("label", "node", "one", "nodeproxy.io/proxy=nodeproxy")
    eventually(proxies, {"one": ["nodeproxy"], "two": ["kube-proxy"]})
    kubectl("label", "node", "one", "nodeproxy.io/proxy-")
    eventually(proxies, {"one": ["kube-proxy"], "two": ["kube-proxy"]})
