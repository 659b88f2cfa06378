"""Starting agents in the sandbox, and the conformance runner: that it passes what is right and names what is wrong.

The agents here are small shell and Python programs, the rules are written by hand.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import yaml

from nodeproxy.sandbox.agent import (
    AgentError,
    AgentFlags,
    AgentProcess,
    http_get,
    kube_proxy_command,
    nodeproxy_command,
    variant_environment,
)
from nodeproxy.sandbox.flows import check_path, probes_for, run_scene
from nodeproxy.sandbox.scene import Flow, Layout, NodeSpec, Scene, lay_out, load_scenes, sticky
from nodeproxy.sandbox.topology import Sandbox

pytestmark = pytest.mark.kernel

AGENT = """
import http.server, os, signal, sys, time
print("starting", os.environ.get("WORD"), *sys.argv[1:], flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
healthy_after = time.monotonic() + 0.3
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if time.monotonic() > healthy_after else 503)
        self.end_headers()
        self.wfile.write(b'lastest{a="1"} 7\\nlast{a="1"} 5.5\\nlast{a="2"} 4\\n')
class Server(http.server.ThreadingHTTPServer):
    allow_reuse_address = True
import threading
threading.Thread(target=Server(("127.0.0.1", 10249), Handler).serve_forever, daemon=True).start()
Server(("127.0.0.1", 10256), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox(node_addresses=["192.168.0.2"]) as made:
        yield made


def test_an_agent_is_started_waited_for_and_stopped(box: Sandbox) -> None:
    agent = AgentProcess(box, [sys.executable, "-c", AGENT, "here"], environment={"WORD": "now"}, name="small")
    with agent:
        assert time.monotonic() - agent.started > 0.3
        assert http_get(box.node, "http://127.0.0.1:10256/any")[0] == 200
        assert agent.wait_metric("last", series=2, timeout=2) == 4
        with pytest.raises(AgentError, match="still 0"):
            agent.wait_metric("last", series=3, timeout=0.1)
        assert agent.running()
    assert not agent.running()
    assert agent.stop() == 3
    assert agent.log_text().startswith("starting now here\n")
    with pytest.raises(OSError):
        http_get(box.node, "http://127.0.0.1:10256/")


def test_the_health_of_an_agent_is_that_of_its_own_namespace(box: Sandbox) -> None:
    with Sandbox() as other, AgentProcess(box, [sys.executable, "-c", AGENT], name="own"), pytest.raises(OSError):
        http_get(other.node, "http://127.0.0.1:10256/")


def test_an_agent_that_ends_shows_its_log(box: Sandbox) -> None:
    with pytest.raises(AgentError, match=r"exit 7.*\n.*no such flag"):
        AgentProcess(box, ["sh", "-c", "echo no such flag >&2; exit 7"], name="ends").__enter__()


def test_an_agent_that_never_is_ready_is_given_up_and_killed(box: Sandbox) -> None:
    agent = AgentProcess(box, ["sh", "-c", "trap '' TERM; echo waiting; while :; do sleep 0.1; done"], name="never")
    agent.start()
    with pytest.raises(AgentError, match=r"not ready after 0\.3 s(.|\n)*waiting"):
        agent.wait_ready(timeout=0.3)
    assert agent.stop(timeout=0.2) == -signal.SIGKILL


@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_the_variant_is_first_on_the_path(box: Sandbox, variant: str) -> None:
    environment = variant_environment(box, variant)  # type: ignore[arg-type]
    for tool in ("iptables", "ip6tables", "iptables-save", "iptables-restore"):
        text = box.node.command(["env", f"PATH={environment['PATH']}", tool, "--version"]).stdout
        assert ("nf_tables" in text) == (variant == "nft"), text


def test_commands_share_their_flags() -> None:
    flags = AgentFlags(hostname="n", cluster_cidr="10.1.0.0/16", nodeport_addresses=["a", "b"], masquerade_all=True)
    ours = nodeproxy_command(flags, manifests=Path("/m"), variant="nft")
    peer = kube_proxy_command(Path("/bin/kube-proxy"), flags, master="http://x")
    assert ours[:7] == [str(Path(sys.executable).with_name("nodeproxy")), "run", "--mode", "iptables", "--manifests", "/m",
                        "--iptables-variant"]  # fmt: skip
    assert peer[:3] == ["/bin/kube-proxy", "--proxy-mode", "iptables"]
    shared = flags.arguments()
    assert ours[-len(shared) :] == peer[-len(shared) :] == shared
    assert shared[shared.index("--nodeport-addresses") + 1] == "a,b"
    assert "--masquerade-all=true" in shared
    assert "--cluster-cidr" not in AgentFlags(detect_local=False).arguments()


NODE = NodeSpec("test-node", ["192.168.0.2"], "10.0.0.0/8")
SERVICE = {
    "metadata": {"name": "s", "namespace": "n"},
    "spec": {"clusterIP": "172.30.0.41", "ports": [{"port": 80, "nodePort": 3001}]},
}
SLICE = {
    "metadata": {"name": "s-1", "namespace": "n", "labels": {"kubernetes.io/service-name": "s"}},
    "addressType": "IPv4",
    "endpoints": [{"addresses": ["10.180.0.1"], "nodeName": "test-node"}, {"addresses": ["10.180.1.1"]}],
    "ports": [{"port": 8080}],
}
BOTH = ["10.180.0.1:8080", "10.180.1.1:8080"]
RULES = [
    "nat -A PREROUTING -d 172.30.0.41 -p tcp --dport 80 -m statistic --mode random --probability 0.5 -j DNAT"
    " --to 10.180.0.1:8080",
    "nat -A PREROUTING -d 172.30.0.41 -p tcp --dport 80 -j DNAT --to 10.180.1.1:8080",
    "nat -A POSTROUTING ! -s 10.0.0.0/8 -j MASQUERADE",
    "filter -A FORWARD -d 172.30.0.42 -j REJECT",
    "filter -A FORWARD -d 172.30.0.43 -j DROP",
    "filter -A INPUT -p tcp --dport 30000 -j ACCEPT",
]
POD, CLIENT = "10.0.0.2", "203.0.113.2"
FLOWS = [
    Flow(POD, "172.30.0.41", 80, BOTH),
    Flow(CLIENT, "172.30.0.41", 80, BOTH, masquerade=True),
    Flow(POD, "172.30.0.42", 80, "REJECT"),
    Flow(POD, "172.30.0.43", 80, "DROP"),
    Flow(CLIENT, "192.168.0.2", 3001, "no-match"),
    Flow(POD, "172.30.0.44", 80, "no-match"),
    Flow("1.2.3.4", "192.168.0.2", 30000, "ACCEPT"),
]


def scene(*flows: Flow, service: dict[str, object] = SERVICE) -> Scene:
    return Scene("by-hand", "IPv4", NODE, [service], [SLICE], list(flows))


def by_hand(rules: Sequence[str]) -> Callable[[Layout], object]:
    @contextmanager
    def start(layout: Layout) -> Iterator[None]:
        for rule in rules:
            layout.box.node.command(["iptables-nft", "-t", *rule.split()])
        yield

    return start


def test_the_runner_passes_what_is_right() -> None:
    results = run_scene(scene(*FLOWS), by_hand(RULES), "nft")
    assert [str(result) for result in results if result.problems] == []
    assert [result.flow for result in results] == FLOWS


WRONG = {
    "endpoint never chosen": (FLOWS[0], [RULES[1]], "never answered by ['10.180.0.1:8080']"),
    "wrong endpoint": (Flow(POD, "172.30.0.41", 80, BOTH[1:]), RULES[:2], "answered by ['10.180.0.1:8080']"),
    "missing masquerade": (FLOWS[1], RULES[:2], "not masqueraded: source 203.0.113.2 arrived"),
    "masqueraded": (FLOWS[0], [*RULES[:2], "nat -A POSTROUTING -j MASQUERADE"], "masqueraded: source 100.64."),
    "no rule": (FLOWS[0], [], "answered by ['outside']"),
    "drop for endpoints": (FLOWS[0], ["filter -A FORWARD -j DROP"], "not answered"),
    "drop for reject": (FLOWS[2], ["filter -A FORWARD -d 172.30.0.42 -j DROP"], "not always Rejected"),
    "reset for reject": (
        FLOWS[2],
        ["filter -A FORWARD -d 172.30.0.42 -p tcp -j REJECT --reject-with tcp-reset"],
        "not always Rejected",
    ),
    "reject for drop": (FLOWS[3], ["filter -A FORWARD -d 172.30.0.43 -j REJECT"], "not always Dropped"),
    "nothing for drop": (FLOWS[3], [], "not always Dropped"),
    "match on the node": (
        FLOWS[4],
        ["nat -A PREROUTING -p tcp --dport 3001 -j DNAT --to 10.180.0.1:8080"],
        "not left alone",
    ),
    "reject on the node": (FLOWS[4], ["filter -A INPUT -p tcp --dport 3001 -j REJECT"], "not left alone"),
    "masqueraded only": (FLOWS[5], ["nat -A POSTROUTING -j MASQUERADE"], "not left alone"),
    "not accepted": (FLOWS[6], [], "not accepted"),
    "all accepted": (FLOWS[6], ["filter -A INPUT -j ACCEPT"], "not in force"),
}


@pytest.mark.parametrize(("flow", "rules", "problem"), WRONG.values(), ids=WRONG.keys())
def test_the_runner_names_what_is_wrong(flow: Flow, rules: list[str], problem: str) -> None:
    (result,) = run_scene(scene(flow), by_hand(rules), "nft")
    assert any(problem in text for text in result.problems), str(result)
    assert str(flow) in str(result)


def test_affinity_allows_one_endpoint_only() -> None:
    service = msgspec.convert({**SERVICE, "spec": {**SERVICE["spec"], "sessionAffinity": "ClientIP"}}, dict)  # type: ignore[dict-item]
    one = scene(FLOWS[0], service=service)
    assert sticky(one, FLOWS[0])
    assert sticky(one, FLOWS[4])
    assert not sticky(one, FLOWS[2])
    (kept,) = run_scene(one, by_hand([RULES[1]]), "nft")
    assert kept.problems == []
    (spread,) = run_scene(one, by_hand(RULES[:2]), "nft")
    assert any("affinity" in text for text in spread.problems)


def test_a_gap_in_the_sandbox_is_not_taken_for_a_drop() -> None:
    with lay_out(scene(FLOWS[3])) as layout:
        assert check_path(layout, FLOWS[3]).problems == []
        layout.box.node.ip(["route replace blackhole 172.30.0.43"])
        assert any("sandbox itself" in text for text in check_path(layout, FLOWS[3]).problems)


@pytest.mark.parametrize("choices", [2, 3, 5, 10])
def test_enough_probes_to_see_every_endpoint(choices: int) -> None:
    count = probes_for(choices)
    assert choices * (1 - 1 / choices) ** count <= 1e-9
    assert choices * (1 - 1 / choices) ** (count - 1) > 1e-9
    assert probes_for(1) == 6


def test_manifests_hold_the_objects_as_they_are(tmp_path: Path) -> None:
    made = scene(*FLOWS)
    documents = list(yaml.safe_load_all(made.write_manifests(tmp_path).read_text()))
    assert [one["kind"] for one in documents] == ["Service", "EndpointSlice"]
    assert {key: documents[0][key] for key in SERVICE} == SERVICE
    labelled = msgspec.structs.replace(made, node=msgspec.structs.replace(NODE, labels={"zone": "a"}))
    node = next(iter(yaml.safe_load_all(labelled.write_manifests(tmp_path).read_text())))
    assert node["metadata"] == {"name": "test-node", "labels": {"zone": "a"}}
    assert node["status"]["addresses"] == [{"type": "InternalIP", "address": "192.168.0.2"}]


def test_scenes_are_read_with_addresses_in_their_usual_form(tmp_path: Path) -> None:
    path = tmp_path / "scenes.json"
    flow = Flow("FD00:10::0002", "2001:db8:0::1", 80, "DROP")
    path.write_bytes(msgspec.json.encode([scene(flow)]))
    (read,) = load_scenes(path)
    assert (read.flows[0].source, read.flows[0].destination) == ("fd00:10::2", "2001:db8::1")


def test_the_environment_of_the_test_is_passed_on(box: Sandbox) -> None:
    assert box.node.command(["sh", "-c", "echo $XTABLES_LOCKFILE $HOME"]).stdout.split() == [
        str(box.directory / "xtables.lock"),
        os.environ["HOME"],
    ]
