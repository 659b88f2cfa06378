"""The configuration in force as a document, durations, and what of a change needs a restart."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeproxy.configuration.agent_config import AgentConfig, LogFormat, Mode
from nodeproxy.configuration.changes import restart_needed, with_fixed_part
from nodeproxy.configuration.document import KubeProxyConfiguration, leaves
from nodeproxy.configuration.durations import format_duration, parse_duration
from nodeproxy.configuration.effective import as_document
from nodeproxy.configuration.resolve import resolve
from nodeproxy.configuration.settings import NEED_RESTART, SETTINGS
from nodeproxy.programmer.base import DetectLocalMode
from tests.configuration.files import write

CONFIG = AgentConfig(node_name="n")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("0s", 0), ("1s", 1), ("1.5s", 1.5), ("500ms", 0.5), ("1m30s", 90), ("15m0s", 900), ("24h0m0s", 86400)),
        *(("1h0m1s", 3601), ("100µs", 1e-4), ("1.5µs", 1.5e-6), ("7ns", 7e-9)),
    ],
)
def test_durations_are_written_as_go_writes_them(text: str, seconds: float) -> None:
    assert format_duration(seconds) == text
    assert parse_duration(text) == pytest.approx(seconds)


@given(st.integers(min_value=0, max_value=10**16))
def test_a_written_duration_reads_back(nanoseconds: int) -> None:
    assert round(parse_duration(format_duration(nanoseconds / 1e9)) * 1e9) == pytest.approx(nanoseconds, rel=1e-14)


@pytest.mark.parametrize("text", ["", "1", "s", "1 s", "-1s", "1x", "1s2", "inf", "1e3s", "\u0661s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


def test_the_document_has_every_field_in_kube_proxys_form() -> None:
    document = as_document(replace(CONFIG, cluster_cidrs=("10.0.0.0/8", "fd00::/64"), kubeconfig=Path("/k"), mode=Mode.IPVS))
    assert json.loads(json.dumps(document)) == document
    assert document["apiVersion"] == "kubeproxy.config.k8s.io/v1alpha1"
    assert (document["clusterCIDR"], document["mode"]) == ("10.0.0.0/8,fd00::/64", "ipvs")
    assert document["clientConnection"]["kubeconfig"] == "/k"
    assert document["conntrack"]["tcpEstablishedTimeout"] == "24h0m0s"
    assert document["logging"]["flushFrequency"] == "5s"
    assert len(document) - 2 == len({path.partition(".")[0] for path in leaves(KubeProxyConfiguration())})


_PERIODS = st.integers(min_value=1, max_value=10**7).map(lambda milliseconds: milliseconds / 1000)
_CIDRS = st.lists(st.sampled_from(["10.0.0.0/8", "fd00::/64", "192.168.0.0/16"]), unique=True).map(tuple)
_CONFIGS = st.builds(
    AgentConfig,
    node_name=st.just("n"),
    mode=st.sampled_from(Mode),
    kubeconfig=st.sampled_from([None, Path("/a b")]),
    cluster_cidrs=_CIDRS,
    detect_local_mode=st.sampled_from(DetectLocalMode),
    pod_bridge_interface=st.sampled_from([None, "cbr0"]),
    node_port_addresses=_CIDRS,
    bind_address=st.sampled_from(["0.0.0.0", "::", "10.0.0.1"]),
    masquerade_bit=st.integers(0, 31),
    localhost_node_ports=st.booleans(),
    min_sync_period=_PERIODS,
    ipvs_min_sync_period=st.one_of(st.just(0.0), _PERIODS),
    ipvs_scheduler=st.sampled_from(["rr", "mh"]),
    ipvs_exclude_cidrs=_CIDRS,
    conntrack_min=st.integers(0, 2**31 - 1),
    conntrack_tcp_timeout_established=st.one_of(st.just(0.0), _PERIODS),
    healthz_bind_address=st.sampled_from(["0.0.0.0:10256", "[::]:1"]),
    oom_score_adj=st.integers(-1000, 1000),
    verbosity=st.integers(0, 10),
    log_format=st.sampled_from(LogFormat),
)


@settings(max_examples=60, deadline=None)
@given(_CONFIGS)
def test_the_document_in_force_reads_back_as_the_same_configuration(config: AgentConfig) -> None:
    with TemporaryDirectory() as directory:
        resolved = resolve(write(Path(directory), **as_document(config)))
    assert resolved.config == config
    assert resolved.remarks == ()


OTHER: dict[str, Any] = {
    "mode": Mode.IPVS,
    "fallback": Mode.IPTABLES,
    "kubeconfig": Path("/k"),
    "detect_local_mode": DetectLocalMode.NODE_CIDR,
    "log_format": LogFormat.JSON,
}


def _another(field: str) -> Any:
    value = getattr(CONFIG, field)
    if field in OTHER:
        return OTHER[field]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else ("x",) if isinstance(value, tuple) else "x"


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.field)
def test_a_change_needs_a_restart_only_where_it_must(setting: Any) -> None:
    new = replace(CONFIG, **{setting.field: _another(setting.field)})
    needs = setting.field in NEED_RESTART
    assert restart_needed(CONFIG, new) == ((setting.name,) if needs else ())
    assert with_fixed_part(new, CONFIG) == (CONFIG if needs else new)


def test_what_decides_whom_the_agent_serves_needs_a_restart() -> None:
    new = replace(CONFIG, node_name="m", master="https://x", manifests=Path("/m"), service_proxy_name="p")
    assert restart_needed(CONFIG, new) == ("--master", "--manifests", "hostnameOverride", "--service-proxy-name")
