"""The node's view: how it classifies packets by addresses, in every corner of SPEC section 3, and that scenes agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from hack.scene_oracle import snapshot_of_scene
from nodeproxy.api.objects import Node
from nodeproxy.configuration.agent_config import AgentConfig, Mode
from nodeproxy.forwarding.table import Family, IPProtocol
from nodeproxy.forwarding.verdict import Outcome
from nodeproxy.programmer.base import DetectLocalMode
from nodeproxy.sandbox.scene import Flow, Scene, load_scenes
from nodeproxy.sandbox.sockets import host_port
from nodeproxy.snapshot.model import Snapshot
from nodeproxy.snapshot.view import NodeView

SCENES = load_scenes(Path(__file__).parents[1] / "conformance/packet_flows.json")
OUTCOMES = {"REJECT": Outcome.REJECT, "DROP": Outcome.DROP, "ACCEPT": Outcome.ACCEPT, "no-match": Outcome.NO_MATCH}
NODE_IPS = ("192.168.0.2", "192.168.1.2", "2001:db8::2")


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_the_flows_of_every_scene(scene: Scene) -> None:
    view = NodeView(snapshot_of_scene(scene))
    assert scene.flows
    for flow in scene.flows:
        assert_meets(view, flow)


def assert_meets(view: NodeView, flow: Flow) -> None:
    answer = view.verdict(view.packet(flow.source, flow.destination, flow.port, IPProtocol(flow.protocol.lower())))
    if isinstance(flow.expect, str):
        assert answer.outcome is OUTCOMES[flow.expect], flow
    else:
        assert sorted(host_port(one.address, one.port) for one in answer.backends) == sorted(flow.expect), flow
        assert answer.masquerade is flow.masquerade, flow


def view(node: dict[str, Any] | None = None, mode: Mode | None = None, **config: Any) -> NodeView:
    objects = () if node is None else (msgspec.convert({"metadata": {"name": "n"}, **node}, Node),)
    return NodeView(Snapshot(objects, (), AgentConfig(node_name="n", **config), NODE_IPS, "", "test"), mode=mode)


def node_with(*addresses: str, **spec: Any) -> dict[str, Any]:
    return {"spec": spec, "status": {"addresses": [{"type": "InternalIP", "address": text} for text in addresses]}}


@pytest.mark.parametrize(
    ("config", "node", "serving"),
    [
        ({}, None, {"192.168.0.2", "192.168.1.2", "2001:db8::2", "127.0.0.1", "127.0.0.5"}),
        ({"localhost_node_ports": False}, None, {"192.168.0.2", "192.168.1.2", "2001:db8::2"}),
        ({"mode": Mode.IPVS}, None, {"192.168.0.2", "192.168.1.2", "2001:db8::2"}),
        ({"node_port_addresses": ("192.168.0.0/24",)}, None, {"192.168.0.2", "2001:db8::2"}),
        ({"node_port_addresses": ("192.168.0.0/24", "127.0.0.1/32")}, None, {"192.168.0.2", "127.0.0.1", "2001:db8::2"}),
        ({"node_port_addresses": ("127.0.0.1/32",), "localhost_node_ports": False}, None, {"2001:db8::2"}),
        ({"node_port_addresses": ("127.0.0.0/8",), "mode": Mode.IPVS}, None, {"2001:db8::2"}),
        ({"node_port_addresses": ("2001:db8::/64",)}, None, {*NODE_IPS, "127.0.0.1", "127.0.0.5"}),
        ({"node_port_addresses": ("::1/128",)}, None, {"192.168.0.2", "192.168.1.2", "127.0.0.1", "127.0.0.5"}),
        ({"node_port_addresses": ("primary",)}, node_with("192.168.1.2", "192.168.0.2"), {"192.168.1.2"}),
        ({"node_port_addresses": ("primary",)}, node_with("192.168.1.2", "2001:db8::2"), {"192.168.1.2", "2001:db8::2"}),
        ({"node_port_addresses": ("primary",)}, None, {*NODE_IPS, "127.0.0.1", "127.0.0.5"}),
        ({"node_port_addresses": ("primary",), "bind_address": "192.168.0.2"}, node_with("192.168.1.2"), {"192.168.0.2"}),
    ],
)
def test_which_addresses_serve_node_ports(config: dict[str, Any], node: dict[str, Any] | None, serving: set[str]) -> None:
    looked_at = view(node, **config)
    asked = (*NODE_IPS, "127.0.0.1", "127.0.0.5", "::1")
    packets = {text: looked_at.packet("::5" if ":" in text else "1.2.3.4", text, 30080) for text in asked}
    assert {text for text, packet in packets.items() if packet.to_node_port_address} == serving
    assert all(packet.to_node for packet in packets.values())


def test_the_mode_that_is_asked_for_counts_before_that_of_the_configuration() -> None:
    assert view().packet("127.0.0.1", "127.0.0.1", 30080).to_node_port_address
    assert not view(mode=Mode.IPVS).packet("127.0.0.1", "127.0.0.1", 30080).to_node_port_address


def test_link_local_addresses_serve_no_node_ports_in_ipvs_mode() -> None:
    assert view().serves_node_ports("fe80::1")
    assert not view(mode=Mode.IPVS).serves_node_ports("fe80::1")


def test_addresses_of_the_node_object_and_of_the_machine_are_both_the_nodes() -> None:
    looked_at = view(node_with("10.9.9.9"))
    for address in ("10.9.9.9", "192.168.1.2"):
        assert looked_at.packet("1.2.3.4", address, 30080).to_node
        assert looked_at.packet(address, "10.96.0.1", 80).from_node
    assert looked_at.facts.addresses == ("10.9.9.9",)


@pytest.mark.parametrize(
    ("config", "node", "told"),
    [
        ({}, None, {"10.1.0.5": None, "fd00::5": None}),
        ({"cluster_cidrs": ("10.1.0.0/16",)}, None, {"10.1.0.5": True, "10.2.0.5": False, "fd00::5": None}),
        ({"cluster_cidrs": ("10.1.0.0/16", "fd00::/64")}, None, {"10.1.0.5": True, "fd00::5": True, "fd01::5": False}),
        (
            {"detect_local_mode": DetectLocalMode.NODE_CIDR},
            node_with(podCIDRs=["10.1.2.0/24"]),
            {"10.1.2.5": True, "10.1.3.5": False, "fd00::5": None},
        ),
        ({"detect_local_mode": DetectLocalMode.NODE_CIDR}, None, {"10.1.2.5": None}),
    ],
)
def test_pods_of_the_node_by_address(config: dict[str, Any], node: dict[str, Any] | None, told: dict[str, Any]) -> None:
    looked_at = view(node, **config)
    for source, is_pod in told.items():
        target = "fd96::1" if ":" in source else "10.96.0.1"
        assert looked_at.packet(source, target, 80).from_local_pod is is_pod, source


@pytest.mark.parametrize(
    "config",
    [
        {"detect_local_mode": DetectLocalMode.BRIDGE_INTERFACE, "pod_bridge_interface": "cbr0"},
        {"detect_local_mode": DetectLocalMode.INTERFACE_NAME_PREFIX, "pod_interface_name_prefix": "veth"},
    ],
)
def test_by_interface_the_caller_has_to_say(config: dict[str, Any]) -> None:
    looked_at = view(**config)
    with pytest.raises(ValueError, match="detect-local goes by interface"):
        looked_at.packet("10.1.0.5", "10.96.0.1", 80)
    assert looked_at.packet("10.1.0.5", "10.96.0.1", 80, from_local_pod=True).from_local_pod is True
    assert looked_at.packet("192.168.0.2", "10.96.0.1", 80).from_local_pod is False  # the node's own: by no interface
    assert not looked_at.tells_local_pods_by_address


def test_from_a_service_address_that_the_node_holds() -> None:
    packet = view().packet("172.16.0.9", "172.16.0.9", 80)
    assert (packet.from_node, packet.to_node, packet.to_node_port_address) == (True, True, False)


def test_families_must_agree_and_one_that_the_node_lacks_serves_nothing() -> None:
    with pytest.raises(ValueError, match="different IP families"):
        view().packet("10.0.0.1", "fd00::1", 80)
    with pytest.raises(ValueError, match="does not appear to be"):
        view().packet("10.0.0.1", "web", 80)
    only_ipv4 = NodeView(Snapshot((), (), AgentConfig(node_name="n"), NODE_IPS, "", "test", families=(Family.IPV4,)))
    assert not only_ipv4.packet("fd00::1", "2001:db8::2", 80).to_node_port_address
