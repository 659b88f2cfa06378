"""Owns the knowledge of what kube-proxy 1.36 leaves in the kernel in each of its modes, and how it is told from ours. Pure.

Sources, in k8s.io/kubernetes v1.36: pkg/proxy/iptables/proxier.go (iptablesJumpChains), pkg/proxy/ipvs/proxier.go
(iptablesJumpChain, iptablesChains), pkg/proxy/ipvs/ipset.go (names of sets, cut at 31 characters in IPv6),
pkg/proxy/nftables/proxier.go (kubeProxyTable), pkg/util/iptables/iptables.go (Monitor).
`tests/takeover` compares all of it with the real program.

What a kube-proxy does when it finds what we left: it rewrites the chains and sets that have its names, and in IPVS mode it
deletes every virtual server and every address of kube-ipvs0 that it does not want. All else it leaves. In iptables mode it
deletes chains KUBE-SVC-, KUBE-SVL-, KUBE-EXT-, KUBE-FW-, KUBE-SEP- that it does not want from the nat table, in the same
transaction as everything else: one that another chain still leads to makes its every sync fail.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from nodeproxy.forwarding.table import Family
from nodeproxy.kernel.ipvs import VirtualServer, VirtualServerSettings
from nodeproxy.programmer.ipvs.names import SetName
from nodeproxy.programmer.ipvs.places import OURS
from nodeproxy.programmer.rules.chains import Jump
from nodeproxy.programmer.rules.names import FORWARD, NODE_PORT_ACCEPT, NODE_PORTS, POSTROUTING, PROXY_FIREWALL, SERVICES
from nodeproxy.programmer.rules.snapshot import TableSnapshot

NFT_TABLE: Final = "kube-proxy"
"""The one table of nftables mode, in each of the families ip and ip6."""

CANARY: Final = "KUBE-PROXY-CANARY"
"""An empty chain of iptables mode in mangle, nat and filter, made when kube-proxy starts, before it has programmed anything.

Every --iptables-sync-period (30 s) kube-proxy looks for the one in mangle. Where it is gone, it waits until those in nat and
filter are gone, too, for 5 s at most, programs everything anew, jumps included, and makes the canaries again. IPVS mode has
no canary: it puts back jumps and chains with each sync. KUBE-KUBELET-CANARY is kubelet's.
"""

_LONGEST_SET_NAME: Final = 31

_SETS: Final = {
    "KUBE-LOOP-BACK": "hash:ip,port,ip",
    "KUBE-CLUSTER-IP": "hash:ip,port",
    "KUBE-EXTERNAL-IP": "hash:ip,port",
    "KUBE-EXTERNAL-IP-LOCAL": "hash:ip,port",
    "KUBE-LOAD-BALANCER": "hash:ip,port",
    "KUBE-LOAD-BALANCER-FW": "hash:ip,port",
    "KUBE-LOAD-BALANCER-LOCAL": "hash:ip,port",
    "KUBE-LOAD-BALANCER-SOURCE-IP": "hash:ip,port,ip",
    "KUBE-LOAD-BALANCER-SOURCE-CIDR": "hash:ip,port,net",
    "KUBE-NODE-PORT-TCP": "bitmap:port",
    "KUBE-NODE-PORT-LOCAL-TCP": "bitmap:port",
    "KUBE-NODE-PORT-UDP": "bitmap:port",
    "KUBE-NODE-PORT-LOCAL-UDP": "bitmap:port",
    "KUBE-NODE-PORT-SCTP-HASH": "hash:ip,port",
    "KUBE-NODE-PORT-LOCAL-SCTP-HASH": "hash:ip,port",
    "KUBE-HEALTH-CHECK-NODE-PORT": "bitmap:port",
    "KUBE-IPVS-IPS": "hash:ip",
}
_NODE_PORT_SETS: Final = {
    "KUBE-NODE-PORT-TCP": "tcp",
    "KUBE-NODE-PORT-LOCAL-TCP": "tcp",
    "KUBE-NODE-PORT-UDP": "udp",
    "KUBE-NODE-PORT-LOCAL-UDP": "udp",
    "KUBE-NODE-PORT-SCTP-HASH": "sctp",
    "KUBE-NODE-PORT-LOCAL-SCTP-HASH": "sctp",
}
_PLACE_SETS: Final = (
    *("KUBE-CLUSTER-IP", "KUBE-EXTERNAL-IP", "KUBE-EXTERNAL-IP-LOCAL"),
    *("KUBE-LOAD-BALANCER", "KUBE-LOAD-BALANCER-LOCAL"),
)


def _in_family(name: str, family: Family) -> str:
    return name if family is Family.IPV4 else name.replace("KUBE-", "KUBE-6-", 1)[:_LONGEST_SET_NAME]


SETS: Final[Mapping[str, str]] = {
    _in_family(name, family): kind for family in (Family.IPV4, Family.IPV6) for name, kind in _SETS.items()
}
"""Names of all ipsets of IPVS mode, of both families, with their types. Hash sets hold 65536 entries; ones of these names
that hold another number stop kube-proxy's IPVS mode from ever syncing (`ipset create -exist` refuses them)."""

