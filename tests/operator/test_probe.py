"""What probe pods run, over real sockets; and what is made of what they say."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from hack.controlplane import ControlPlane
from hack.controlplane.processes import free_port
from nodeproxy.api.proxy_node import ObjectMeta
from nodeproxy.operator import node_plan, pod_probes
from nodeproxy.operator.api import Nodes, ProxyRollout, RolloutSpec, Target
from nodeproxy.operator.cluster import Cluster
from nodeproxy.operator.pod_probes import PodProber
from nodeproxy.operator.pods import cleanup_pod, probe_pod
from nodeproxy.operator.probe import MAX_MESSAGE_BYTES, Destination, Result, destination, message, probe, results
from nodeproxy.operator.selectors import parse_selector
from nodeproxy.operator.world import StartProbes
from nodeproxy.sandbox.pace import scaled
from nodeproxy.source.apiserver.credentials import Credentials
from tests.operator.fleet import eventually

HERE = "127.0.0.1"
DEPLOY = Path(__file__).parents[2] / "deploy"
NODEPROXY = Path(sys.executable).with_name("nodeproxy")
ROLLOUT = ProxyRollout(
    metadata=ObjectMeta(name="r", uid="u"), spec=RolloutSpec(target=Target(mode="ipvs"), nodes=Nodes(names=("n1",)))
)


def test_a_probe_says_who_answered_who_refused_and_who_kept_silent(tmp_path: Path) -> None:
    port, output = free_port(HERE), tmp_path / "termination-log"
    server = subprocess.Popen([NODEPROXY, "probe-server", f"--host={HERE}", f"--port={port}", "--name=nodeproxy-probe-x"])
    silent = socket.create_server((HERE, 0))  # takes connections, and says nothing
    try:
        eventually(
            lambda: not asyncio.run(probe([Destination("x", HERE, port)], 1, 1.0))[0].failed, "it listens", scaled(20)
        )
        arguments = [f"--named=own={HERE}:{port}", f"--named=silent={HERE}:{silent.getsockname()[1]}"]
        arguments += [f"--target=open={HERE}:{port}", f"--target=closed={HERE}:{free_port(HERE)}"]
        command = [NODEPROXY, "probe", "--count=12", "--timeout=300ms", f"--output={output}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=scaled(30))
        assert json.loads(done.stdout) == json.loads(output.read_text())
        own, quiet, opened, closed = results(output.read_text()) or []
        assert (own.sent, own.failed, own.reason) == (12, 0, None) and own.p50 is not None
        assert (quiet.failed, quiet.reason) == (12, "no answer within 0.3 s")
        assert (opened.failed, closed.failed, closed.reason) == (0, 12, "connection refused")
        server.terminate()
        assert server.wait(scaled(10)) == 0
    finally:
        server.kill()
        silent.close()


def test_a_server_of_another_name_is_not_ours() -> None:
    async def run() -> Result:
        async def other(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"nginx\n")
            writer.close()

        server = await asyncio.start_server(other, HERE, 0)
        async with server:
            (found,) = await probe([Destination("own", HERE, server.sockets[0].getsockname()[1], named=True)], 3, 5.0)
        return found

    assert asyncio.run(run()) == Result(3, 3, None, "answered 'nginx'")


def test_a_message_fits_into_what_the_kubelet_keeps() -> None:
    many = [Result(200, 200, 12345.678, "x" * 500)] * 52
    assert len(message(many)) <= MAX_MESSAGE_BYTES
    read = results(message(many).decode())
    assert read is not None and len(read) == 52 and read[0].reason == "x" * 60
    assert results("out of memory") is None


@pytest.mark.parametrize("text", ["a=b", "a=:80", "=1.2.3.4:80", "a=1.2.3.4:0", "a=1.2.3.4:x"])
def test_a_destination_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="is not NAME=HOST:PORT"):
        destination(text, named=False)
    done = subprocess.run([NODEPROXY, "probe", f"--target={text}"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr == f"nodeproxy: {text!r} is not NAME=HOST:PORT\n"


def test_destinations_are_read_as_they_are_written() -> None:
    for one in (Destination("shop/web", "10.96.0.1", 80), Destination("a node port", "fd00::1", 30080, named=True)):
        assert destination(str(one), named=one.named) == one


def test_a_probe_pod_may_do_nothing_but_connect() -> None:
    pod = probe_pod("p", "v", "n1", [Destination("own", "10.96.0.1", 80, named=True)], image="i", rollout=ROLLOUT)
    (container,) = pod["spec"]["containers"]
    security = container["securityContext"]
    assert security["runAsNonRoot"] and security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]} and not pod["spec"]["automountServiceAccountToken"]
    assert "hostNetwork" not in pod["spec"] and container["args"][-1] == "--named=own=10.96.0.1:80"
    assert pod["metadata"]["ownerReferences"][0]["uid"] == "u"


def test_the_cleanup_is_that_of_the_guide() -> None:
    ours = cleanup_pod("n1", "nodeproxy:dev", 300, ROLLOUT)
    guide = yaml.safe_load((DEPLOY / "migration" / "cleanup.yaml").read_text().replace("NODE", "n1"))
    assert ours["metadata"]["name"] == guide["metadata"]["name"]
    assert ours["metadata"]["labels"] == guide["metadata"]["labels"]
    ours["spec"]["containers"][0]["args"] = ["cleanup"]
    assert ours["spec"] == guide["spec"]


def test_selectors_as_kubectl_takes_them() -> None:
    found = parse_selector("zone=a, disk in (ssd, nvme),!old,new,tier!=x")
    assert found.matches({"zone": "a", "disk": "ssd", "new": ""})
    assert not found.matches({"zone": "a", "disk": "ssd"})
    assert not found.matches({"zone": "a", "disk": "hdd", "new": ""})
    assert not found.matches({"zone": "a", "disk": "ssd", "new": "", "tier": "x"})
    assert not found.matches({"zone": "a", "disk": "ssd", "new": "", "old": ""})
    for bad, part in (("a=b=c", "'a=b=c'"), ("a in ()", "values"), ("", "''"), ("a=1,a=2", "a cannot be 1 and 2")):
        with pytest.raises(ValueError, match=part):
            parse_selector(bad)


def service(namespace: str, name: str, **spec: object) -> dict[str, object]:
    whole = {"ports": [{"name": "p", "port": 80, "protocol": "TCP"}], "selector": {"app": name}, **spec}
    return {"metadata": {"name": name, "namespace": namespace}, "spec": whole}


def endpoint_slice(name: str, *, ready: bool) -> dict[str, object]:
    labels = {"kubernetes.io/service-name": name}
    endpoints = [{"addresses": ["10.244.0.9"], "conditions": {"ready": ready}}]
    ports = [{"name": "p", "port": 80, "protocol": "TCP"}]
    return {"metadata": {"name": name, "labels": labels}, "addressType": "IPv4", "endpoints": endpoints, "ports": ports}


@pytest.mark.controlplane
def test_a_sample_of_services_with_ready_endpoints_is_probed(cluster: ControlPlane, tmp_path: Path) -> None:
    services, slices = "/api/v1/namespaces/default/services", "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
    made = {
        "web": {},
        "empty": {},
        "unready": {},
        "local": {"internalTrafficPolicy": "Local"},
        "headless": {"clusterIP": "None"},
        "udp": {"ports": [{"name": "p", "port": 80, "protocol": "UDP"}]},
    }
    for name, spec in made.items():
        cluster.request("POST", services, service("default", name, **spec))
        if name != "empty":
            cluster.request("POST", slices, endpoint_slice(name, ready=name != "unready"))
    kubeconfig = tmp_path / "kubeconfig"
    cluster.service_account_access("kube-system", "nodeproxy-operator").write_kubeconfig(kubeconfig)
    prober = PodProber(Cluster(Credentials(kubeconfig)), "kube-system", lambda: "nodeproxy:probe")
    request = StartProbes(verification="v-1", node="n1", elsewhere="n2", address="192.0.2.7")

    async def run() -> None:
        await prober.start(request, ROLLOUT)
        await prober.start(request, ROLLOUT)  # as after a crash
        assert (await prober.look()).keys() == {"v-1"} and not (await prober.look())["v-1"].done

    try:
        asyncio.run(run())
        pods = "/api/v1/namespaces/kube-system/pods"
        here, there = (cluster.request("GET", f"{pods}/nodeproxy-probe-v-1-{which}")["spec"] for which in ("from", "to"))
        assert (here["nodeName"], there["nodeName"]) == ("n1", "n2")
        arguments = [one.partition("=")[2].partition("=")[0] for one in here["containers"][0]["args"][3:]]
        assert arguments == ["nodeproxy-probe", "default/kubernetes", "default/web"]
        assert there["containers"][0]["args"][3].startswith("--named=nodeproxy-probe node port=192.0.2.7:3")
        asyncio.run(prober.end("v-1"))
        assert not asyncio.run(prober.look())
    finally:
        for name in made:
            cluster.request("DELETE", f"{services}/{name}")


@pytest.mark.controlplane
def test_a_service_that_goes_meanwhile_is_not_in_the_sample_of_the_second_try(
    cluster: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    services, slices = "/api/v1/namespaces/default/services", "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
    pods = "/api/v1/namespaces/kube-system/pods"
    cluster.request("POST", services, service("default", "shop"))
    cluster.request("POST", slices, endpoint_slice("shop", ready=True))
    kubeconfig = tmp_path / "kubeconfig"
    cluster.service_account_access("kube-system", "nodeproxy-operator").write_kubeconfig(kubeconfig)
    prober = PodProber(Cluster(Credentials(kubeconfig)), "kube-system", lambda: "nodeproxy:probe")

    def probed(id: str) -> list[str]:
        asyncio.run(prober.start(StartProbes(verification=id, node="n1", elsewhere="n2", address=None), ROLLOUT))
        arguments = cluster.request("GET", f"{pods}/nodeproxy-probe-{id}-from")["spec"]["containers"][0]["args"]
        asyncio.run(prober.end(id))
        return [one.partition("=")[2].partition("=")[0] for one in arguments[3:]]

    try:
        assert "default/shop" in probed("first")
        cluster.request("DELETE", f"{slices}/shop")  # scaled to zero
        now = time.monotonic()
        monkeypatch.setattr(pod_probes, "time", SimpleNamespace(monotonic=lambda: now + node_plan._PAUSE_SECONDS))
        assert "default/shop" not in probed("second")
    finally:
        cluster.request("DELETE", f"{services}/shop")


@pytest.mark.controlplane
def test_a_pod_of_others_with_the_label_of_probes_is_named(cluster: ControlPlane, tmp_path: Path) -> None:
    pods = "/api/v1/namespaces/kube-system/pods"
    pod = probe_pod("stranger-from", "v-9", "n1", [Destination("own", "10.96.0.1", 80)], image="i", rollout=ROLLOUT)
    pod["spec"]["containers"][0]["args"] = ["--named=nowhere"]
    cluster.request("POST", pods, pod)
    kubeconfig = tmp_path / "kubeconfig"
    cluster.write_kubeconfig(kubeconfig)
    try:
        ended = {"name": "probe", "image": "i", "imageID": "", "ready": False, "restartCount": 0}
        ended["state"] = {"terminated": {"exitCode": 0, "message": "[]"}}
        status = {"phase": "Succeeded", "containerStatuses": [ended]}
        merge = "application/merge-patch+json"
        cluster.request("PATCH", f"{pods}/stranger-from/status", {"status": status}, content_type=merge)
        prober = PodProber(Cluster(Credentials(kubeconfig)), "kube-system", lambda: "i")
        assert asyncio.run(prober.look())["v-9"].trouble == "pod stranger-from: 'nowhere' is not NAME=HOST:PORT"
    finally:
        cluster.request("DELETE", f"{pods}/stranger-from")
