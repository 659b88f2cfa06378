"""A kube-proxy that lives: an agent that starts beside it knows it, and does as it was told."""

from __future__ import annotations

import re
import sys
import time

import pytest

from nodeproxy.sandbox.agent import AgentFlags, AgentProcess, nodeproxy_command
from nodeproxy.sandbox.pace import scaled
from tests.takeover.alone import left_over
from tests.takeover.held import difference, held
from tests.takeover.probing import Probing, wait_serving
from tests.takeover.proxies import NO_KUBE_PROXY, THEIR_LEGACY, THEIR_NFT, Node, Theirs, their_modes
from tests.ways import LEGACY, NFT, Way

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(bool(NO_KUBE_PROXY), reason=NO_KUBE_PROXY)]

LOOK = """
import asyncio
from nodeproxy.agent.node_claim import NodeClaim
from nodeproxy.agent.other_proxies import find_others
print(*asyncio.run(find_others(NodeClaim())), sep="\\n")
"""
CANARIES = [(table, "KUBE-PROXY-CANARY") for table in ("mangle", "nat", "filter")]
SAME_VARIANT = pytest.mark.parametrize(("theirs", "way"), [(THEIR_LEGACY, LEGACY), (THEIR_NFT, NFT)], ids=str)


def look(node: Node) -> str:
    """What an agent that starts now would know; in a process of its own, because kube-proxy is a child of this one."""
    return node.box.node.command([sys.executable, "-c", LOOK], timeout=60).stdout.strip()


def wait_for_words(agent: AgentProcess, words: str) -> None:
    """Until its log has them; a regular expression."""
    deadline = time.monotonic() + scaled(30)
    while not re.search(words, agent.log_text()):
        assert time.monotonic() < deadline, agent.log_tail()
        time.sleep(0.1)


@pytest.mark.parametrize("theirs", list(their_modes()))
def test_kube_proxy_is_known_while_it_runs_and_not_after(node: Node, theirs: Theirs) -> None:
    with node.kube_proxy(theirs) as kube_proxy:
        assert kube_proxy.process
        how = f"answers on 127.0.0.1:10249 and 127.0.0.1:10256, pid {kube_proxy.process.pid}, mode {theirs.mode}"
        assert look(node) == f"kube-proxy runs on this node ({how})"
    assert look(node) == "", "what it left is no evidence"


@SAME_VARIANT
def test_an_agent_waits_and_takes_over_when_kube_proxy_dies(node: Node, theirs: Theirs, way: Way) -> None:
    with node.kube_proxy(theirs) as kube_proxy, Probing(node.box) as probing:
        wait_serving(node.box)
        before = held(node.box.node)
        with node.nodeproxy(way, "--while-another-runs", "wait", ready=False) as agent:
            wait_for_words(agent, "waiting for another service proxy")
            time.sleep(2)
            assert agent.running(), agent.log_tail()
            assert difference(before, held(node.box.node)) == "", agent.log_tail()
            assert agent.log_text().count("waiting for another service proxy") == 1, agent.log_tail()
            kube_proxy.kill()
            agent.wait_ready()
            left = left_over(node, way)
    problems = [*probing.problems(), *left]
    assert not problems, "\n".join([*problems, agent.log_tail()])


@SAME_VARIANT
def test_an_agent_that_is_told_to_refuses(node: Node, theirs: Theirs, way: Way) -> None:
    with node.kube_proxy(theirs):
        before = held(node.box.node)
        flags = nodeproxy_command(AgentFlags(mode=way.mode), manifests=node.box.directory, variant=way.variant)
        done = node.box.node.command([*flags, "--while-another-runs", "refuse"], check=False)
        assert difference(before, held(node.box.node)) == ""
    assert done.returncode != 0
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "kube-proxy runs on this node" in line]
    assert len(lines) == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@SAME_VARIANT
def test_a_second_agent_waits_until_the_first_has_ended(node: Node, theirs: Theirs, way: Way) -> None:
    with node.nodeproxy(way) as first, node.nodeproxy(way, ready=False) as second:
        wait_for_words(second, r"nodeproxy runs on this node \(answers on .*, pid \d+, mode iptables\)")
        assert "kube-proxy runs" not in second.log_text()
        first.stop()
        second.wait_ready()


@SAME_VARIANT
def test_a_kube_proxy_whose_canary_goes_programs_everything_anew(node: Node, theirs: Theirs, way: Way) -> None:
    """Why an agent that takes over must not do so beside a kube-proxy that lives; and that ours recognises its return."""
    with node.kube_proxy(theirs, "--iptables-sync-period", "1s"):
        wait_serving(node.box)
        before = held(node.box.node)
        jump = ["-D", "PREROUTING", "-t", "nat", "-m", "comment", "--comment", "kubernetes service portals", "-j"]
        node.box.node.command([f"iptables-{way.variant}", *jump, "KUBE-SERVICES"])
        delete_canaries(node, way)  # last: it is at once that kube-proxy may program everything, and only then
        deadline = time.monotonic() + 20
        while (seen := difference(before, held(node.box.node))) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert seen == ""


def delete_canaries(node: Node, way: Way) -> None:
    """In both families, as an agent does that takes over."""
    for tool in ("iptables", "ip6tables"):
        for table, canary in CANARIES:
            node.box.node.command([f"{tool}-{way.variant}", "-t", table, "-X", canary])
