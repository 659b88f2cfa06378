"""Owns the configuration of an agent: typed, checked as a whole, each complaint naming the flag at fault."""

from __future__ import annotations

import enum
import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from nodeproxy.forwarding.table import Family
from nodeproxy.programmer.base import DetectLocalMode
from nodeproxy.programmer.ipvs.settings import SCHEDULERS

_INTERFACE = re.compile(r"[^\s/\"'!+]{1,15}")
PRIMARY = "primary"


class Mode(enum.StrEnum):
    """Mechanism of the kernel that carries Services."""

    IPTABLES = "iptables"
    IPVS = "ipvs"


class AgentConfig(Struct, frozen=True, kw_only=True):
    """Everything an agent is told. Durations in seconds, addresses as given; see kube-proxy's reference for each flag."""

    node_name: str
    mode: Mode = Mode.IPTABLES
    fallback: Mode | None = None
    kubeconfig: Path | None = None
    master: str | None = None
    manifests: Path | None = None
    service_proxy_name: str | None = None
    cluster_cidrs: tuple[str, ...] = ()
    detect_local_mode: DetectLocalMode = DetectLocalMode.CLUSTER_CIDR
    pod_bridge_interface: str | None = None
    pod_interface_name_prefix: str | None = None
    node_port_addresses: tuple[str, ...] = ()
    bind_address: str | None = None
    localhost_node_ports: bool = True
    masquerade_all: bool = False
    masquerade_bit: int = 14
    min_sync_period: float = 1.0
    sync_period: float = 30.0
    iptables_variant: str | None = None
    ipvs_scheduler: str = "rr"
    ipvs_strict_arp: bool = False
    ipvs_exclude_cidrs: tuple[str, ...] = ()
    ipvs_tcp_timeout: float = 0.0
    ipvs_tcpfin_timeout: float = 0.0
    ipvs_udp_timeout: float = 0.0
    ipvs_drain_timeout: float = 900.0
    ipvs_min_sync_period: float = 1.0
    ipvs_sync_period: float = 30.0
    conntrack_max_per_core: int = 32768
    conntrack_min: int = 131072
    conntrack_tcp_timeout_established: float | None = None
    conntrack_tcp_timeout_close_wait: float | None = None
    conntrack_tcp_be_liberal: bool = False
    conntrack_udp_timeout: float | None = None
    conntrack_udp_timeout_stream: float | None = None
    healthz_bind_address: str = "0.0.0.0:10256"
    metrics_bind_address: str = "127.0.0.1:10249"

    def min_sync_period_of(self, mode: Mode) -> float:
        """At most one sync in so many seconds."""
        return self.min_sync_period if mode is Mode.IPTABLES else self.ipvs_min_sync_period

    def sync_period_of(self, mode: Mode) -> float:
        """Seconds in which every wanted change is to be programmed, twice over."""
        return self.sync_period if mode is Mode.IPTABLES else self.ipvs_sync_period


class ConfigError(ValueError):
    """The configuration makes no sense; one line for each complaint."""

    def __init__(self, complaints: Sequence[str]) -> None:
        super().__init__("\n".join(complaints))
        self.complaints = tuple(complaints)


def check(config: AgentConfig) -> None:
    """Raise `ConfigError` with every complaint about a configuration."""
    complaints = [
        *_check_sources(config),
        *_check_local(config),
        *_check_addresses(config),
        *_check_numbers(config),
        *_check_ipvs(config),
    ]
    if complaints:
        raise ConfigError(complaints)


def _check_sources(config: AgentConfig) -> list[str]:
    complaints = []
    if config.manifests is not None and (config.kubeconfig or config.master):
        complaints.append("--manifests: cannot be used together with --kubeconfig or --master")
    if config.manifests is not None and not config.manifests.is_dir():
        complaints.append(f"--manifests: {config.manifests} is not a directory")
    if config.kubeconfig is not None and not config.kubeconfig.is_file():
        complaints.append(f"--kubeconfig: {config.kubeconfig} is not a file")
    if config.master is not None and not re.match(r"https?://[^/\s]+", config.master):
        complaints.append(f"--master: {config.master!r} is not a URL such as https://10.0.0.1:6443")
    return complaints


