"""`nodeproxy status` against a real agent on a real kernel."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nodeproxy.sandbox.agent import AgentFlags, AgentProcess, nodeproxy_command
from nodeproxy.sandbox.topology import Sandbox
from tests.behaviour.world import NODE_ADDRESS, World, directory_of_wrappers, endpoint_slice, service
from tests.ways import IPVS_NFT, LEGACY, NFT, Way, ipvs

NODEPROXY = str(Path(sys.executable).with_name("nodeproxy"))
POD, OTHER_POD = "10.1.0.1", "10.1.0.2"

pytestmark = pytest.mark.kernel


@pytest.fixture
def box() -> Iterator[Sandbox]:
    with Sandbox(node_addresses=[NODE_ADDRESS]) as made:
        yield made


def ask(box: Sandbox, *arguments: str) -> tuple[int, str]:
    done = box.node.command([NODEPROXY, "status", *arguments], check=False)
    return done.returncode, done.stdout + done.stderr


def told(box: Sandbox) -> dict[str, Any]:
    status: dict[str, Any] = json.loads(ask(box, "-o", "json")[1])
    return status


@pytest.mark.parametrize("way", [LEGACY, NFT, ipvs(IPVS_NFT)], ids=str)
def test_in_sync_then_drift_then_gone(box: Sandbox, way: Way) -> None:
    world = World(box, way)
    world.put("web", service(nodePort=30080), endpoint_slice([POD, OTHER_POD]))
    world.put("other", service("other", cluster_ip="10.96.0.11"))
    world.put("bad", service("bad", cluster_ip="nonsense"))
    with world.agent:
        code, text = ask(box)
        assert code == 0, text
        assert text.splitlines()[0].strip() == "in sync"
        assert f"{way.mode} mode ({way.variant}), node test-node" in text
        assert "lists complete" in text and "Drift     none seen" in text
        assert "\x1b" not in text  # not on a terminal: plain
        assert "Service test/bad: spec.clusterIPs[0]: 'nonsense' is not a usable canonical IP address" in text
        status = told(box)
        assert (status["inSync"], status["mode"], status["variant"]) == (True, way.mode, way.variant)
        assert status["counts"]["servicePorts"] == 2 and status["counts"]["backends"] == 2
        assert status["counts"]["rules"]["IPv4"]["nat"] > 0
        assert (status["counts"]["virtualServers"] is not None) == (way.mode == "ipvs")
        assert status["mostBackends"] == [{"service": "test/web", "count": 2}]
        assert status["sync"]["pending"] == 0 and status["sync"]["last"]["seconds"] > 0

        world.iptables("-t", "nat", "-F", "KUBE-SERVICES")
        world.settle(lambda: bool(told(box)["drift"]) and told(box)["drift"][-1]["repaired"] is not None, "drift is told")
        code, text = ask(box)
        assert code == 0 and "changed by somebody: " in text and "; put back 2" in text
    code, text = ask(box)
    assert (code, text) == (
        1, "nodeproxy: no nodeproxy agent runs in this network namespace (nobody listens on @nodeproxy-status)\n"
    )  # fmt: skip


def test_a_service_port_that_the_kernel_refuses(box: Sandbox) -> None:
    """A wrapper around the real tool refuses: there is no rule of ours that this kernel does not take."""
    script = f"""case "$1" in --version) exec $REAL "$@";; esac
input=$(mktemp); cat >$input
if grep -qe '{OTHER_POD}:8080' $input; then echo "iptables-restore: refused for the test" >&2; exit 1; fi
exec $REAL "$@" <$input"""
    tools = {f"{name}-nft-restore": script for name in ("iptables", "ip6tables")}
    world = World(box, NFT, {"PATH": directory_of_wrappers(box.directory / "wrappers", tools)})
    world.put("web", service(), endpoint_slice([POD]))
    world.put("other", service("other", cluster_ip="10.96.0.11"), endpoint_slice([OTHER_POD], "other"))
    with world.agent:
        code, text = ask(box)
        assert code == 1
        assert "NOT IN SYNC" in text and "the kernel refuses 1 ServicePort\n" in text
        assert "Refused   test/other:p (tcp, IPv4): " in text and "refused for the test (again in " in text
        refused = told(box)["refused"]
        assert refused["count"] == 1 and refused["first"][0]["servicePort"] == "test/other:p (tcp, IPv4)"
        assert refused["retrySeconds"] >= 0


def test_errors_of_source_and_configuration_are_remembered(box: Sandbox) -> None:
    file = box.directory / "config.conf"
    head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
    file.write_text(f"{head}hostnameOverride: test-node\nconntrack: {{maxPerCore: 0, min: 0}}\n")
    world = World(box, NFT)
    command = [NODEPROXY, "run", "--config", str(file), "--manifests", str(world.manifests), "--iptables-variant", "nft"]
    agent = AgentProcess(box, command)
    with agent:
        (world.manifests / "a.yaml").write_text("kind: Service\nmetadata: {name: x}\nspec: {ports: y}\n")
        file.write_text(f"{head}mode: nonsense\n")

        def places() -> set[str]:
            return {error["where"] for error in told(box)["errors"]}

        world.settle(lambda: places() >= {"source", "config"}, "both are told")
        errors = {error["where"]: error["text"] for error in told(box)["errors"]}
        assert "Service default/x: spec.ports" in errors["source"]
        assert "mode: 'nonsense' is neither iptables nor ipvs" in errors["config"]
        assert ask(box)[0] == 0  # the one in force stays, and works


def test_an_agent_that_waits_for_another_says_so(box: Sandbox) -> None:
    """kube-proxy, as far as anybody can see: its answer on its port."""
    (box.directory / "manifests").mkdir()
    serve = (
        "import http.server as h\n"
        "class Mode(h.BaseHTTPRequestHandler):\n"
        "  def do_GET(self): self.send_response(200); self.end_headers(); self.wfile.write(b'iptables')\n"
        "h.HTTPServer(('127.0.0.1', 10249), Mode).serve_forever()\n"
    )
    other = box.node.spawn([sys.executable, "-c", serve])
    world = World(box, NFT)
    agent = AgentProcess(box, nodeproxy_command(AgentFlags(), manifests=box.directory / "manifests"))
    try:
        world.settle(lambda: box.node.command(["ss", "-Hltn", "sport = :10249"]).stdout != "", "it listens")
        agent.start()
        world.settle(lambda: "nothing is programmed: nodeproxy programs nothing before" in ask(box)[1], "it is told")
        code, text = ask(box)
        assert code == 1 and "kube-proxy runs on this node" in text
        assert told(box)["otherProxies"] != []
    finally:
        agent.stop()
        other.kill()
        other.wait()
