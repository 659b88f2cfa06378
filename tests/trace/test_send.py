"""`--send`: the packet is sent for real, and conntrack says whether the walk was right."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nodeproxy.cluster.addresses import Address
from nodeproxy.cluster.names import Family, IPProtocol
from nodeproxy.kernel.xtables_tools import Variant
from nodeproxy.trace.ends import Target, TraceError
from nodeproxy.trace.live_kernel import LiveKernel
from nodeproxy.trace.results import Agreement, Trace, TracedPacket
from nodeproxy.trace.sent import send
from nodeproxy.trace.text import trace_lines
from nodeproxy.trace.tracer import Tracer
from tests.trace.node import TracedNode, traced_node
from tests.trace.test_broken_rules import BACKENDS, CLUSTER_IP, SCENE
from tests.ways import IPVS_NFT, LEGACY, NFT, Way, ipvs

pytestmark = pytest.mark.kernel


@pytest.fixture(params=[LEGACY, NFT, ipvs(IPVS_NFT)], ids=str)
def node(request: pytest.FixtureRequest) -> Iterator[TracedNode]:
    way: Way = request.param
    with traced_node(SCENE, way) as made:
        yield made


def sent(node: TracedNode, address: str, port: int = 80, protocol: str = "tcp") -> Trace:
    def here() -> Trace:
        target = Target(Address(Family.IPV4, address), port, IPProtocol(protocol))
        with LiveKernel(4, Variant(node.way.variant)) as kernel:
            return Tracer(node.view, lambda _: kernel).trace("node", target, really=True)

    return node.box.node.run(here)


def test_where_it_went(node: TracedNode) -> None:
    """Forwarded to one of the backends, with another source; rejected; dropped."""
    trace = sent(node, CLUSTER_IP)
    assert trace.agreement is Agreement.AGREES
    assert trace.sent is not None
    assert trace.sent.to in {f"{one}:8080" for one in BACKENDS}
    assert (trace.sent.confirms, trace.sent.answers_to is None) == (True, False)
    rejected = sent(node, "172.30.0.43").sent
    assert rejected is not None
    assert (rejected.to, rejected.confirms, rejected.refusal) == (None, True, "ECONNREFUSED")
    node.iptables("-I", "OUTPUT", "-d", "192.0.2.1", "-j", "DROP")
    dropped = sent(node, "192.0.2.1", protocol="udp").sent
    assert dropped is not None
    assert (dropped.to, dropped.confirms) == (None, True)


def test_where_it_went_cannot_be_told(node: TracedNode) -> None:
    """Refused by the destination itself, which leaves no entry; not tracked; without rules for which anything would be."""
    traces = [(sent(node, "127.0.0.1", 9), "ECONNREFUSED"), (untracked(node, "-d", "192.0.2.1"), "")]
    if node.way.mode == "iptables":  # IPVS has connections tracked as well
        traces.append((without_rules(node), ""))
    for trace, refusal in traces:
        assert trace.sent is not None
        assert (trace.sent.to, trace.sent.confirms, trace.sent.refusal) == (None, None, refusal)
        assert (trace.agreement, trace.differences) == (Agreement.AGREES, ())
        assert any("conntrack has no entry" in line for line in trace_lines(trace))


def untracked(node: TracedNode, *match: str) -> Trace:
    rule = ("OUTPUT", *match, "-j", "NOTRACK")
    node.iptables("-t", "raw", "-I", *rule)
    try:
        return sent(node, "192.0.2.1", protocol="udp")
    finally:
        node.iptables("-t", "raw", "-D", *rule)


def without_rules(node: TracedNode) -> Trace:
    for table in ("raw", "mangle", "nat", "filter"):
        node.iptables("-t", table, "-F")
    return sent(node, "192.0.2.1", protocol="udp")


def test_where_the_walk_gets_lost_nothing_is_confirmed_or_denied(node: TracedNode) -> None:
    """A match that is not understood, and never holds, before all else."""
    node.iptables("-t", "raw", "-I", "OUTPUT", "-m", "length", "--length", "1:2", "-j", "ACCEPT")
    for address in (CLUSTER_IP, "172.30.0.43"):
        trace = sent(node, address)
        assert trace.sent is not None
        assert (trace.sent.confirms, trace.sent.to is None) == (None, address != CLUSTER_IP)
        assert (trace.agreement, trace.differences) == (Agreement.UNKNOWN, ())


def test_what_cannot_be_sent() -> None:
    packet = TracedPacket("127.0.0.1", "127.0.0.1", 80, "sctp", 4, True, False, True, "the node itself")
    with pytest.raises(TraceError, match="--send: only TCP and UDP"):
        send(packet, ())
