"""Owns the small fixed part of the rules: jumps from the built-in chains, masquerading, forwarding, node-port entry.

None of it depends on Services. `Jump`s are single rules in chains that are not ours (built-in ones, and KUBE-FIREWALL which
kubelet may share): they are added where missing and never displace anything.
"""

from __future__ import annotations

import ipaddress

from nodeproxy.forwarding.table import Family
from nodeproxy.programmer.base import NodePortAddresses, ProgrammerConfig
from nodeproxy.programmer.iptables import draining
from nodeproxy.programmer.rules.chains import Jump
from nodeproxy.programmer.rules.common import Features, forward_chain, mark_chain, postrouting_chain, same_addresses
from nodeproxy.programmer.rules.names import (
    EXTERNAL_SERVICES,
    FIREWALL,
    FORWARD,
    IPVS_FILTER,
    MARK_MASQ,
    NODE_PORTS,
    POSTROUTING,
    PROXY_FIREWALL,
    SERVICES,
)

# Only what is new and was not sent on by a Service already is looked at; one match for both.
_NEW_NOT_FORWARDED = "-m conntrack ! --ctstate INVALID,RELATED,ESTABLISHED,UNTRACKED,DNAT"

_LOOPBACK = {Family.IPV4: "127.0.0.0/8", Family.IPV6: "::1/128"}


def jumps(family: Family, config: ProgrammerConfig) -> list[Jump]:
    """The rules that lead packets from the built-in chains to ours."""

    def comment(text: str) -> str:
        return f'-m comment --comment "{text}"'

    # By way of KUBE-PROXY-FIREWALL, because that is the one chain of the filter table that a kube-proxy of any mode rewrites
    # when it takes the node back: what we refused here is refused no longer.
    portals = f"{_NEW_NOT_FORWARDED} {comment('kubernetes service portals')} -j {PROXY_FIREWALL}"
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
    if config.draining_addresses:
        result.append(draining.JUMP)
    return result


def hairpin_rule(family: Family) -> str:
    """Match for what a Service sent back to where it came from."""
    return f'-m conntrack --ctstate DNAT -m comment --comment "kubernetes hairpin traffic" {same_addresses(family)}'


def fixed_chains(family: Family, config: ProgrammerConfig, features: Features) -> dict[str, dict[str, list[str]]]:
    """Chains of ours with fixed content, by table."""
    access = {IPVS_FILTER: draining.access_filter(family)} if config.draining_addresses else {}
    return {
        "nat": {
            MARK_MASQ: mark_chain(config),
            POSTROUTING: postrouting_chain(config, features, [hairpin_rule(family)] if features.bpf else []),
        },
        "filter": {FORWARD: forward_chain(config), PROXY_FIREWALL: [f"-j {SERVICES}"], **access},
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
