"""Owns node-wide settings around Services: sysctls and conntrack limits. One that cannot be set is said, never fatal."""

from __future__ import annotations

import os
from collections.abc import Iterator

import structlog

from nodeproxy.configuration.agent_config import AgentConfig
from nodeproxy.forwarding.table import Family
from nodeproxy.kernel import sysctl
from nodeproxy.kernel.errors import KernelError
from nodeproxy.programmer.base import ProgrammerConfig

_log = structlog.get_logger(__name__)


def apply_settings(config: AgentConfig, programmer: ProgrammerConfig) -> None:
    """Set what the configuration asks for. Values that are in force already are not written."""
    for name, value, at_least in _wanted(config, programmer):
        try:
            present = int(sysctl.get(name))
            if present == value or (at_least and present > value):
                continue
            sysctl.set(name, str(value))
            _log.info("sysctl set", name=name, value=value, before=present)
        except (KernelError, ValueError) as error:
            _log.warning("sysctl not set; going on without", name=name, value=value, error=str(error))


def _wanted(config: AgentConfig, programmer: ProgrammerConfig) -> Iterator[tuple[str, int, bool]]:
    """Name, value, and whether a larger value may stay."""
    addresses = programmer.node_port_addresses.get(Family.IPV4)
    if addresses is not None and addresses.loopback:
        yield "net.ipv4.conf.all.route_localnet", 1, False
    if config.conntrack_max_per_core > 0:
        cores = os.cpu_count() or 1
        yield "net.netfilter.nf_conntrack_max", max(config.conntrack_min, config.conntrack_max_per_core * cores), True
    if config.conntrack_tcp_be_liberal:
        yield "net.netfilter.nf_conntrack_tcp_be_liberal", 1, False
    for name, seconds in (
        ("tcp_timeout_established", config.conntrack_tcp_timeout_established),
        ("tcp_timeout_close_wait", config.conntrack_tcp_timeout_close_wait),
        ("udp_timeout", config.conntrack_udp_timeout),
        ("udp_timeout_stream", config.conntrack_udp_timeout_stream),
    ):
        if seconds:
            yield f"net.netfilter.nf_conntrack_{name}", int(seconds), False
