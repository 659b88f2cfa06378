"""Owns the small fixed part of the rules: jumps from the built-in chains, masquerading, forwarding, node-port entry.

None of it depends on Services. `Jump`s are single rules in chains that are not ours (built-in ones, and KUBE-FIREWALL which
kubelet may share): they are added where missing and never displace anything.
"""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

from nodeproxy.forwarding.table import Family
from nodeproxy.programmer.base import NodePortAddresses, ProgrammerConfig
from nodeproxy.programmer.iptables.names import (
    EXTERNAL_SERVICES,
    FIREWALL,
    FORWARD,
    MARK_MASQ,
    NODE_PORTS,
    POSTROUTING,
    SERVICES,
)

# Only what is new and was not sent on by a Service already is looked at; one match for both.
_NEW_NOT_FORWARDED = "-m conntrack ! --ctstate INVALID,RELATED,ESTABLISHED,UNTRACKED,DNAT"

# Classic BPF (linux/filter.h), offsets from the IP header: accept where source and destination address are equal. This one
# program recognises every hairpin (a pod that a Service sent back to itself), where kube-proxy has a rule per endpoint.
_SAME_ADDRESSES = {
    Family.IPV4: "6,32 0 0 12,7 0 0 0,32 0 0 16,29 0 1 0,6 0 0 65535,6 0 0 0",
    Family.IPV6: (
        "18,32 0 0 8,7 0 0 0,32 0 0 24,29 0 13 0,32 0 0 12,7 0 0 0,32 0 0 28,29 0 9 0,"
        "32 0 0 16,7 0 0 0,32 0 0 32,29 0 5 0,32 0 0 20,7 0 0 0,32 0 0 36,29 0 1 0,6 0 0 65535,6 0 0 0"
    ),
}
_LOOPBACK = {Family.IPV4: "127.0.0.0/8", Family.IPV6: "::1/128"}


RANDOM_FULLY = "-j MASQUERADE --random-fully"


class Features(NamedTuple):
    """What this kernel and its tools can do: MASQUERADE --random-fully, and BPF matches (for the one hairpin rule)."""

    random_fully: bool = True
    bpf: bool = True


class Jump(NamedTuple):
    """A rule that must be in a chain that is not ours: first in it (`prepend`), or anywhere."""

    table: str
    chain: str
    rule: str
    prepend: bool


def jumps(family: Family, config: ProgrammerConfig) -> list[Jump]:
    """The rules that lead packets from the built-in chains to ours."""

    def comment(text: str) -> str:
        return f'-m comment --comment "{text}"'

    portals = f"{_NEW_NOT_FORWARDED} {comment('kubernetes service portals')} -j {SERVICES}"
    result = [
        Jump("nat", "PREROUTING", f"{comment('kubernetes service portals')} -j {SERVICES}", True),
        Jump("nat", "OUTPUT", f"{comment('kubernetes service portals')} -j {SERVICES}", True),
        Jump("nat", "POSTROUTING", f"{comment('kubernetes postrouting rules')} -j {POSTROUTING}", True),
        Jump("filter", "INPUT", f"{comment('kubernetes health check service ports')} -j {NODE_PORTS}", True),
        Jump("filter", "FORWARD", f"{comment('kubernetes forwarding rules')} -j {FORWARD}", True),
        Jump("filter", "INPUT", portals, True),
        Jump("filter", "FORWARD", portals, True),
        Jump("filter", "OUTPUT", portals, True),
    ]
    if family is Family.IPV4 and config.node_port_addresses[family].loopback:
        # route_localnet lets 127/8 in from outside; only replies and what a Service sent there may pass (CVE-2020-8558).
        martians = "! -s 127.0.0.0/8 -d 127.0.0.0/8 " + comment("block incoming localnet connections")
        result += [
            Jump("filter", FIREWALL, f"{martians} -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP", False),
            Jump("filter", "INPUT", f"-j {FIREWALL}", True),
            Jump("filter", "OUTPUT", f"-j {FIREWALL}", True),
        ]
    return result


def hairpin_rule(family: Family) -> str:
    """Match for what a Service sent back to where it came from."""
    return (
        f'-m conntrack --ctstate DNAT -m comment --comment "kubernetes hairpin traffic" '
        f'-m bpf --bytecode "{_SAME_ADDRESSES[family]}"'
    )


def fixed_chains(family: Family, config: ProgrammerConfig, features: Features) -> dict[str, dict[str, list[str]]]:
    """Chains of ours with fixed content, by table."""
    bit = 1 << config.masquerade_bit
    mark = f"{bit:#x}/{bit:#x}"
    masquerade = RANDOM_FULLY if features.random_fully else "-j MASQUERADE"
    forward = [
        f'-m comment --comment "kubernetes forwarding rules" -m mark --mark {mark} -j ACCEPT',
        '-m comment --comment "kubernetes forwarding conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT',
    ]
    if not config.conntrack_tcp_be_liberal:
        forward.insert(0, "-m conntrack --ctstate INVALID -j DROP")
    return {
        "nat": {
            MARK_MASQ: [f"-j MARK --set-xmark {mark}"],
            POSTROUTING: [
                *([f"{hairpin_rule(family)} {masquerade}"] if features.bpf else []),
                f"-m mark ! --mark {mark} -j RETURN",
                f"-j MARK --set-xmark {bit:#x}/0x0",
                f'-m comment --comment "kubernetes service traffic requiring SNAT" {masquerade}',
            ],
        },
        "filter": {FORWARD: forward},
    }


def node_port_entry(family: Family, addresses: NodePortAddresses, chain: str) -> list[str]:
    """Rules that end the chain KUBE-SERVICES: what goes to a local address that serves node ports jumps to `chain`."""
    local = f'-m comment --comment "kubernetes service nodeports" -m addrtype --dst-type LOCAL -j {chain}'
    loopback = _LOOPBACK[family]
    serves_loopback = family is Family.IPV4 and addresses.loopback
    if addresses.cidrs is None:
        return [local] if serves_loopback else [f"! -d {loopback} {local}"]
    networks = [ipaddress.ip_network(cidr) for cidr in addresses.cidrs]
    if not serves_loopback:
        own = ipaddress.ip_network(loopback)
        networks = [network for network in networks if not _within(network, own)]
        if any(_within(own, network) for network in networks):
            return [f"-d {loopback} -j RETURN", *(f"-d {network} {local}" for network in networks)]
    return [f"-d {network} {local}" for network in networks]


def _within(
    inner: ipaddress.IPv4Network | ipaddress.IPv6Network, outer: ipaddress.IPv4Network | ipaddress.IPv6Network
) -> bool:
    return inner.version == outer.version and inner.subnet_of(outer)  # type: ignore[arg-type]


NODE_PORT_CHAIN = {"nat": NODE_PORTS, "filter": EXTERNAL_SERVICES}
"""Where node ports are dispatched: in the filter table KUBE-NODEPORTS holds health-check ports, as with kube-proxy."""
