"""Owns asking the forwarding oracle about the flows of a scene, and where kube-proxy 1.36 is known to answer otherwise.

The oracle sees a scene as the agent does: API objects, node facts, nodePortAddresses. No kernel is involved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from nodeproxy.api.objects import EndpointSlice, Node, Service
from nodeproxy.cluster.names import ServiceName
from nodeproxy.configuration.agent_config import AgentConfig, Mode
from nodeproxy.forwarding.table import Action, Family, FrontendKind, IPProtocol
from nodeproxy.forwarding.verdict import Outcome, Packet, Verdict, verdict
from nodeproxy.sandbox.scene import Flow, Object, Scene
from nodeproxy.sandbox.sockets import host_port
from nodeproxy.snapshot.model import Snapshot
from nodeproxy.snapshot.view import NodeView

IGNORED_LABELS = ("service.kubernetes.io/headless", "service.kubernetes.io/service-proxy-name")
EXPECT = {Outcome.REJECT: "REJECT", Outcome.DROP: "DROP", Outcome.ACCEPT: "ACCEPT", Outcome.NO_MATCH: "no-match"}


class Oracle:
    """What must become of packets in a scene."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.view = NodeView(snapshot_of_scene(scene))
        self.table = self.view.table
        self.problems = self.view.problems

    def ask(self, flow: Flow) -> Verdict:
        """The oracle's verdict on a flow (what the flow itself expects is not looked at)."""
        return self.view.verdict(self.packet(flow))

    def packet(self, flow: Flow) -> Packet:
        """A flow as the oracle sees it."""
        return self.view.packet(flow.source, flow.destination, flow.port, IPProtocol(flow.protocol.lower()))

    def serves_node_ports(self, text: str) -> bool:
        """Whether an address of the node is one that nodePortAddresses allows."""
        return self.view.serves_node_ports(text)


def snapshot_of_scene(scene: Scene, mode: str = "iptables") -> Snapshot:
    """The cluster state and the node of a scene, as an agent with the scene's flags sees them."""
    node = scene.node
    services = msgspec.convert([one for one in scene.services if _selected(one)], list[Service])
    slices = msgspec.convert([one for one in scene.endpoint_slices if _selected(one)], list[EndpointSlice])
    config = AgentConfig(
        node_name=node.name,
        mode=Mode(mode),
        cluster_cidrs=tuple(text.strip() for text in node.pod_cidr.split(",") if text) if node.detect_local else (),
        node_port_addresses=tuple(node.node_port_addresses),
        localhost_node_ports=node.localhost_node_ports,
        masquerade_all=node.masquerade_all,
    )
    return Snapshot(
        objects=(*services, *slices, msgspec.convert(scene.node_object(), Node)),
        refused=(),
        config=config,
        node_addresses=tuple(node.ips),
        taken="1970-01-01T00:00:00Z",
        origin=f"scene {scene.name}",
    )


def _selected(obj: Object) -> bool:
    return not any(label in obj["metadata"].get("labels", {}) for label in IGNORED_LABELS)


def expectation(flow: Flow, answer: Verdict) -> Flow:
    """The flow with what it must meet. A pod that may reach itself or others: `masquerade` is about the others."""
    if answer.outcome is not Outcome.FORWARD:
        return msgspec.structs.replace(flow, expect=EXPECT[answer.outcome], masquerade=False)
    backends = [host_port(backend.address, backend.port) for backend in answer.backends]
    masquerade = answer.masquerade or answer.hairpins == answer.backends
    return msgspec.structs.replace(flow, expect=backends, masquerade=masquerade)


class Asked(NamedTuple):
    """A flow, and everything needed to say whether kube-proxy is known to answer it otherwise."""

    oracle: Oracle
    flow: Flow
    packet: Packet
    answer: Verdict

    @property
    def slices(self) -> list[Object]:
        """EndpointSlices of the family and Service that the flow meets."""
        if self.answer.row is None:
            return []
        name: ServiceName = self.answer.row.key.name.service
        return [
            one
            for one in self.oracle.scene.endpoint_slices
            if (one["metadata"]["namespace"], one["metadata"]["labels"].get("kubernetes.io/service-name")) == name
            and one["addressType"] == f"IPv{int(self.packet.family)}"
        ]


def _left_the_node(asked: Asked) -> bool:
    kind = asked.answer.frontend.kind if asked.answer.frontend else None
    external = kind in (FrontendKind.EXTERNAL_IP, FrontendKind.LOAD_BALANCER_IP)
    return external and asked.answer.outcome is Outcome.REJECT and asked.packet.from_node and not asked.packet.to_node


def _foreign_node_port(asked: Asked) -> bool:
    packet = asked.packet
    if asked.answer.outcome is not Outcome.NO_MATCH or not packet.to_node:
        return False
    frontend = verdict(asked.oracle.table, msgspec.structs.replace(packet, to_node_port_address=True)).frontend
    return frontend is not None and frontend.action in (Action.REJECT, Action.DROP)


def _unknown_serving(asked: Asked) -> bool:
    for one in asked.slices:
        for endpoint in one["endpoints"]:
            conditions = endpoint.get("conditions") or {}
            if conditions.get("ready") is False and conditions.get("serving") is None and conditions.get("terminating"):
                return True
    return False


def _conflicting_duplicates(asked: Asked) -> bool:
    seen: dict[str, Object] = {}
    for one in asked.slices:
        for endpoint in one["endpoints"]:
            address, rest = endpoint["addresses"][0], {k: v for k, v in endpoint.items() if k != "addresses"}
            if seen.setdefault(address, rest) != rest:
                return True
    return False


def _other_node_address(asked: Asked) -> bool:
    frontend, bits = asked.answer.frontend, 32 if asked.packet.family is Family.IPV4 else 128
    return frontend is not None and f"{asked.packet.source}/{bits}" in (frontend.allowed_sources or ())


def _labelled_headless(asked: Asked) -> bool:
    return any(
        IGNORED_LABELS[0] in one["metadata"].get("labels", {}) and asked.flow.destination == one["spec"].get("clusterIP")
        for one in asked.oracle.scene.services
    )


DEVIATIONS: dict[str, Callable[[Asked], bool]] = {
    "kube-proxy lets the node's own traffic to an external or load-balancer IP without endpoints leave the node "
    "(KUBE-EXTERNAL-SERVICES is not in OUTPUT); SPEC 3: REJECT from the node too": _left_the_node,
    "kube-proxy rejects or drops a node port without (local) endpoints on all local addresses, also on those outside "
    "nodePortAddresses; SPEC 3: only those are frontends": _foreign_node_port,
    "kube-proxy 1.36 takes serving nil as true; SPEC 2: as ready": _unknown_serving,
    "of differing entries for one endpoint in two slices kube-proxy keeps any (map order); "
    "SPEC 1: a ready one wins": _conflicting_duplicates,
    "kube-proxy looks for its one primary address in loadBalancerSourceRanges; SPEC 3: any node IP": _other_node_address,
    "kube-proxy passes over EndpointSlices labelled headless, but not over Services; SPEC 1: both": _labelled_headless,
}


def deviation(oracle: Oracle, flow: Flow) -> str | None:
    """Why kube-proxy may answer this flow otherwise than SPEC has it, or None."""
    asked = Asked(oracle, flow, oracle.packet(flow), oracle.ask(flow))
    return next((reason for reason, applies in DEVIATIONS.items() if applies(asked)), None)
