"""Owns `AgentConfig`: everything an agent is told, typed."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from nodeproxy.programmer.base import DetectLocalMode

PRIMARY = "primary"
"""The word in `node_port_addresses` that means the primary addresses of the Node object."""


class Mode(enum.StrEnum):
    """Mechanism of the kernel that carries Services."""

    IPTABLES = "iptables"
    IPVS = "ipvs"


class WhileAnotherRuns(enum.StrEnum):
    """What to do while kube-proxy or another agent runs on this node."""

    WAIT = "wait"
    REFUSE = "refuse"
    PROCEED = "proceed"


class LogFormat(enum.StrEnum):
    """Form of log lines."""

    TEXT = "text"
    JSON = "json"


class AgentConfig(Struct, frozen=True, kw_only=True):
    """Everything an agent is told. Durations in seconds, addresses as given; see kube-proxy's reference for each flag.

    Defaults are those of kube-proxy 1.36 started without a configuration file.
    """

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
    conntrack_tcp_timeout_established: float = 86400.0  # for each timeout of conntrack, 0 leaves it alone
    conntrack_tcp_timeout_close_wait: float = 3600.0
    conntrack_tcp_be_liberal: bool = False
    conntrack_udp_timeout: float = 0.0
    conntrack_udp_timeout_stream: float = 0.0
    healthz_bind_address: str = "0.0.0.0:10256"
    metrics_bind_address: str = "127.0.0.1:10249"
    oom_score_adj: int = -999
    verbosity: int = 0
    log_format: LogFormat = LogFormat.TEXT
    while_another_runs: WhileAnotherRuns = WhileAnotherRuns.WAIT
    traffic_counters_period: float = 10.0
    """Seconds between two readings of the counters of each Service; 0: they are not kept."""
    events: bool = True

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
