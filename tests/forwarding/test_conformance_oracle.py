"""Every packet-flow scene of the conformance data, through the oracle: the table says what kube-proxy does."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nodeproxy.api.objects import EndpointSlice, Service
from nodeproxy.cluster.state import ClusterState
from nodeproxy.forwarding.node import NodeFacts
from nodeproxy.forwarding.table import Family, IPProtocol
from nodeproxy.forwarding.tracker import ForwardingTracker
from nodeproxy.forwarding.verdict import Outcome, Packet, Verdict, verdict
from nodeproxy.source.events import Upserted

REPO = Path(__file__).parents[2]
PLACES = [REPO / "tests/conformance/packet_flows.json", REPO.parent / "shared/conformance/packet_flows.json"]
SCENES: list[dict[str, Any]] = json.loads(next(place for place in PLACES if place.exists()).read_text())
FLOWS = [
    pytest.param(scene, flow, id=f"{scene['name']}-{flow['source']}-to-{flow['destination']}:{flow['port']}")
    for scene in SCENES
    for flow in scene["flows"]
]
OUTCOMES = {"REJECT": Outcome.REJECT, "DROP": Outcome.DROP, "ACCEPT": Outcome.ACCEPT, "no-match": Outcome.NO_MATCH}


def test_all_scenes_are_there() -> None:
    assert len(SCENES) >= 28
    assert len(FLOWS) >= 120


@pytest.mark.parametrize(("scene", "flow"), FLOWS)
def test_flow(scene: dict[str, Any], flow: dict[str, Any]) -> None:
    answer = ask(scene, flow)
    expected = flow["expect"]
    if isinstance(expected, str):
        assert answer.outcome is OUTCOMES[expected]
        return
    assert answer.outcome is Outcome.FORWARD
    assert sorted(host_port(b.address, b.port) for b in answer.backends) == sorted(expected)
    assert answer.masquerade is flow["masquerade"]


def ask(scene: dict[str, Any], flow: dict[str, Any]) -> Verdict:
    node, family = scene["node"], Family(int(scene["ip_family"][-1]))
    source = ipaddress.ip_address(flow["source"])
    destination = ipaddress.ip_address(flow["destination"])
    ours = {ipaddress.ip_address(ip) for ip in node["ips"]}
    loopback = destination.is_loopback and family is Family.IPV4 and node["localhost_node_ports"]
    served = any(destination in ipaddress.ip_network(cidr) for cidr in node["node_port_addresses"])
    packet = Packet(
        family=family,
        source=flow["source"],
        destination=flow["destination"],
        port=flow["port"],
        protocol=IPProtocol(flow["protocol"].lower()),
        from_local_pod=source in ipaddress.ip_network(node["pod_cidr"]) if node["detect_local"] else None,
        from_node=source in ours or source.is_loopback,
        to_node=destination in ours or destination.is_loopback,
        to_node_port_address=served and (loopback or destination in ours),
    )
    return verdict(table_of(scene).table, packet)


def table_of(scene: dict[str, Any]) -> ForwardingTracker:
    node = scene["node"]
    state = ClusterState(node["name"])
    facts = NodeFacts(node["name"], addresses=tuple(node["ips"]), masquerade_all=node["masquerade_all"])
    tracker = ForwardingTracker(facts)
    objects = [
        *msgspec.convert(scene["services"], list[Service]),
        *msgspec.convert(scene["endpoint_slices"], list[EndpointSlice]),
    ]
    tracker.update(state, state.apply([Upserted(obj) for obj in objects]))
    assert not tracker.problems
    return tracker


def host_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