def _check_local(config: AgentConfig) -> list[str]:
    complaints = list(_check_cidrs("--cluster-cidr", config.cluster_cidrs))
    versions = [network.version for network in parse_networks(config.cluster_cidrs)]
    if len(versions) != len(set(versions)):
        complaints.append("--cluster-cidr: at most one CIDR for each IP family")
    for flag, name, needed in (
        ("--pod-bridge-interface", config.pod_bridge_interface, DetectLocalMode.BRIDGE_INTERFACE),
        ("--pod-interface-name-prefix", config.pod_interface_name_prefix, DetectLocalMode.INTERFACE_NAME_PREFIX),
    ):
        if config.detect_local_mode is needed and not name:
            complaints.append(f"{flag}: needed with --detect-local-mode {needed}")
        if name and not _INTERFACE.fullmatch(name):
            complaints.append(f"{flag}: {name!r} cannot be the name of an interface")
    return complaints


def _check_addresses(config: AgentConfig) -> list[str]:
    complaints = []
    if PRIMARY in config.node_port_addresses:
        if len(config.node_port_addresses) > 1:
            complaints.append("--nodeport-addresses: 'primary' cannot be combined with CIDRs")
    else:
        complaints += _check_cidrs("--nodeport-addresses", config.node_port_addresses)
    for flag, address in (
        ("--healthz-bind-address", config.healthz_bind_address),
        ("--metrics-bind-address", config.metrics_bind_address),
    ):
        if address and parse_host_port(address) is None:
            complaints.append(f"{flag}: {address!r} is not an address and port such as 0.0.0.0:10256 or [::]:10256")
    if config.bind_address is not None and not _is_address(config.bind_address):
        complaints.append(f"--bind-address: {config.bind_address!r} is not an IP address")
    return complaints


def _check_numbers(config: AgentConfig) -> list[str]:
    complaints = []
    if not 0 <= config.masquerade_bit <= 31:
        complaints.append(f"--iptables-masquerade-bit: {config.masquerade_bit} is not within 0-31")
    if config.iptables_variant not in (None, "legacy", "nft"):
        complaints.append(f"--iptables-variant: {config.iptables_variant!r} is neither legacy nor nft")
    for flag, number in (
        ("--conntrack-max-per-core", config.conntrack_max_per_core),
        ("--conntrack-min", config.conntrack_min),
        ("--iptables-min-sync-period", config.min_sync_period),
        ("--iptables-sync-period", config.sync_period),
    ):
        if number < 0:
            complaints.append(f"{flag}: {number} is negative")
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", config.node_name):
        complaints.append(f"--hostname-override: {config.node_name!r} cannot be the name of a Node")
    return complaints


def _check_ipvs(config: AgentConfig) -> list[str]:
    complaints = list(_check_cidrs("--ipvs-exclude-cidrs", config.ipvs_exclude_cidrs))
    if config.ipvs_scheduler not in SCHEDULERS:
        complaints.append(f"--ipvs-scheduler: {config.ipvs_scheduler!r} is none of {', '.join(SCHEDULERS)}")
    for flag, seconds in (
        ("--ipvs-tcp-timeout", config.ipvs_tcp_timeout),
        ("--ipvs-tcpfin-timeout", config.ipvs_tcpfin_timeout),
        ("--ipvs-udp-timeout", config.ipvs_udp_timeout),
    ):
        if 0 < seconds < 1:
            complaints.append(f"{flag}: {seconds:g} s is less than a second, the least that the kernel counts")
    return complaints


def _check_cidrs(flag: str, cidrs: Sequence[str]) -> list[str]:
    complaints = []
    for cidr in cidrs:
        try:
            if "/" not in cidr:
                raise ValueError("has no prefix length")
            ipaddress.ip_network(cidr, strict=False)
        except ValueError as error:
            complaints.append(f"{flag}: {cidr!r} is not a CIDR: {error}")
    return complaints


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def parse_networks(cidrs: Sequence[str]) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """Networks of those CIDRs that can be read, host bits cleared."""
    networks = []
    for cidr in cidrs:
        try:
            networks.append(ipaddress.ip_network(cidr, strict=False))
        except ValueError:
            continue
    return networks


def by_family(cidrs: Sequence[str]) -> dict[Family, tuple[str, ...]]:
    """Canonical CIDRs by family."""
    result: dict[Family, tuple[str, ...]] = {}
    for network in parse_networks(cidrs):
        family = Family(network.version)
        result[family] = (*result.get(family, ()), str(network))
    return result


def parse_host_port(text: str) -> tuple[str, int] | None:
    """Split `host:port`; IPv6 in brackets. None where it is neither."""
    host, separator, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not port.isdecimal() or not 0 < int(port) < 65536 or not _is_address(host or "0.0.0.0"):
        return None
    return host or "0.0.0.0", int(port)
