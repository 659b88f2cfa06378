"""Owns what the agent finds out about its node, and the programmer's configuration made from it."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from pathlib import Path

import structlog

from nodeproxy.cluster.checked import CheckedNode
from nodeproxy.configuration.addresses import by_family
from nodeproxy.configuration.agent_config import PRIMARY, AgentConfig, Mode
from nodeproxy.forwarding.table import Family
from nodeproxy.kernel.addresses import local_addresses
from nodeproxy.kernel.errors import KernelError
from nodeproxy.programmer.base import DetectLocalMode, LocalDetector, NodePortAddresses, ProgrammerConfig
from nodeproxy.programmer.ipvs.names import DEVICE

_log = structlog.get_logger(__name__)

NOT_THE_NODES = (DEVICE,)
"""Interfaces whose addresses are not the node's own."""

_LOOPBACK = {Family.IPV4: "127.0.0.0/8", Family.IPV6: "::1/128"}


def available_families() -> tuple[Family, ...]:
    """Families that this node's kernel has. IPv6 can be compiled out or disabled (ipv6.disable=1)."""
    if Path("/proc/net/if_inet6").exists():
        return (Family.IPV4, Family.IPV6)
    _log.info("no IPv6 on this node: only IPv4 is programmed")
    return (Family.IPV4,)


def own_addresses() -> list[str]:
    """The addresses of this node now, as `usable_addresses`; none where the kernel does not tell."""
    try:
        return usable_addresses(local_addresses(excluding=NOT_THE_NODES))
    except KernelError as error:
        _log.warning("cannot read local addresses", error=str(error))
        return []


def usable_addresses(addresses: Iterable[str]) -> list[str]:
    """Sorted, and without loopback and link-local ones (those come and go with every pod)."""
    return sorted({address for address in addresses if not _is_loopback_or_link_local(address)})


def _is_loopback_or_link_local(text: str) -> bool:
    address = ipaddress.ip_address(text)
    return address.is_loopback or address.is_link_local


def programmer_config(
    config: AgentConfig, mode: Mode, families: Sequence[Family], node: CheckedNode | None, *, draining: bool = False
) -> ProgrammerConfig:
    """What a programmer needs to know. `node` is None as long as no Node object tells of this node. `draining`: see
    `ProgrammerConfig.draining_addresses`.

    Node ports on loopback are only for iptables mode: IPVS refuses packets of a loopback source that leave the node.
    """
    loopback = config.localhost_node_ports and mode is Mode.IPTABLES
    return ProgrammerConfig(
        families=tuple(families),
        local_detector=_local_detector(config, node),
        node_port_addresses={family: _node_port_addresses(config, family, node, loopback) for family in families},
        masquerade_bit=config.masquerade_bit,
        conntrack_tcp_be_liberal=config.conntrack_tcp_be_liberal,
        draining_addresses=draining,
    )


def _local_detector(config: AgentConfig, node: CheckedNode | None) -> LocalDetector:
    match config.detect_local_mode:
        case DetectLocalMode.BRIDGE_INTERFACE:
            return LocalDetector(interface=config.pod_bridge_interface)
        case DetectLocalMode.INTERFACE_NAME_PREFIX:
            return LocalDetector(interface_prefix=config.pod_interface_name_prefix)
        case DetectLocalMode.NODE_CIDR:
            cidrs = [cidr.text for cidr in node.pod_cidrs] if node else []
        case DetectLocalMode.CLUSTER_CIDR:
            cidrs = list(config.cluster_cidrs)
    return LocalDetector(cidrs={family: found[0] for family, found in by_family(cidrs).items()})


def _node_port_addresses(config: AgentConfig, family: Family, node: CheckedNode | None, loopback: bool) -> NodePortAddresses:
    serves_loopback = family is Family.IPV4 and loopback
    if config.node_port_addresses == (PRIMARY,):
        primaries = _primary_addresses(config, node)
        if not primaries:  # not known yet: as kube-proxy, rather all than none
            return NodePortAddresses(loopback=serves_loopback)
        return NodePortAddresses(cidrs=by_family(primaries).get(family, ())[:1])
    cidrs = by_family(config.node_port_addresses).get(family, ())
    # CIDRs of the other family alone do not close this one, as in kube-proxy.
    everything = not cidrs or any(cidr.endswith("/0") for cidr in cidrs)
    if everything:
        return NodePortAddresses(loopback=serves_loopback)
    covers_loopback = any(_overlaps_loopback(cidr, family) for cidr in cidrs)
    return NodePortAddresses(cidrs=cidrs, loopback=serves_loopback and covers_loopback)


def _overlaps_loopback(cidr: str, family: Family) -> bool:
    return ipaddress.ip_network(cidr).overlaps(ipaddress.ip_network(_LOOPBACK[family]))


def _primary_addresses(config: AgentConfig, node: CheckedNode | None) -> list[str]:
    """The node's primary addresses as CIDRs, the best first: --bind-address, then those of the Node object."""
    addresses = [config.bind_address] if config.bind_address else []
    addresses += [address.text for address in node.addresses] if node else []
    return [
        f"{address}/{128 if ':' in address else 32}"
        for address in addresses
        if not ipaddress.ip_address(address).is_unspecified
    ]
