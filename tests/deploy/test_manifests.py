"""The manifests, as files: what the DaemonSet may do, and that its configurations are what an agent takes as they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from nodeproxy.configuration.read import read_document
from nodeproxy.configuration.resolve import resolve

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
CONFIGURATIONS = {"iptables": DEPLOY / "base" / "config.conf", "ipvs": DEPLOY / "overlays" / "ipvs" / "config.conf"}


@pytest.fixture(scope="module")
def pod() -> dict[str, Any]:
    daemon_set = yaml.safe_load((DEPLOY / "base" / "daemonset.yaml").read_text())
    spec: dict[str, Any] = daemon_set["spec"]["template"]["spec"]
    return spec


def test_the_agent_may_do_no_more_than_it_needs(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    assert "initContainers" not in pod
    assert not {"hostPID", "hostIPC", "shareProcessNamespace"} & pod.keys()
    security = container["securityContext"]
    assert security["capabilities"] == {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"]}
    assert (security["privileged"], security["allowPrivilegeEscalation"]) == (False, False)
    assert security["readOnlyRootFilesystem"] is True
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    paths = {volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}
    assert paths == {"/run/xtables.lock", "/proc/sys/net"}


def test_it_runs_on_every_node_and_is_not_evicted(pod: dict[str, Any]) -> None:
    assert pod["tolerations"] == [{"operator": "Exists"}]
    assert pod["priorityClassName"] == "system-node-critical"
    assert pod["nodeSelector"] == {"kubernetes.io/os": "linux"}
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "Default")


def test_every_sysctl_that_the_agent_knows_is_below_the_mount(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    (mount,) = (one["mountPath"] for one in container["volumeMounts"] if one["name"] == "proc-sys-net")
    (root,) = (one["value"] for one in container["env"] if one["name"] == "NODEPROXY_PROC_SYS")
    assert mount == f"{root}/net"
    texts = [path.read_text() for path in (REPOSITORY / "nodeproxy").rglob("*.py") if "sandbox" not in path.parts]
    names = {name for text in texts for name in re.findall(r'"((?:net|kernel|vm|fs)\.[a-z0-9_]+\.[\w.]+)"', text)}
    assert {"net.ipv4.conf.all.route_localnet", "net.netfilter.nf_conntrack_acct", "net.ipv4.vs.conntrack"} <= names
    assert {name for name in names if not name.startswith("net.")} == set()


@pytest.mark.parametrize("file", ["deployment", "probe"])
def test_the_operator_and_its_probes_have_no_privileges(file: str) -> None:
    documents = list(yaml.safe_load_all((DEPLOY / "operator" / f"{file}.yaml").read_text()))
    (deployment,) = (one for one in documents if one["kind"] == "Deployment")
    spec = deployment["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert not {"hostNetwork", "hostPID", "volumes", "initContainers"} & spec.keys()
    assert container["securityContext"] == {
        "runAsUser": 65534,
        "runAsGroup": 65534,
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert deployment["spec"]["replicas"] == 2


@pytest.mark.parametrize("mode", CONFIGURATIONS)
def test_its_configuration_is_taken_as_it_is(mode: str) -> None:
    resolved = resolve(CONFIGURATIONS[mode], {"node_name": "n1"})
    assert (resolved.complaints, resolved.absent, resolved.remarks) == ((), (), ())
    assert resolved.config.mode == mode
    document = yaml.safe_load(CONFIGURATIONS[mode].read_text())
    assert read_document(CONFIGURATIONS[mode]).unknown == ()
    assert document["kind"] == "KubeProxyConfiguration"


def test_the_configurations_differ_only_in_what_is_of_the_mode() -> None:
    base, ipvs = (yaml.safe_load(path.read_text()) for path in CONFIGURATIONS.values())
    assert base | {"mode": "ipvs"} == {name: value for name, value in ipvs.items() if name != "ipvs"}


def test_the_address_of_the_api_server_is_not_in_what_is_applied() -> None:
    """Else applying an overlay again would put a placeholder over the real one."""
    for path in DEPLOY.rglob("*.yaml"):
        for document in yaml.safe_load_all(path.read_text()):
            assert (document or {}).get("metadata", {}).get("name") != "nodeproxy-apiserver", path
    (container,) = yaml.safe_load((DEPLOY / "base" / "daemonset.yaml").read_text())["spec"]["template"]["spec"]["containers"]
    sources = {one["name"]: one["valueFrom"]["configMapKeyRef"] for one in container["env"] if "configMapKeyRef" in str(one)}
    assert sources == {
        "KUBERNETES_SERVICE_HOST": {"name": "nodeproxy-apiserver", "key": "host"},
        "KUBERNETES_SERVICE_PORT": {"name": "nodeproxy-apiserver", "key": "port"},
    }
