"""What a ProxyNode adds to an agent's own configuration."""

from __future__ import annotations

from typing import Any

import pytest

from nodeproxy.api.proxy_node import ProxyNodeSpec
from nodeproxy.configuration.agent_config import AgentConfig, ConfigError, Mode
from nodeproxy.configuration.overlay import overlaid
from nodeproxy.programmer.base import DetectLocalMode

OWN = AgentConfig(
    node_name="n",
    fallback=Mode.IPVS,
    masquerade_all=True,
    cluster_cidrs=("10.0.0.0/8",),
    node_port_addresses=("10.1.0.0/16",),
)


def with_fields(**fields: Any) -> ProxyNodeSpec:
    return ProxyNodeSpec(configuration=fields)


def test_an_empty_spec_changes_nothing() -> None:
    assert overlaid(OWN, ProxyNodeSpec(verification="x")).config == OWN
    assert overlaid(OWN, with_fields(iptables={})).config == OWN


def test_only_what_is_given_counts() -> None:
    made = overlaid(
        OWN, with_fields(iptables={"syncPeriod": "1m"}, detectLocalMode="NodeCIDR", clusterCIDR="10.2.0.0/16")
    ).config
    assert (made.sync_period, made.detect_local_mode, made.cluster_cidrs) == (
        60,
        DetectLocalMode.NODE_CIDR,
        ("10.2.0.0/16",),
    )
    assert (made.masquerade_all, made.node_port_addresses, made.fallback) == (True, ("10.1.0.0/16",), Mode.IPVS)


def test_a_zero_value_is_the_default() -> None:
    made = overlaid(OWN, with_fields(iptables={"masqueradeAll": False, "masqueradeBit": 0}, nodePortAddresses=[])).config
    assert (made.masquerade_all, made.masquerade_bit, made.node_port_addresses) == (False, 0, ())


def test_a_mode_that_is_told_has_no_substitute() -> None:
    made = overlaid(OWN, ProxyNodeSpec(mode="ipvs")).config
    assert (made.mode, made.fallback) == (Mode.IPVS, None)


def test_what_needs_a_restart_is_told_and_left_out() -> None:
    made = overlaid(
        OWN, with_fields(hostnameOverride="other", logging={"verbosity": 4}, ipvs={"scheduler": "sh"}, color="red")
    )
    assert made.config.ipvs_scheduler == "sh"
    assert (made.config.node_name, made.config.verbosity) == ("n", 0)
    assert made.remark == "a running agent cannot change hostnameOverride, logging.verbosity; unknown: color"


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        (ProxyNodeSpec(mode="nftables"), "spec.mode: 'nftables' is none of iptables, ipvs"),
        (with_fields(iptables={"syncPeriod": 3}), "spec.configuration.iptables.syncPeriod: 3 is not a duration"),
        (with_fields(iptables=3), "spec.configuration.iptables: expected a mapping, got a whole number"),
        (with_fields(clusterCIDR="10.0.0.0"), "spec.configuration.clusterCIDR: '10.0.0.0' is not a CIDR"),
        (with_fields(detectLocalMode="Guess"), "spec.configuration.detectLocalMode: 'Guess' is none of"),
        (with_fields(ipvs={"scheduler": "best"}), "spec.configuration.ipvs.scheduler: 'best' is none of"),
    ],
)
def test_nonsense_is_refused_with_the_field(spec: ProxyNodeSpec, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        overlaid(OWN, spec)
    (line,) = caught.value.complaints
    assert line.startswith(complaint)
