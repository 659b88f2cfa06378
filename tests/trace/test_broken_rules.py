"""Rules that somebody broke: a trace names what the kernel does otherwise than the forwarding table says.

The node is as an agent left it; each test breaks one thing by hand, with the node's own iptables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from nodeproxy.kernel.ipset import IPSets
from nodeproxy.sandbox.scene import Flow, NodeSpec, Scene
from nodeproxy.trace.results import Agreement, Trace
from tests.trace.node import TracedNode, traced_node
from tests.ways import LEGACY, NFT, Way

pytestmark = pytest.mark.kernel

POD, OUTSIDE, CLUSTER_IP, STICKY_IP = "10.0.0.2", "203.0.113.9", "172.30.0.41", "172.30.0.42"
BACKENDS = ("10.0.1.1", "10.0.1.2", "10.180.0.3")


def service(name: str, address: str, **spec: object) -> dict[str, object]:
    port = {"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30000 + int(address.rpartition(".")[2])}
    return {
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"type": "NodePort", "clusterIP": address, "clusterIPs": [address], "ports": [port], **spec},
    }


def slice_of(name: str) -> dict[str, object]:
    return {
        "metadata": {"name": f"{name}-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": [{"addresses": [one], "nodeName": "test-node" if "10.0." in one else "other"} for one in BACKENDS],
    }


SCENE = Scene(
    name="broken",
    ip_family="IPv4",
    node=NodeSpec(name="test-node", ips=["192.168.0.2"], pod_cidr="10.0.0.0/16"),
    services=[
        service("web", CLUSTER_IP),
        service(
            "sticky", STICKY_IP, sessionAffinity="ClientIP", sessionAffinityConfig={"clientIP": {"timeoutSeconds": 10800}}
        ),
        service("gone", "172.30.0.43"),
    ],
    endpoint_slices=[slice_of("web"), slice_of("sticky")],
    flows=[Flow(POD, CLUSTER_IP, 80, [])],
)
FROM_POD = Flow(POD, CLUSTER_IP, 80, [])
FROM_OUTSIDE = Flow(OUTSIDE, CLUSTER_IP, 80, [])
AT_NODE_PORT = Flow(OUTSIDE, "192.168.0.2", 30041, [])
STICKY = Flow(POD, STICKY_IP, 80, [])
REJECTED = Flow(POD, "172.30.0.43", 80, [])
ELSEWHERE = Flow(POD, "172.30.0.99", 80, [])
ALL = (FROM_POD, FROM_OUTSIDE, AT_NODE_PORT, STICKY, REJECTED, ELSEWHERE)


@pytest.fixture(scope="module", params=[LEGACY, NFT], ids=str)
def laid_out(request: pytest.FixtureRequest) -> Iterator[TracedNode]:
    way: Way = request.param
    with traced_node(SCENE, way) as node:
        yield node


@pytest.fixture
def node(laid_out: TracedNode) -> Iterator[TracedNode]:
    """The node, with its rules as they were before once the test has broken them."""
    saved = laid_out.box.node.command([f"iptables-{laid_out.way.variant}-save"]).stdout
    for flow in ALL:
        agreed(laid_out.traced(flow))
    yield laid_out
    restore = [f"iptables-{laid_out.way.variant}-restore", *(["-w", "5"] if laid_out.way.variant == "legacy" else [])]
    laid_out.box.node.command(restore, input=saved)


def agreed(trace: Trace) -> None:
    assert (trace.agreement, trace.differences) == (Agreement.AGREES, ())


def differs(trace: Trace, *patterns: str) -> None:
    """The kernel does otherwise: one difference for each pattern, and no more."""
    assert trace.agreement is Agreement.DIFFERS
    assert len(trace.differences) == len(patterns), trace.differences
    for pattern in patterns:
        assert any(re.search(pattern, text) for text in trace.differences), (pattern, trace.differences)


def service_chain(node: TracedNode, address: str = CLUSTER_IP) -> str:
    """The chain of the Service at an address."""
    [rule] = [line for line in node.rules("nat", "KUBE-SERVICES") if f"-d {address}/32" in line]
    return rule.split()[-1]


def number_of(node: TracedNode, chain: str, part: str, table: str = "nat") -> int:
    [number] = [number for number, line in enumerate(node.rules(table, chain), 1) if part in line]
    return number


def test_a_deleted_backend_rule(node: TracedNode) -> None:
    """The second of three: the first keeps its third, and the last gets what is left."""
    chain = service_chain(node)
    node.iptables("-t", "nat", "-D", chain, str(number_of(node, chain, "10.0.1.2:8080")))
    differs(node.traced(FROM_POD), "never sends it to 10.0.1.2:8080, which is one of 3 backends")
    agreed(node.traced(STICKY))


def test_the_last_backend_rule_deleted(node: TracedNode) -> None:
    """A third of all connections then is sent on to the cluster IP itself."""
    chain = service_chain(node)
    node.iptables("-t", "nat", "-D", chain, str(number_of(node, chain, "10.180.0.3:8080")))
    differs(
        node.traced(FROM_POD),
        "never sends it to 10.180.0.3:8080",
        r"expected: forwarded; 33.3% of connections: no rule and no virtual server takes it.*172.30.0.41:80",
    )


def test_a_changed_backend(node: TracedNode) -> None:
    chain = service_chain(node)
    number = str(number_of(node, chain, "10.180.0.3:8080"))
    node.iptables("-t", "nat", "-R", chain, number, "-p", "tcp", "-j", "DNAT", "--to-destination", "10.180.0.4:8080")
    differs(
        node.traced(FROM_POD),
        "never sends it to 10.180.0.3:8080",
        r"also sends it to 10.180.0.4:8080 \(33.3%\), which is no backend",
    )


def test_a_changed_port(node: TracedNode) -> None:
    chain = service_chain(node)
    number = str(number_of(node, chain, "10.180.0.3:8080"))
    node.iptables("-t", "nat", "-R", chain, number, "-p", "tcp", "-j", "DNAT", "--to-destination", "10.180.0.3:8081")
    differs(node.traced(FROM_POD), "never sends it to 10.180.0.3:8080", "also sends it to 10.180.0.3:8081")


def test_a_wrong_probability(node: TracedNode) -> None:
    chain = service_chain(node)
    number = str(number_of(node, chain, "10.0.1.1:8080"))
    chance = ("-m", "statistic", "--mode", "random", "--probability", "0.5")
    node.iptables("-t", "nat", "-R", chain, number, "-p", "tcp", *chance, "-j", "DNAT", "--to-destination", "10.0.1.1:8080")
    differs(
        node.traced(FROM_POD),
        "10.0.1.1:8080 gets 50.0% of connections, and should get 33.3%",
        "10.0.1.2:8080 gets 25.0%",
        "10.180.0.3:8080 gets 25.0%",
    )


def test_a_removed_masquerade_jump(node: TracedNode) -> None:
    """Whoever is no pod of the node keeps its source, and gets no answer; pods do not notice."""
    chain = service_chain(node)
    node.iptables("-t", "nat", "-D", chain, str(number_of(node, chain, "KUBE-MARK-MASQ")))
    wrong = [rf"to {backend}:8080 the kernel does not masquerade it, and should" for backend in BACKENDS]
    differs(node.traced(FROM_OUTSIDE), *wrong)
    agreed(node.traced(FROM_POD))


def test_too_much_is_masqueraded(node: TracedNode) -> None:
    node.iptables("-t", "nat", "-I", service_chain(node), "-j", "KUBE-MARK-MASQ")
    wrong = [
        rf"to {backend}:8080 the kernel masquerades it, and should not: rule 4 of chain KUBE-POSTROUTING"
        for backend in BACKENDS
    ]
    differs(node.traced(FROM_POD), *wrong)
    agreed(node.traced(FROM_OUTSIDE))


def test_nothing_leads_to_the_services(node: TracedNode) -> None:
    node.iptables("-t", "nat", "-F", "KUBE-SERVICES")
    for flow in (FROM_POD, AT_NODE_PORT, STICKY):
        differs(node.traced(flow), "expected: forwarded; no rule and no virtual server takes it")
    agreed(node.traced(REJECTED))


def test_the_jump_from_the_built_in_chain_is_gone(node: TracedNode) -> None:
    """Packets of the node itself go by OUTPUT, and are served as before."""
    node.iptables("-t", "nat", "-D", "PREROUTING", "1")
    differs(node.traced(FROM_POD), "no rule and no virtual server takes it")
    agreed(node.traced(Flow("192.168.0.2", CLUSTER_IP, 80, [])))


def test_a_service_without_endpoints_is_not_rejected(node: TracedNode) -> None:
    node.iptables("-F", "KUBE-SERVICES")
    differs(node.traced(REJECTED), "expected: rejected; the kernel's rules: sent out to 172.30.0.43:80")


def test_dropped_instead_of_rejected(node: TracedNode) -> None:
    node.iptables("-I", "FORWARD", "-d", "172.30.0.43", "-j", "DROP")
    differs(node.traced(REJECTED), r"expected: rejected; .*dropped: rule 1 of chain FORWARD \(filter table\)")


def test_a_firewall_of_somebody_else(node: TracedNode) -> None:
    """A network policy: the Service's rules are right, and the packet still does not arrive."""
    node.iptables("-I", "FORWARD", "-d", "10.0.1.2", "-j", "DROP")
    differs(
        node.traced(FROM_POD),
        "never sends it to 10.0.1.2:8080",
        r"33.3% of connections: dropped: rule 1 of chain FORWARD \(filter table\) on its way to 10.0.1.2:8080",
    )


