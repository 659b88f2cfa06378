"""What an agent makes of its flags and its Node object: node-port addresses and the recognition of local pods."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from nodeproxy.agent.node import programmer_config
from nodeproxy.api.objects import Node
from nodeproxy.cluster.checked import CheckedNode
from nodeproxy.cluster.validate import check_node
from nodeproxy.configuration.agent_config import AgentConfig
from nodeproxy.forwarding.table import Family
from nodeproxy.programmer.base import DetectLocalMode, LocalDetector, NodePortAddresses

FAMILIES = (Family.IPV4, Family.IPV6)
EVERYWHERE = NodePortAddresses(loopback=True)


def node(*addresses: tuple[str, str], pod_cidrs: tuple[str, ...] = ()) -> CheckedNode:
    """A Node with addresses as (type, address)."""
    made: dict[str, Any] = {
        "metadata": {"name": "n"},
        "spec": {"podCIDRs": list(pod_cidrs)},
        "status": {"addresses": [{"type": kind, "address": address} for kind, address in addresses]},
    }
    return check_node(msgspec.convert(made, Node))


def addresses(*flag: str, of: CheckedNode | None = None, family: Family = Family.IPV4, **options: Any) -> NodePortAddresses:
    config = AgentConfig(node_name="n", node_port_addresses=flag, **options)
    return programmer_config(config, config.mode, FAMILIES, of).node_port_addresses[family]


def test_node_ports_are_served_everywhere_by_default() -> None:
    assert addresses() == addresses("0.0.0.0/0") == EVERYWHERE
    assert addresses(family=Family.IPV6) == NodePortAddresses()
    assert addresses(localhost_node_ports=False) == NodePortAddresses()


def test_node_port_cidrs_hold_for_their_family_alone() -> None:
    assert addresses("192.168.0.0/24") == NodePortAddresses(cidrs=("192.168.0.0/24",))
    assert addresses("192.168.0.0/24", "127.0.0.0/8").loopback
    assert addresses("192.168.0.0/24", family=Family.IPV6) == NodePortAddresses()
    assert addresses("2001:db8::/64") == EVERYWHERE


def test_primary_is_the_first_internal_address_of_the_node() -> None:
    known = node(("ExternalIP", "198.51.100.1"), ("InternalIP", "192.168.0.2"), ("InternalIP", "2001:db8::2"))
    assert addresses("primary", of=known).cidrs == ("192.168.0.2/32",)
    assert addresses("primary", of=known, family=Family.IPV6).cidrs == ("2001:db8::2/128",)


def test_bind_address_goes_before_the_node() -> None:
    known = node(("InternalIP", "192.168.0.2"))
    assert addresses("primary", of=known, bind_address="192.168.0.9").cidrs == ("192.168.0.9/32",)
    assert addresses("primary", of=known, bind_address="0.0.0.0").cidrs == ("192.168.0.2/32",)


def test_primary_without_a_node_serves_everywhere() -> None:
    assert addresses("primary") == addresses("primary", bind_address="::") == EVERYWHERE


@pytest.mark.parametrize(
    ("options", "detector"),
    [
        (
            {"cluster_cidrs": ("10.0.0.1/8", "fd00::/64")},
            LocalDetector({Family.IPV4: "10.0.0.0/8", Family.IPV6: "fd00::/64"}),
        ),
        ({}, LocalDetector()),
        ({"detect_local_mode": DetectLocalMode.NODE_CIDR}, LocalDetector({Family.IPV4: "10.1.0.0/24"})),
        (
            {"detect_local_mode": DetectLocalMode.BRIDGE_INTERFACE, "pod_bridge_interface": "cni0"},
            LocalDetector(interface="cni0"),
        ),
        (
            {"detect_local_mode": DetectLocalMode.INTERFACE_NAME_PREFIX, "pod_interface_name_prefix": "veth"},
            LocalDetector(interface_prefix="veth"),
        ),
    ],
)
def test_local_pods_are_recognised_as_told(options: dict[str, Any], detector: LocalDetector) -> None:
    config = AgentConfig(node_name="n", **options)
    assert programmer_config(config, config.mode, FAMILIES, node(pod_cidrs=("10.1.0.0/24",))).local_detector == detector
