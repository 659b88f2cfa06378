"""Owns asking the forwarding oracle about the flows of a scene, and where kube-proxy 1.36 is known to answer otherwise.

The oracle sees a scene as the agent does: API objects, node facts, nodePortAddresses. No kernel is involved.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from nodeproxy.api.objects import EndpointSlice, Node, Service
from nodeproxy.cluster.names import ServiceName
from nodeproxy.cluster.state import ClusterState
from nodeproxy.forwarding.node import NodeFacts
from nodeproxy.forwarding.table import Action, Family, FrontendKind, IPProtocol
from nodeproxy.forwarding.tracker import ForwardingTracker
from nodeproxy.forwarding.verdict import Outcome, Packet, Verdict, index_frontends, verdict
from nodeproxy.sandbox.scene import Flow, Object, Scene
from nodeproxy.sandbox.sockets import host_port
from nodeproxy.source.events import Upserted

IGNORED_LABELS = ("service.kubernetes.io/headless", "service.kubernetes.io/service-proxy-name")
EXPECT = {Outcome.REJECT: "REJECT", Outcome.DROP: "DROP", Outcome.ACCEPT: "ACCEPT", Outcome.NO_MATCH: "no-match"}


class Oracle:
    """What must become of packets in a scene."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        node = scene.node
        state = ClusterState(node.name)
        facts = NodeFacts(node.name, addresses=tuple(node.ips), masquerade_all=node.masquerade_all)
        tracker = ForwardingTracker(facts)
        services = [one for one in scene.services if _selected(one)]
        slices = [one for one in scene.endpoint_slices if _selected(one)]
        objects: list[Service | EndpointSlice | Node] = [
            *msgspec.convert(services, list[Service]),
            *msgspec.convert(slices, list[EndpointSlice]),
            msgspec.convert(scene.node_object(), Node),
        ]
        tracker.update(state, state.apply([Upserted(obj) for obj in objects]))
        self.table = tracker.table
        self.problems = tracker.problems
        self._index = index_frontends(self.table)
        self._pod_cidrs = [ipaddress.ip_network(text.strip()) for text in node.pod_cidr.split(",") if text]
        self._node_port_cidrs = [ipaddress.ip_network(text) for text in node.node_port_addresses if text != "primary"]
        self._ours = {ipaddress.ip_address(text) for text in node.ips}

    def ask(self, flow: Flow) -> Verdict:
        """The oracle's verdict on a flow (what the flow itself expects is not looked at)."""
        return verdict(self.table, self.packet(flow), self._index)

    def packet(self, flow: Flow) -> Packet:
        """A flow as the oracle sees it."""
        source, destination = ipaddress.ip_address(flow.source), ipaddress.ip_address(flow.destination)
        family = Family(source.version)
        own = source == destination  # from a service address that the node holds
        to_node = destination in self._ours or destination.is_loopback
        return Packet(
            family=family,
            source=str(source),
            destination=str(destination),
            port=flow.port,
            protocol=IPProtocol(flow.protocol.lower()),
            from_local_pod=self._from_local_pod(flow.source),
            from_node=source in self._ours or source.is_loopback or own,
            to_node=to_node or own,
            to_node_port_address=to_node and self.serves_node_ports(flow.destination),
        )

    def serves_node_ports(self, text: str) -> bool:
        """Whether an address of the node is one that nodePortAddresses allows."""
        node, address = self.scene.node, ipaddress.ip_address(text)
        if address.is_loopback and not (address.version == 4 and node.localhost_node_ports):
            return False
        if node.node_port_addresses == ["primary"]:
            same_family = [ip for ip in node.ips if ipaddress.ip_address(ip).version == address.version]
            return text == same_family[0]
        # As in kube-proxy, CIDRs of the other family say nothing about this one.
        cidrs = [cidr for cidr in self._node_port_cidrs if cidr.version == address.version]
        return not cidrs or any(address in cidr for cidr in cidrs)

    def _from_local_pod(self, text: str) -> bool | None:
        address = ipaddress.ip_address(text)
        cidrs = [cidr for cidr in self._pod_cidrs if cidr.version == address.version]
        return any(address in cidr for cidr in cidrs) if cidrs and self.scene.node.detect_local else None


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
