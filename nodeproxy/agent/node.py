"""Owns what the agent finds out about its node, and the programmer's configuration made from it."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from pathlib import Path

import structlog

from nodeproxy.agent.config import PRIMARY, AgentConfig, by_family
from nodeproxy.cluster.checked import CheckedNode
from nodeproxy.forwarding.table import Family
from nodeproxy.programmer.base import DetectLocalMode, LocalDetector, NodePortAddresses, ProgrammerConfig

_log = structlog.get_logger(__name__)

_LOOPBACK = {Family.IPV4: "127.0.0.0/8", Family.IPV6: "::1/128"}


def available_families() -> tuple[Family, ...]:
    """Families that this node's kernel has. IPv6 can be compiled out or disabled (ipv6.disable=1)."""
    if Path("/proc/net/if_inet6").exists():
        return (Family.IPV4, Family.IPV6)
    _log.info("no IPv6 on this node: only IPv4 is programmed")
    return (Family.IPV4,)


def programmer_config(
    config: AgentConfig, families: Sequence[Family], node: CheckedNode | None, local_addresses: Sequence[str]
) -> ProgrammerConfig:
    """What a programmer needs to know. `local_addresses` stand in for the Node's addresses where there is no Node."""
    return ProgrammerConfig(
        families=tuple(families),
        local_detector=_local_detector(config, node),
        node_port_addresses={family: _node_port_addresses(config, family, node, local_addresses) for family in families},
        masquerade_bit=config.masquerade_bit,
        conntrack_tcp_be_liberal=config.conntrack_tcp_be_liberal,
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


def _node_port_addresses(
    config: AgentConfig, family: Family, node: CheckedNode | None, local_addresses: Sequence[str]
) -> NodePortAddresses:
    if config.node_port_addresses == (PRIMARY,):
        primary = _primary_address(config, family, node, local_addresses)
        return NodePortAddresses(cidrs=(primary,) if primary else ())
    cidrs = by_family(config.node_port_addresses).get(family, ())
    # CIDRs of the other family alone do not close this one, as in kube-proxy.
    everything = not cidrs or any(cidr.endswith("/0") for cidr in cidrs)
    serves_loopback = family is Family.IPV4 and config.localhost_node_ports
    if everything:
        return NodePortAddresses(loopback=serves_loopback)
    covers_loopback = any(_overlaps_loopback(cidr, family) for cidr in cidrs)
    return NodePortAddresses(cidrs=cidrs, loopback=serves_loopback and covers_loopback)


def _overlaps_loopback(cidr: str, family: Family) -> bool:
    return ipaddress.ip_network(cidr).overlaps(ipaddress.ip_network(_LOOPBACK[family]))


def _primary_address(
    config: AgentConfig, family: Family, node: CheckedNode | None, local_addresses: Sequence[str]
) -> str | None:
    """Primary address of a family, as a CIDR: of the Node, else --bind-address, else the first local one."""
    candidates = [address.text for address in node.addresses] if node else []
    candidates += [config.bind_address] if config.bind_address else []
    candidates += local_addresses
    found = by_family([f"{address}/{32 if ':' not in address else 128}" for address in candidates])
    return found[family][0] if family in found else None
