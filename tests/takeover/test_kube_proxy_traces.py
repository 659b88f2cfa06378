"""What we know of kube-proxy's traces, compared with what the real program leaves."""

from __future__ import annotations

import pytest

from nodeproxy.forwarding.table import Family
from nodeproxy.kernel.ipset import IPSets
from nodeproxy.kernel.ipvs import IPVS, AddVirtualServer, VirtualServer, VirtualServerSettings
from nodeproxy.kernel.nft_tables import NftTables
from nodeproxy.programmer import kube_proxy_traces as traces
from nodeproxy.programmer.ipvs.names import SetName
from nodeproxy.programmer.ipvs.places import OURS
from nodeproxy.programmer.rules.snapshot import TableSnapshot, parse_tables
from nodeproxy.sandbox.topology import BRIDGE, NODE_LINK
from tests.takeover import shop
from tests.takeover.alone import held_by
from tests.takeover.proxies import (
    NO_KUBE_PROXY,
    THEIR_IPVS_NFT,
    THEIR_LEGACY,
    THEIR_NFT,
    THEIR_NFTABLES,
    Node,
    Theirs,
    their_modes,
)
from tests.ways import LEGACY, NFT, Way, needs_ipvs

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(bool(NO_KUBE_PROXY), reason=NO_KUBE_PROXY)]


def tables(node: Node, variant: str, family: Family) -> dict[str, TableSnapshot]:
    tool = "iptables" if family is Family.IPV4 else "ip6tables"
    return parse_tables(node.box.node.command([f"{tool}-{variant}-save"]).stdout)


def jumps_there(kernel: dict[str, TableSnapshot]) -> set[tuple[str, str, str]]:
    """Rules of built-in chains that lead to chains of Kubernetes, but for those to kubelet's."""
    return {
        (table, chain, rule)
        for table, content in kernel.items()
        for chain in content.built_in
        for rule in content.chains[chain]
        if "-j KUBE-" in rule and not rule.endswith("KUBE-FIREWALL")
    }


@pytest.mark.parametrize("theirs", [one for one in their_modes() if "nftables" not in str(one)])
def test_jumps_and_canaries(node: Node, theirs: Theirs) -> None:
    with node.kube_proxy(theirs):
        pass
    for family in (Family.IPV4, Family.IPV6):
        kernel = tables(node, theirs.variant, family)
        assert jumps_there(kernel) == {jump[:3] for jump in traces.JUMPS[theirs.mode]}
        assert traces.kube_proxy_modes(kernel) == {theirs.mode}
        assert traces.kube_proxy_holds(kernel)
        assert traces.kube_proxy_watches(kernel) == (theirs.mode == "iptables")
        reached = traces.reached_by_kube_proxy(kernel)
        chains = {(table, chain) for table, content in kernel.items() for chain in content.chains.keys() - content.built_in}
        unreached = chains - {(table, chain) for table, names in reached.items() for chain in names}
        assert unreached <= {("filter", "KUBE-FIREWALL")}, "that one is kubelet's"


def test_a_kube_proxy_that_has_not_programmed_yet_only_watches(node: Node) -> None:
    """It makes its canaries when it starts, and waits for the API server."""
    node.api.delete("Node", "", shop.NODE)
    with node.nodeproxy(NFT):
        pass
    with node.kube_proxy(THEIR_NFT, synced=False) as kube_proxy:
        kernel = tables(node, "nft", Family.IPV4)
        assert not traces.kube_proxy_holds(kernel)
        assert kube_proxy.running()


@pytest.mark.parametrize(("theirs", "way"), [(THEIR_LEGACY, LEGACY), (THEIR_NFT, NFT)], ids=str)
def test_of_ours_only_what_kube_proxy_uses_is_reached(node: Node, theirs: Theirs, way: Way) -> None:
    """Where kube-proxy programmed on top of ours, it reaches just the chains that it makes on a node of its own."""
    with node.nodeproxy(way):
        assert not traces.kube_proxy_holds(tables(node, way.variant, Family.IPV4))
    with node.kube_proxy(theirs):
        pass
    kernel = tables(node, way.variant, Family.IPV4)
    assert traces.kube_proxy_holds(kernel)
    for table, reached in traces.reached_by_kube_proxy(kernel).items():
        start = f"{theirs.variant}4 {table} :"
        assert reached == {line.removeprefix(start) for line in held_by(theirs) if line.startswith(start)}


def test_nft_tables(node: Node) -> None:
    with node.kube_proxy(THEIR_NFTABLES):
        pass

    def listed() -> list[list[str]]:
        with NftTables() as nft:
            return [nft.list_names(4), nft.list_names(6)]

    assert node.box.node.run(listed) == [[traces.NFT_TABLE]] * 2


def contents(node: Node) -> dict[str, set[str]]:
    def read() -> dict[str, set[str]]:
        with IPSets() as ipsets:
            return {name: {entry.text for entry in ipsets.contents(name).entries} for name in ipsets.list_names("KUBE-")}

    return node.box.node.run(read)


@needs_ipvs
def test_sets_and_virtual_servers(node: Node) -> None:
    with node.kube_proxy(THEIR_IPVS_NFT):
        pass
    lines = node.box.node.command(["ipset", "save"]).stdout.splitlines()
    created = {line.split()[1]: line.split()[2] for line in lines if line.startswith("create")}
    assert created == traces.SETS
    assert {name.of(family) for name in SetName for family in Family}.isdisjoint(traces.KUBE_PROXY_SETS)

    sets = contents(node)
    assert traces.node_port_entries(sets) == {
        *(traces.NodePort(Family.IPV4, "tcp", port) for port in (shop.WEB_PORT, shop.LOCAL_PORT)),
        traces.NodePort(Family.IPV4, "udp", shop.DNS_PORT),
        traces.NodePort(Family.IPV4, "sctp", shop.SCTP_PORT),
        traces.NodePort(Family.IPV6, "tcp", shop.WEB_PORT),
    }

    third_parties = [
        VirtualServer(4, "tcp", shop.NODE_ADDRESS, 5555),
        VirtualServer(4, "tcp", "203.0.113.99", shop.WEB_PORT),
    ]
    ours = VirtualServer(4, "tcp", shop.NODE_ADDRESS, 31000)

    def servers() -> dict[VirtualServer, VirtualServerSettings]:
        with IPVS() as ipvs:
            added = [AddVirtualServer(server, VirtualServerSettings()) for server in third_parties]
            assert ipvs.change([*added, AddVirtualServer(ours, VirtualServerSettings(flags=OURS))]) == {}
            return ipvs.virtual_servers()

    present = node.box.node.run(servers)
    shown = node.box.node.command(["ip", "-o", "address", "show", "dev", "kube-ipvs0"]).stdout
    addresses = {line.split()[3].partition("/")[0] for line in shown.splitlines()}
    own = [shop.NODE_ADDRESS, shop.NODE_ADDRESS6, *NODE_LINK, *BRIDGE]
    assert traces.left_virtual_servers(present, sets, addresses, own) == present.keys() - {*third_parties, ours}
