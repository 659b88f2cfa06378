"""Owns the rules around IPVS: a small fixed set that looks into ipsets, and the redirects.

A packet to a service address is delivered locally, because the address is on the dummy interface. What it meets on the way,
with the priority of each hook (include/uapi/linux/netfilter_ipv4.h; IPVS: net/netfilter/ipvs/ip_vs_core.c):

    PREROUTING: mangle -150 (source ranges), nat -100 (marks for masquerading, redirects)
    INPUT:      filter 0 (drop, reject), IPVS 98
    OUTPUT:     mangle -150, nat -100, IPVS -98, filter 0      for packets of the node itself

IPVS sends what it has rewritten out by OUTPUT and POSTROUTING, where it is masqueraded. All rules are about new connections.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nodeproxy.forwarding.table import Family
from nodeproxy.kernel.ipvs import VirtualServer
from nodeproxy.programmer.base import ProgrammerConfig
from nodeproxy.programmer.ipvs.names import SetName
from nodeproxy.programmer.ipvs.places import Target
from nodeproxy.programmer.rules.chains import Jump
from nodeproxy.programmer.rules.common import (
    FROM_NODE,
    Features,
    forward_chain,
    mark_chain,
    postrouting_chain,
    same_addresses,
    source_matches,
)
from nodeproxy.programmer.rules.names import (
    FORWARD,
    IPVS_FILTER,
    MARK_MASQ,
    NODE_PORT_ACCEPT,
    POSTROUTING,
    PROXY_FIREWALL,
    REDIRECTS,
    SERVICES,
    SHORT_CUTS,
)

TABLES = ("mangle", "nat", "filter")
"""In the order in which they are restored: fences before ways."""

_NEW = "-m conntrack --ctstate NEW"
_NOT_LOOPBACK = "! -o lo"


def jumps() -> list[Jump]:
    """The rules that lead packets from the built-in chains to ours."""

    def jump(table: str, chain: str, match: str, comment: str, target: str) -> Jump:
        parts = (match, f'-m comment --comment "{comment}"', f"-j {target}")
        return Jump(table, chain, " ".join(part for part in parts if part), True)

    return [
        jump("mangle", "PREROUTING", _NEW, "kubernetes load balancer firewall", PROXY_FIREWALL),
        jump("mangle", "OUTPUT", _NEW, "kubernetes load balancer firewall", PROXY_FIREWALL),
        jump("nat", "PREROUTING", "", "kubernetes service portals", SERVICES),
        jump("nat", "OUTPUT", "", "kubernetes service portals", SERVICES),
        jump("nat", "POSTROUTING", "", "kubernetes postrouting rules", POSTROUTING),
        jump("filter", "INPUT", "", "kubernetes health check service ports", NODE_PORT_ACCEPT),
        jump("filter", "INPUT", _NEW, "kubernetes ipvs access filter", IPVS_FILTER),
        jump("filter", "OUTPUT", _NEW, "kubernetes ipvs access filter", IPVS_FILTER),
        jump("filter", "FORWARD", "", "kubernetes forwarding rules", FORWARD),
    ]


def chains(
    family: Family,
    config: ProgrammerConfig,
    features: Features,
    short_cuts: Mapping[VirtualServer, Target],
    redirects: Mapping[VirtualServer, Target],
) -> dict[str, dict[str, list[str]]]:
    """Every chain of ours, by table."""
    return {
        "mangle": {PROXY_FIREWALL: [_firewall(family)]},
        "nat": {
            MARK_MASQ: mark_chain(config),
            SERVICES: list(_services(family, config)),
            POSTROUTING: postrouting_chain(config, features, [_hairpin(family, features)]),
            **redirect_chains(short_cuts, redirects),
        },
        "filter": {
            NODE_PORT_ACCEPT: [f"-p tcp {_in_set(SetName.HEALTH_CHECK_PORTS, family, 'dst')} -j ACCEPT"],
            IPVS_FILTER: list(_filter(family)),
            FORWARD: forward_chain(config),
        },
    }


def redirect_chains(
    short_cuts: Mapping[VirtualServer, Target], redirects: Mapping[VirtualServer, Target]
) -> dict[str, list[str]]:
    """The chains of the nat table that depend on Services."""
    return {
        SHORT_CUTS: [_redirect(at, target) for at, target in sorted(short_cuts.items(), key=_by_place)],
        REDIRECTS: [_redirect(at, target) for at, target in sorted(redirects.items(), key=_by_place)],
    }


def _by_place(item: tuple[VirtualServer, Target]) -> tuple[str, str, int]:
    at = item[0]
    return at.address, at.protocol, at.port


def _redirect(at: VirtualServer, target: Target) -> str:
    if at.family == 6:
        destination, to = f"{at.address}/128", f"[{target.address}]:{target.port}"
    else:
        destination, to = f"{at.address}/32", f"{target.address}:{target.port}"
    return f"-d {destination} -p {at.protocol} -m {at.protocol} --dport {at.port} -j DNAT --to-destination {to}"


def _in_set(name: SetName, family: Family, flags: str = "dst,dst") -> str:
    return f"-m set --match-set {name.of(family)} {flags}"


def _not_in_set(name: SetName, family: Family, flags: str = "dst,dst") -> str:
    return f"-m set ! --match-set {name.of(family)} {flags}"


def _firewall(family: Family) -> str:
    fenced = _in_set(SetName.FIREWALLED, family)
    return f"{fenced} {_not_in_set(SetName.ALLOWED_SOURCES, family, 'dst,dst,src')} -j DROP"


def _services(family: Family, config: ProgrammerConfig) -> Iterator[str]:
    local_pods, others = source_matches(family, config.local_detector)
    short_cut = _in_set(SetName.SHORT_CUT, family)
    if local_pods is not None:
        yield f"{local_pods} {short_cut} -j {SHORT_CUTS}"
    yield f"{FROM_NODE} {short_cut} -j {MARK_MASQ}"
    yield f"{FROM_NODE} {short_cut} -j {SHORT_CUTS}"
    yield f"{_in_set(SetName.MASQUERADED, family)} -j {MARK_MASQ}"
    cluster_ip = _in_set(SetName.CLUSTER_IP, family)
    if others is not None:
        yield f"{' '.join(part for part in others if part)} {cluster_ip} -j {MARK_MASQ}"
    # The node's own packets to a service address carry such an address as their source, unless they were bound to another:
    # no answer would come back to it.
    yield f"{_in_set(SetName.SERVICE_ADDRESSES, family, 'src')} {cluster_ip} -j {MARK_MASQ}"
    yield f"{_in_set(SetName.REDIRECTED, family)} -j {REDIRECTS}"


def _hairpin(family: Family, features: Features) -> str:
    comment = '-m comment --comment "kubernetes hairpin traffic"'
    if features.bpf:
        return f"{_NOT_LOOPBACK} {comment} {same_addresses(family)}"
    return f"{_NOT_LOOPBACK} {comment} {_in_set(SetName.LOOP_BACK, family, 'dst,dst,src')}"


def _filter(family: Family) -> Iterator[str]:
    reject = "icmp-port-unreachable" if family is Family.IPV4 else "icmp6-port-unreachable"
    icmp = "icmp" if family is Family.IPV4 else "ipv6-icmp"
    # Also here, because a kube-proxy that takes the node back leads everything to this chain before it rewrites it.
    yield "-m conntrack ! --ctstate NEW -j RETURN"
    yield f"{_in_set(SetName.DROPPED, family)} -j DROP"
    yield f"{_in_set(SetName.REJECTED, family)} -j REJECT --reject-with {reject}"
    # No process of the node is reached at a service address, whatever port it listens on; but it can be pinged.
    yield f"{_not_in_set(SetName.SERVICE_ADDRESSES, family, 'dst')} -j RETURN"
    yield f"-p {icmp} -j RETURN"
    for name in (SetName.CLUSTER_IP, SetName.MASQUERADED, SetName.SOURCE_KEPT):
        yield f"{_in_set(name, family)} -j RETURN"
    yield f"-j REJECT --reject-with {reject}"
