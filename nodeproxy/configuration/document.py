"""Owns the form of a KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1, Kubernetes 1.36): all fields, with defaults.

The default of a field here is what kube-proxy puts where the field is absent. Where a field holds its zero value ("", 0, 0s)
that means absent, too, except for the fields in `ZERO_IS_A_VALUE`. Source: k8s.io/kube-proxy/config/v1alpha1 and
k8s.io/component-base (logging, client connection).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct, field
from msgspec.structs import replace

from nodeproxy.configuration.durations import format_duration, parse_duration

API_VERSION = "kubeproxy.config.k8s.io/v1alpha1"
KIND = "KubeProxyConfiguration"

Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Uint31 = Annotated[int, Meta(ge=0, le=2**31 - 1)]

ZERO_IS_A_VALUE = frozenset(
    {
        "iptables.masqueradeBit",
        "nftables.masqueradeBit",
        "conntrack.maxPerCore",
        "conntrack.min",
        "conntrack.tcpEstablishedTimeout",
        "conntrack.tcpCloseWaitTimeout",
        "oomScoreAdj",
    }
)


class Duration(float):
    """Seconds; in the document a Go duration."""


class FlushFrequency(Duration):
    """As a duration, or a number of nanoseconds."""


class ClientConnection(Struct, rename="camel"):
    """How kube-proxy talks to the API server."""

    kubeconfig: str = ""
    accept_content_types: str = ""
    content_type: str = "application/vnd.kubernetes.protobuf"
    qps: float = 5.0
    burst: Uint31 = 10


class Conntrack(Struct, rename="camel"):
    """Settings of connection tracking."""

    max_per_core: Int32 = 32768
    min: Int32 = 131072
    tcp_established_timeout: Duration = Duration(86400)
    tcp_close_wait_timeout: Duration = Duration(3600)
    tcp_be_liberal: bool = False
    udp_timeout: Duration = Duration(0)
    udp_stream_timeout: Duration = Duration(0)


class DetectLocal(Struct, rename="camel"):
    """What goes with `detectLocalMode`."""

    bridge_interface: str = ""
    interface_name_prefix: str = ""


class Iptables(Struct, rename="camel"):
    """Settings of iptables mode; the mark is that of IPVS mode, too."""

    localhost_node_ports: bool = True
    masquerade_all: bool = False
    masquerade_bit: Int32 = 14
    min_sync_period: Duration = Duration(1)
    sync_period: Duration = Duration(30)


class Ipvs(Struct, rename="camel"):
    """Settings of IPVS mode."""

    exclude_cidrs: tuple[str, ...] = field(default=(), name="excludeCIDRs")
    min_sync_period: Duration = Duration(0)
    scheduler: str = "rr"
    strict_arp: bool = field(default=False, name="strictARP")
    sync_period: Duration = Duration(30)
    tcp_fin_timeout: Duration = Duration(0)
    tcp_timeout: Duration = Duration(0)
    udp_timeout: Duration = Duration(0)


class Nftables(Struct, rename="camel"):
    """Settings of nftables mode."""

    masquerade_all: bool = False
    masquerade_bit: Annotated[int, Meta(ge=0, le=31)] = 14
    min_sync_period: Duration = Duration(1)
    sync_period: Duration = Duration(30)


class Winkernel(Struct, rename="camel"):
    """Settings of kube-proxy on Windows."""

    enable_dsr: bool = field(default=False, name="enableDSR")
    forward_health_check_vip: bool = False
    network_name: str = ""
    root_hns_endpoint_name: str = ""
    source_vip: str = ""


class VerbosityOfFile(Struct, rename="camel"):
    """Verbosity of single files of kube-proxy's source."""

    file_pattern: str
    verbosity: Uint31 = 0


class LogStream(Struct, rename="camel"):
    """Where log lines of one format go."""

    split_stream: bool = False
    info_buffer_size: str | int = "0"


class LogOptions(Struct):
    """Options by log format."""

    json: LogStream = field(default_factory=LogStream)
    text: LogStream = field(default_factory=LogStream)


class Logging(Struct, rename="camel"):
    """How kube-proxy logs."""

    flush_frequency: FlushFrequency = FlushFrequency(5)
    format: str = "text"
    options: LogOptions = field(default_factory=LogOptions)
    verbosity: Uint31 = 0
    vmodule: tuple[VerbosityOfFile, ...] = ()


class KubeProxyConfiguration(Struct, rename="camel"):
    """The whole document without `apiVersion` and `kind`."""

    bind_address: str = "0.0.0.0"
    bind_address_hard_fail: bool = False
    client_connection: ClientConnection = field(default_factory=ClientConnection)
    cluster_cidr: str = field(default="", name="clusterCIDR")
    config_sync_period: Duration = Duration(900)
    conntrack: Conntrack = field(default_factory=Conntrack)
    detect_local: DetectLocal = field(default_factory=DetectLocal)
    detect_local_mode: str = "ClusterCIDR"
    enable_profiling: bool = False
    feature_gates: dict[str, bool] = field(default_factory=dict)
    healthz_bind_address: str = ""  # the defaults of both addresses depend on the family of bindAddress
    hostname_override: str = ""
    iptables: Iptables = field(default_factory=Iptables)
    ipvs: Ipvs = field(default_factory=Ipvs)
    logging: Logging = field(default_factory=Logging)
    metrics_bind_address: str = ""
    mode: str = "iptables"
    nftables: Nftables = field(default_factory=Nftables)
    node_port_addresses: tuple[str, ...] = ()
    oom_score_adj: Int32 = -999
    port_range: str = ""
    show_hidden_metrics_for_version: str = ""
    windows_run_as_service: bool = False
    winkernel: Winkernel = field(default_factory=Winkernel)


def decode_hook(kind: type, value: Any) -> Any:
    """Make a duration of what the document holds. Raises ValueError."""
    if kind is FlushFrequency and type(value) is int and value >= 0:
        return FlushFrequency(value / 1e9)
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a duration such as 1s, 500ms or 1h30m")
    return kind(parse_duration(value))


def completed(document: KubeProxyConfiguration) -> KubeProxyConfiguration:
    """The document with the addresses that kube-proxy serves at by default; they follow the family of `bindAddress`."""
    ipv6 = ":" in document.bind_address
    return replace(
        document,
        healthz_bind_address=document.healthz_bind_address or ("[::]:10256" if ipv6 else "0.0.0.0:10256"),
        metrics_bind_address=document.metrics_bind_address or ("[::1]:10249" if ipv6 else "127.0.0.1:10249"),
    )


def leaves(document: Struct, prefix: str = "") -> dict[str, Any]:
    """The value of each field by its path in the document, such as `iptables.syncPeriod`."""
    found: dict[str, Any] = {}
    for entry in msgspec.structs.fields(document):
        value = getattr(document, entry.name)
        path = f"{prefix}{entry.encode_name}"
        if isinstance(value, Struct):
            found.update(leaves(value, f"{path}."))
        else:
            found[path] = value
    return found


def as_text(value: Any) -> Any:
    """A value of a document as JSON and YAML have it: durations as text, lists as lists."""
    if isinstance(value, Duration):
        return format_duration(value)
    if isinstance(value, tuple):
        return [msgspec.to_builtins(item) for item in value]
    return value


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `leaves`: a document of plain values, with `apiVersion` and `kind`, sorted by key."""
    document: dict[str, Any] = {"apiVersion": API_VERSION, "kind": KIND}
    for path, value in values.items():
        *sections, name = path.split(".")
        inner = document
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = as_text(value)
    return dict(sorted(document.items()))