KUBE_PROXY_SETS: Final = frozenset(SETS) - {name.of(family) for name in SetName for family in Family}
"""Those that we never use."""


def _jump(table: str, chain: str, target: str, comment: str, *, new: bool = False) -> Jump:
    state = "-m conntrack --ctstate NEW " if new else ""
    return Jump(table, chain, f'{state}-m comment --comment "{comment}" -j {target}', True)


_PORTALS, _EXTERNAL = "kubernetes service portals", "kubernetes externally-visible service portals"
_BOTH_MODES: Final = frozenset(
    {
        _jump("nat", "PREROUTING", SERVICES, _PORTALS),
        _jump("nat", "OUTPUT", SERVICES, _PORTALS),
        _jump("nat", "POSTROUTING", POSTROUTING, "kubernetes postrouting rules"),
        _jump("filter", "FORWARD", FORWARD, "kubernetes forwarding rules"),
    }
)
_FIREWALL_JUMPS: Final = {
    "iptables": frozenset(
        _jump("filter", chain, PROXY_FIREWALL, "kubernetes load balancer firewall", new=True)
        for chain in ("INPUT", "OUTPUT", "FORWARD")
    ),
    "ipvs": frozenset(_jump("filter", chain, PROXY_FIREWALL, "kube-proxy firewall rules") for chain in ("INPUT", "FORWARD")),
}

JUMPS: Final[Mapping[str, frozenset[Jump]]] = {
    "iptables": _BOTH_MODES
    | _FIREWALL_JUMPS["iptables"]
    | {
        _jump("filter", "INPUT", NODE_PORTS, "kubernetes health check service ports"),
        _jump("filter", "INPUT", "KUBE-EXTERNAL-SERVICES", _EXTERNAL, new=True),
        _jump("filter", "FORWARD", "KUBE-EXTERNAL-SERVICES", _EXTERNAL, new=True),
        _jump("filter", "FORWARD", SERVICES, _PORTALS, new=True),
        _jump("filter", "OUTPUT", SERVICES, _PORTALS, new=True),
    },
    "ipvs": _BOTH_MODES
    | _FIREWALL_JUMPS["ipvs"]
    | {
        _jump("filter", "INPUT", NODE_PORT_ACCEPT, "kubernetes health check rules"),
        _jump("filter", "INPUT", "KUBE-IPVS-FILTER", "kubernetes ipvs access filter"),
        _jump("filter", "OUTPUT", "KUBE-IPVS-OUT-FILTER", "kubernetes ipvs access filter"),
    },
}
"""Rules that kube-proxy puts first into the built-in chains, by mode, as iptables-save prints them. Some are ours as well.

Those that lead to KUBE-FIREWALL are not among them: that chain is kubelet's, and kube-proxy only makes it where it is not
there (empty in IPv6), and never removes it.
"""


_SOMETIMES_REACHED: Final = {("ipvs", "nat"): ("KUBE-LOAD-BALANCER",), ("ipvs", "filter"): ("KUBE-SOURCE-RANGES-FIREWALL",)}
"""Chains that kube-proxy keeps also while no rule leads there, by mode and table."""


class NodePort(NamedTuple):
    """A port that kube-proxy serves at addresses of the node; protocol as `tcp`, `udp`, `sctp`."""

    family: Family
    protocol: str
    port: int


