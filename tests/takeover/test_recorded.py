"""nodeproxy starts on a node in a state that kube-proxy left, as recorded: needs no kube-proxy."""

from __future__ import annotations

import time

import pytest

from nodeproxy.forwarding.table import Family
from nodeproxy.programmer import kube_proxy_traces as traces
from nodeproxy.programmer.rules.snapshot import parse_tables
from nodeproxy.sandbox.pace import scaled
from tests.takeover.alone import left_over
from tests.takeover.held import repeated
from tests.takeover.probing import Probing, wait_serving
from tests.takeover.proxies import Node, Theirs, both_modes
from tests.takeover.recorded import read, restore
from tests.ways import Way


@pytest.mark.kernel
@pytest.mark.parametrize(("theirs", "way"), list(both_modes()))
def test_a_recorded_state_is_taken_over(node: Node, theirs: Theirs, way: Way) -> None:
    restore(node.box.node, theirs)
    wait_serving(node.box)
    drain = min(scaled(4), 12)
    with Probing(node.box) as probing:
        time.sleep(0.3)
        with node.nodeproxy(way, "--ipvs-drain-timeout", f"{drain:.0f}s") as agent:
            left = left_over(node, way, timeout=drain + 8)
    problems = [*probing.problems(), *left, *repeated(node.box.node)]
    assert not problems, "\n".join([*problems, agent.log_tail()])


MODES = ["iptables-legacy", "iptables-nft", "ipvs-legacy", "ipvs-nft"]


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("family", [Family.IPV4, Family.IPV6])
def test_recorded_rules_are_told_to_be_kube_proxys(name: str, family: Family) -> None:
    mode, _, variant = name.partition("-")
    state = read(Theirs(mode, "nft" if variant == "nft" else "legacy"))
    text = state.iptables if family is Family.IPV4 else state.ip6tables
    tables = parse_tables(text)
    assert traces.kube_proxy_modes(tables) == {mode}
    assert traces.kube_proxy_watches(tables) == (mode == "iptables")
    without = parse_tables("\n".join(line for line in text.splitlines() if "KUBE-PROXY-FIREWALL" not in line))
    assert not traces.kube_proxy_holds(without)


def test_an_empty_node_is_nobodys() -> None:
    for text in ("", "*mangle\nCOMMIT\n*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n"):
        tables = parse_tables(text)
        assert not traces.kube_proxy_holds(tables)
        assert not traces.kube_proxy_watches(tables)
        assert not any(traces.reached_by_kube_proxy(tables).values())
    assert traces.node_port_entries({}) == frozenset()
    assert traces.node_port_entries({"KUBE-NODE-PORT-TCP": ["no port"], "OTHER": ["80"]}) == frozenset()


def test_the_recorded_sets_are_those_that_are_known() -> None:
    text = read(Theirs("ipvs", "nft")).ipset
    created = {line.split()[1]: line.split()[2] for line in text.splitlines() if line.startswith("create")}
    assert created == traces.SETS