def test_a_redirect_where_there_is_no_service(node: TracedNode) -> None:
    """In a chain of ours it is wrong. Elsewhere (a host port of a CNI plugin) it is only said."""
    rule = ("-d", "172.30.0.99", "-p", "tcp", "-j", "DNAT", "--to-destination", "10.9.9.9:1")
    node.iptables("-t", "nat", "-I", "PREROUTING", *rule)
    trace = node.traced(ELSEWHERE)
    agreed(trace)
    assert any("rule 1 of chain PREROUTING (nat table) sends it to 10.9.9.9:1" in note for note in trace.notes)
    node.iptables("-t", "nat", "-D", "PREROUTING", "1")
    node.iptables("-t", "nat", "-A", "KUBE-SERVICES", *rule)
    differs(node.traced(ELSEWHERE), "no frontend takes it, but rule .* of chain KUBE-SERVICES")


def test_a_match_that_is_not_understood(node: TracedNode) -> None:
    """Nothing is guessed: the walk ends at a rule that is named. One that cannot match, or that does nothing, is passed."""
    node.iptables("-t", "nat", "-I", "PREROUTING", "-d", "1.2.3.4", "-m", "length", "--length", "40:60", "-j", "ACCEPT")
    node.iptables("-t", "nat", "-I", "PREROUTING", "-m", "length", "--length", "40:60", "-j", "LOG")
    agreed(node.traced(FROM_POD))
    node.iptables("-t", "nat", "-I", "PREROUTING", "-m", "length", "--length", "40:60", "-j", "ACCEPT")
    trace = node.traced(FROM_POD)
    assert (trace.agreement, trace.differences) == (Agreement.UNKNOWN, ())
    assert trace.notes == ("unknown from rule 1 of chain PREROUTING (nat table) on: -m length is not understood",)