def kube_proxy_watches(tables: Mapping[str, TableSnapshot]) -> bool:
    """Whether a kube-proxy in iptables mode started since nodeproxy removed the canaries; it need not have programmed."""
    return any(CANARY in tables[table].chains for table in ("mangle", "nat", "filter") if table in tables)


def kube_proxy_modes(tables: Mapping[str, TableSnapshot]) -> frozenset[str]:
    """In which modes (iptables, ipvs) kube-proxy has programmed since nodeproxy took over: by jumps that only it has.

    Both where kube-proxy itself was switched: it does not remove what its other mode left.
    """
    present = tables["filter"].chains if "filter" in tables else {}
    return frozenset(
        mode for mode, jumps in _FIREWALL_JUMPS.items() if any(jump.rule in present.get(jump.chain, ()) for jump in jumps)
    )


def kube_proxy_holds(tables: Mapping[str, TableSnapshot]) -> bool:
    """Whether kube-proxy, not nodeproxy, made full use of the chains last. `tables` are those of one family and variant.

    A full pass of ours removes the jumps that tell. A kube-proxy in iptables mode that lives on beside us does not put them
    back with each sync, only with full ones: there `kube_proxy_watches` tells more.
    """
    return bool(kube_proxy_modes(tables))


def reached_by_kube_proxy(tables: Mapping[str, TableSnapshot]) -> dict[str, set[str]]:
    """Chains, by table, that kube-proxy uses in the modes that hold: where its jumps lead, and what it keeps besides.

    Any other chain that is ours by name is of no use to it.
    """
    modes = kube_proxy_modes(tables)
    reached = {}
    for table, kernel in tables.items():
        starts = [CANARY, *(chain for mode in modes for chain in _SOMETIMES_REACHED.get((mode, table), ()))]
        for jump in (jump for mode in modes for jump in JUMPS[mode]):
            if jump.table == table and jump.rule in kernel.chains.get(jump.chain, ()):
                starts += _targets([jump.rule])
        reached[table] = set(_reached(starts, kernel))
    return reached


def _reached(starts: Iterable[str], kernel: TableSnapshot) -> Iterator[str]:
    ahead = list(starts)
    seen: set[str] = set()
    while ahead:
        chain = ahead.pop()
        if chain in kernel.chains and chain not in seen:
            seen.add(chain)
            yield chain
            ahead += _targets(kernel.chains[chain])


def _targets(rules: Iterable[str]) -> Iterator[str]:
    for rule in rules:
        for option in (" -j ", " -g "):
            if option in f" {rule}":
                yield f" {rule}".rpartition(option)[2].partition(" ")[0]


def node_port_entries(sets: Mapping[str, Iterable[str]]) -> frozenset[NodePort]:
    """The node ports that kube-proxy's own sets hold, given the entries (text) of sets by name; other sets are ignored."""
    found = set()
    for family in (Family.IPV4, Family.IPV6):
        for name, protocol in _NODE_PORT_SETS.items():
            for text in sets.get(_in_family(name, family), ()):
                port = text.rpartition(":")[2]  # `30080` of a bitmap, `ADDRESS,sctp:30080` of a hash
                if port.isdecimal():
                    found.add(NodePort(family, protocol, int(port)))
    return frozenset(found)


def left_virtual_servers(
    servers: Mapping[VirtualServer, VirtualServerSettings],
    sets: Mapping[str, Iterable[str]],
    service_addresses: Collection[str],
    node_addresses: Collection[str],
) -> set[VirtualServer]:
    """Which virtual servers are kube-proxy's, among those of a node: not ours by flag, and

    - at an address of kube-ipvs0 (`service_addresses`), or
    - at one of the node's own addresses, on a port that kube-proxy's sets name for node ports, or
    - where its sets name address and port (an external IP may be the node's own address).

    Those of third parties are none of these. `sets`: the entries (text) of sets by name, as kube-proxy left them.
    """
    node_ports = node_port_entries(sets)
    places = {
        text
        for family in (Family.IPV4, Family.IPV6)
        for name in _PLACE_SETS
        for text in sets.get(_in_family(name, family), ())
    }
    return {
        server
        for server, settings in servers.items()
        if not settings.flags & OURS
        and (
            server.address in service_addresses
            or f"{server.address},{server.protocol}:{server.port}" in places
            or (
                server.address in node_addresses
                and NodePort(Family(server.family), server.protocol, server.port) in node_ports
            )
        )
    }
