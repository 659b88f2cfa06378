"""Owns what the rules of iptables mode have in addition while service addresses that IPVS mode left are on the node.

Connections that IPVS carries need those addresses until they end (see `programmer.ipvs.withdrawal`). Meanwhile a packet to
such an address that no Service takes would reach the node's own processes, and one that the node itself sends to a Service
carries such an address as its source, to which no other node would send an answer.
"""

from __future__ import annotations

from nodeproxy.forwarding.table import Family
from nodeproxy.programmer.ipvs.names import SetName
from nodeproxy.programmer.rules.chains import Jump
from nodeproxy.programmer.rules.names import IPVS_FILTER, MARK_MASQ, SERVICES

JUMP = Jump(
    "filter",
    "INPUT",
    f'-m conntrack --ctstate NEW -m comment --comment "kubernetes ipvs access filter" -j {IPVS_FILTER}',
    True,
)


def access_filter(family: Family) -> list[str]:
    """The chain in the filter table: what Services answer comes first; the rest is rejected, but for pings."""
    icmp, reject = ("icmp", "icmp") if family is Family.IPV4 else ("ipv6-icmp", "icmp6")
    return [
        "-m conntrack ! --ctstate NEW -j RETURN",
        f"-m set ! --match-set {SetName.SERVICE_ADDRESSES.of(family)} dst -j RETURN",
        f"-p {icmp} -j RETURN",
        f"-j {SERVICES}",
        f"-j REJECT --reject-with {reject}-port-unreachable",
    ]


def masquerade_service_addresses(family: Family) -> str:
    """The rule of the nat table for the node's own packets."""
    return f"-m set --match-set {SetName.SERVICE_ADDRESSES.of(family)} src -j {MARK_MASQ}"
