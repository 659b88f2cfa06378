"""Owns checking a configuration as a whole; each complaint names what is at fault and why."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence

from nodeproxy.configuration.addresses import is_address, parse_host_port, parse_networks
from nodeproxy.configuration.agent_config import PRIMARY, AgentConfig, ConfigError, Mode
from nodeproxy.configuration.settings import FLAGS
from nodeproxy.programmer.base import DetectLocalMode
from nodeproxy.programmer.ipvs.settings import SCHEDULERS

_INTERFACE = re.compile(r"[^\s/\"'!+]{1,15}")
_INT32_MAX = 2**31 - 1

Complaint = tuple[str, str]  # field of AgentConfig, reason


def check(config: AgentConfig, names: Mapping[str, str] = FLAGS) -> None:
    """Raise `ConfigError` with every complaint about a configuration. `names`: how to name each field."""
    complaints = [*check_sources(config, names), *check_values(config, names)]
    if complaints:
        raise ConfigError(complaints)


def check_sources(config: AgentConfig, names: Mapping[str, str] = FLAGS) -> list[str]:
    """Complaints about what the configuration needs to find on this machine."""
    return _named(_sources(config), names)


def check_values(config: AgentConfig, names: Mapping[str, str] = FLAGS) -> list[str]:
    """Complaints about what the configuration says, wherever it is to be used."""
    checks = (_local(config), _addresses(config), _numbers(config), _periods(config), _ipvs(config))
    return [line for complaints in checks for line in _named(complaints, names)]


def _named(complaints: Iterator[Complaint], names: Mapping[str, str]) -> list[str]:
    return [f"{names[field]}: {reason}" for field, reason in complaints]


def _sources(config: AgentConfig) -> Iterator[Complaint]:
    if config.manifests is not None and (config.kubeconfig or config.master):
        yield "manifests", "cannot be used together with --kubeconfig or --master"
    if config.manifests is not None and not config.manifests.is_dir():
        yield "manifests", f"{config.manifests} is not a directory"
    if config.kubeconfig is not None and not config.kubeconfig.is_file():
        yield "kubeconfig", f"{config.kubeconfig} is not a file"
    if config.master is not None and not re.match(r"https?://[^/\s]+", config.master):
        yield "master", f"{config.master!r} is not a URL such as https://10.0.0.1:6443"


def _local(config: AgentConfig) -> Iterator[Complaint]:
    yield from _cidrs("cluster_cidrs", config.cluster_cidrs)
    versions = [network.version for network in parse_networks(config.cluster_cidrs)]
    if len(versions) != len(set(versions)):
        yield "cluster_cidrs", "at most one CIDR for each IP family"
    for field, name, needed in (
        ("pod_bridge_interface", config.pod_bridge_interface, DetectLocalMode.BRIDGE_INTERFACE),
        ("pod_interface_name_prefix", config.pod_interface_name_prefix, DetectLocalMode.INTERFACE_NAME_PREFIX),
    ):
        if config.detect_local_mode is needed and not name:
            yield field, f"needed with --detect-local-mode {needed}"
        if name and not _INTERFACE.fullmatch(name):
            yield field, f"{name!r} cannot be the name of an interface"


def _addresses(config: AgentConfig) -> Iterator[Complaint]:
    if PRIMARY in config.node_port_addresses:
        if len(config.node_port_addresses) > 1:
            yield "node_port_addresses", "'primary' cannot be combined with CIDRs"
    else:
        yield from _cidrs("node_port_addresses", config.node_port_addresses)
    for field, address in (
        ("healthz_bind_address", config.healthz_bind_address),
        ("metrics_bind_address", config.metrics_bind_address),
    ):
        if address and parse_host_port(address) is None:
            yield field, f"{address!r} is not an address and port such as 0.0.0.0:10256 or [::]:10256"
    if config.bind_address is not None and not is_address(config.bind_address):
        yield "bind_address", f"{config.bind_address!r} is not an IP address"


def _numbers(config: AgentConfig) -> Iterator[Complaint]:
    if not 0 <= config.masquerade_bit <= 31:
        yield "masquerade_bit", f"{config.masquerade_bit} is not within 0-31"
    if not -1000 <= config.oom_score_adj <= 1000:
        yield "oom_score_adj", f"{config.oom_score_adj} is not within -1000 and 1000"
    if config.iptables_variant not in (None, "legacy", "nft"):
        yield "iptables_variant", f"{config.iptables_variant!r} is neither legacy nor nft"
    for field, number in (
        ("conntrack_max_per_core", config.conntrack_max_per_core),
        ("conntrack_min", config.conntrack_min),
        ("verbosity", config.verbosity),
    ):
        if number < 0:
            yield field, f"{number} is negative"
        if number > _INT32_MAX:
            yield field, f"{number} is more than {_INT32_MAX}"
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", config.node_name):
        yield "node_name", f"{config.node_name!r} cannot be the name of a Node"


def _periods(config: AgentConfig) -> Iterator[Complaint]:
    """As in kube-proxy, only the periods of the mode in use must fit each other: the others may be left-overs."""
    for mode, least_field, field in (
        (Mode.IPTABLES, "min_sync_period", "sync_period"),
        (Mode.IPVS, "ipvs_min_sync_period", "ipvs_sync_period"),
    ):
        least, period = getattr(config, least_field), getattr(config, field)
        if least < 0:
            yield least_field, f"{least:g} s is negative"
        if period <= 0:
            yield field, f"{period:g} s is not greater than 0"
        elif config.mode is mode and least > period:
            yield field, f"{period:g} s is less than the least period between two syncs, {least:g} s"


def _ipvs(config: AgentConfig) -> Iterator[Complaint]:
    yield from _cidrs("ipvs_exclude_cidrs", config.ipvs_exclude_cidrs)
    if config.ipvs_scheduler not in SCHEDULERS:
        yield "ipvs_scheduler", f"{config.ipvs_scheduler!r} is none of {', '.join(SCHEDULERS)}"
    for field in ("ipvs_tcp_timeout", "ipvs_tcpfin_timeout", "ipvs_udp_timeout"):
        seconds = getattr(config, field)
        if 0 < seconds < 1:
            yield field, f"{seconds:g} s is less than a second, the least that the kernel counts"


def _cidrs(field: str, cidrs: Sequence[str]) -> Iterator[Complaint]:
    for cidr in cidrs:
        try:
            if "/" not in cidr:
                raise ValueError("has no prefix length")
            ipaddress.ip_network(cidr, strict=False)
        except ValueError as error:
            yield field, f"{cidr!r} is not a CIDR: {error}"