def test_affinity_holds_a_client(node: TracedNode) -> None:
    """A client that the set of an endpoint remembers goes there; to another endpoint than one of the Service it must not."""
    chain = service_chain(node, STICKY_IP)
    rules = [line for line in node.rules("nat", chain) if "--match-set" in line]
    name = re.search(r"--match-set (\S+) src", rules[1])
    assert name is not None
    node.box.node.run(lambda: IPSets().add(name[1], [POD]))
    try:
        trace = node.traced(STICKY)
        agreed(trace)
        assert trace.kernel is not None
        assert [one.backend for one in trace.kernel.destinations] == ["10.0.1.2:8080"]
        assert any("session affinity" in note and "10.0.1.2:8080" in note for note in trace.notes)
        endpoint_chain = rules[1].split()[-1]
        to = ("-p", "tcp", "-j", "DNAT", "--to-destination", "10.9.9.9:1")
        node.iptables("-t", "nat", "-R", endpoint_chain, "2", *to)
        differs(node.traced(STICKY), "also sends it to 10.9.9.9:1")
    finally:
        node.box.node.run(lambda: IPSets().remove(name[1], [POD]))


def test_the_other_variant_has_rules(node: TracedNode) -> None:
    """A kernel passes the rules of both variants, and so does the walk."""
    other = "nft" if node.way.variant == "legacy" else "legacy"
    tool = [f"iptables-{other}", "-w", "5"]
    node.box.node.command([*tool, "-I", "FORWARD", "-d", "10.0.1.2", "-j", "DROP"])
    try:
        differs(
            node.traced(FROM_POD),
            "never sends it to 10.0.1.2:8080",
            rf"rule 1 of chain FORWARD \(filter \({other}\) table\)",
        )
    finally:
        node.box.node.command([*tool, "-F", "FORWARD"])


def test_rules_of_nftables_itself_are_named(node: TracedNode) -> None:
    """They are not followed, and that is said."""
    node.box.node.command(["nft", "add", "table", "inet", "firewalld"])
    try:
        trace = node.traced(FROM_POD)
    finally:
        node.box.node.command(["nft", "delete", "table", "inet", "firewalld"])
    agreed(trace)
    assert trace.notes == ("nftables' own tables may decide as well, and are not followed: inet firewalld",)


def test_somebody_else_masquerades(node: TracedNode) -> None:
    """A CNI plugin that rewrites sources on the way between pods."""
    node.iptables("-t", "nat", "-N", "CNI-MASQ")
    node.iptables("-t", "nat", "-I", "POSTROUTING", "-s", "10.0.0.0/16", "-o", "eth0", "-j", "CNI-MASQ")
    node.iptables("-t", "nat", "-A", "CNI-MASQ", "-m", "addrtype", "!", "--dst-type", "LOCAL", "-j", "MASQUERADE")
    differs(node.traced(FROM_POD), "to 10.180.0.3:8080 the kernel masquerades it, and should not: rule 1 of chain CNI-MASQ")
