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


def test_what_cannot_be_sent() -> None:
    packet = TracedPacket("127.0.0.1", "127.0.0.1", 80, "sctp", 4, True, False, True, "the node itself")
    with pytest.raises(TraceError, match="--send: only TCP and UDP"):
        send(packet, ())
