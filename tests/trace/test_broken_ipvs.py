"""Virtual servers and sets that somebody broke, in IPVS mode: a trace names what differs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nodeproxy.kernel.ipset import IPSets
from nodeproxy.kernel.ipvs import IPVS
from nodeproxy.kernel.ipvs_types import (
    AddRealServer,
    AddVirtualServer,
    DeleteRealServer,
    DeleteVirtualServer,
    EditRealServer,
    Operation,
    RealServer,
    VirtualServer,
    VirtualServerSettings,
)
from nodeproxy.sandbox.scene import Flow
from tests.trace.node import TracedNode, traced_node
from tests.trace.test_broken_rules import (
    AT_NODE_PORT,
    BACKENDS,
    CLUSTER_IP,
    ELSEWHERE,
    FROM_OUTSIDE,
    FROM_POD,
    REJECTED,
    SCENE,
    STICKY,
    agreed,
    differs,
)
from tests.ways import IPVS_NFT, needs_ipvs

pytestmark = [pytest.mark.kernel, pytest.mark.ipvs]

SERVER = VirtualServer(4, "tcp", CLUSTER_IP, 80)
UNUSED = Flow(FROM_POD.source, CLUSTER_IP, 81, [])


@pytest.fixture
def node() -> Iterator[TracedNode]:
    with traced_node(SCENE, IPVS_NFT) as made:
        for flow in (FROM_POD, FROM_OUTSIDE, AT_NODE_PORT, STICKY, REJECTED, ELSEWHERE, UNUSED):
            agreed(made.traced(flow))
        yield made


def change(node: TracedNode, *operations: Operation) -> None:
    def there() -> None:
        with IPVS() as ipvs:
            assert not ipvs.change(operations)

    node.box.node.run(there)


def remove(node: TracedNode, name: str, *entries: str) -> None:
    def there() -> None:
        with IPSets() as sets:
            assert not sets.remove(name, entries)

    node.box.node.run(there)


@needs_ipvs
def test_no_virtual_server(node: TracedNode) -> None:
    """The service address is on the node, and so the packet stays there."""
    change(node, DeleteVirtualServer(SERVER))
    differs(
        node.traced(FROM_POD), "expected: forwarded; no rule and no virtual server takes it: it is delivered on this node"
    )
    agreed(node.traced(AT_NODE_PORT))


@needs_ipvs
def test_real_servers(node: TracedNode) -> None:
    """One with weight 0 takes nothing new; another is too much; without any the connection is refused."""
    change(node, EditRealServer(SERVER, RealServer(BACKENDS[0], 8080), 0))
    differs(node.traced(FROM_POD), f"never sends it to {BACKENDS[0]}:8080")
    change(node, EditRealServer(SERVER, RealServer(BACKENDS[0], 8080), 1), AddRealServer(SERVER, RealServer("10.9.9.9", 1)))
    differs(node.traced(FROM_POD), r"also sends it to 10.9.9.9:1 \(25.0%\)")
    change(node, *(DeleteRealServer(SERVER, RealServer(one, 8080)) for one in BACKENDS))
    change(node, DeleteRealServer(SERVER, RealServer("10.9.9.9", 1)))
    differs(node.traced(FROM_POD), "expected: forwarded; rejected: virtual server .* has no real server")


@needs_ipvs
def test_uneven_weights(node: TracedNode) -> None:
    change(node, DeleteVirtualServer(SERVER), AddVirtualServer(SERVER, VirtualServerSettings("wrr")))
    change(
        node,
        *(AddRealServer(SERVER, RealServer(one, 8080), weight) for one, weight in zip(BACKENDS, (2, 1, 1), strict=True)),
    )
    differs(node.traced(FROM_POD), "10.0.1.1:8080 gets 50.0%", "10.0.1.2:8080 gets 25.0%", "10.180.0.3:8080 gets 25.0%")


@needs_ipvs
def test_a_virtual_server_where_there_is_no_service(node: TracedNode) -> None:
    server = VirtualServer(4, "tcp", CLUSTER_IP, 81)
    change(node, AddVirtualServer(server, VirtualServerSettings()), AddRealServer(server, RealServer("10.9.9.9", 1)))
    node.iptables("-I", "INPUT", "-d", CLUSTER_IP, "-j", "ACCEPT")
    differs(node.traced(UNUSED), "no frontend takes it, but a virtual server sends it to 10.9.9.9:1")


@needs_ipvs
def test_removed_set_entries(node: TracedNode) -> None:
    entry = f"{CLUSTER_IP},tcp:80"
    remove(node, "KUBE-CLUSTER-IP", entry)
    differs(node.traced(FROM_POD), r"expected: forwarded; rejected: rule \d+ of chain KUBE-IPVS-FILTER")
    remove(node, "KUBE-REJECTED", "172.30.0.43,tcp:80")
    agreed(node.traced(REJECTED))  # what no Service takes at a service address is rejected as well
    remove(node, "KUBE-MASQUERADED", "192.168.0.2,tcp:30041")
    wrong = [rf"to {backend}:8080 the kernel does not masquerade it, and should" for backend in BACKENDS]
    differs(node.traced(AT_NODE_PORT), *wrong)
