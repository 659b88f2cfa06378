"""Owns scenes: cluster state and packets as data, and laying them out as a node, pods and clients in a sandbox.

The format is that of `tests/conformance/packet_flows.json`. Addresses are text; an endpoint is `ADDRESS:PORT` with an
IPv6 address in brackets. Objects of the cluster stay as they are in the scene, as plain JSON values.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

from nodeproxy.sandbox.agent import AgentFlags
from nodeproxy.sandbox.namespace import Namespace
from nodeproxy.sandbox.sockets import host_port
from nodeproxy.sandbox.topology import Sandbox

Object = dict[str, Any]

ON_NODE: Final = "node"  # name of the server that stands for "not matched by any rule, and delivered on the node"
OUTSIDE: Final = "outside"  # the same, for what left the node


class NodeSpec(msgspec.Struct, frozen=True):
    """The node of a scene and how its agent is configured."""

    name: str
    ips: list[str]
    pod_cidr: str
    detect_local: bool = True
    masquerade_all: bool = False
    localhost_node_ports: bool = True
    node_port_addresses: list[str] = []
    labels: dict[str, str] = {}


class Flow(msgspec.Struct, frozen=True):
    """A packet and what must become of it."""

    source: str
    destination: str
    port: int
    expect: str | list[str]
    protocol: str = "TCP"
    masquerade: bool = False

    def __str__(self) -> str:
        what = self.expect if isinstance(self.expect, str) else " or ".join(self.expect)
        source = " (masqueraded)" if self.masquerade else ""
        return f"{self.protocol} {self.source} -> {host_port(self.destination, self.port)}: expect {what}{source}"


class Scene(msgspec.Struct, frozen=True):
    """Cluster state, a node, and the packets to send."""

    name: str
    ip_family: str
    node: NodeSpec
    services: list[Object]
    endpoint_slices: list[Object]
    flows: list[Flow]

    def flags(self, mode: str = "iptables") -> AgentFlags:
        """The agent's flags for this node."""
        return AgentFlags(
            hostname=self.node.name,
            mode=mode,
            cluster_cidr=self.node.pod_cidr,
            detect_local=self.node.detect_local,
            nodeport_addresses=self.node.node_port_addresses,
            localhost_nodeports=self.node.localhost_node_ports,
            masquerade_all=self.node.masquerade_all,
        )

    def service_addresses(self) -> set[str]:
        """Every address that Services name, whether or not a proxy programs it."""
        return {address for service in self.services for address in _addresses(service)}

    def node_object(self) -> Object:
        """A Node, with the node's addresses; those of the scene's family first, as they make the primary family."""
        ours = 6 if self.ip_family == "IPv6" else 4
        addresses = sorted(self.node.ips, key=lambda text: ipaddress.ip_address(text).version != ours)
        return {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": self.node.name, "labels": self.node.labels},
            "status": {"addresses": [{"type": "InternalIP", "address": address} for address in addresses]},
        }

    def objects(self, *, with_node: bool | None = None) -> list[Object]:
        """All objects with apiVersion and kind. By default a Node is among them only where the scene needs one.

        That is when it has labels, or when node ports are on the node's primary addresses, which a Node tells.
        """
        services = [{"apiVersion": "v1", "kind": "Service", **one} for one in self.services]
        slices = [{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", **one} for one in self.endpoint_slices]
        needed = bool(self.node.labels) or "primary" in self.node.node_port_addresses
        wanted = needed if with_node is None else with_node
        return [*([self.node_object()] if wanted else []), *services, *slices]

    def write_manifests(self, directory: Path, *, with_node: bool | None = None) -> Path:
        """Write the objects as one multi-document YAML file; returns its path."""
        path = directory / f"{self.name}.yaml"
        path.write_text(yaml.safe_dump_all(self.objects(with_node=with_node), sort_keys=False))
        return path


def load_scenes(path: Path) -> list[Scene]:
    """All scenes of a file; the addresses of flows and node are put in their usual form, as servers report them."""
    return [_canonical(scene) for scene in msgspec.json.decode(path.read_bytes(), type=list[Scene])]


def _canonical(scene: Scene) -> Scene:
    def usual(address: str) -> str:
        return str(ipaddress.ip_address(address))

    replace = msgspec.structs.replace
    flows = [replace(flow, source=usual(flow.source), destination=usual(flow.destination)) for flow in scene.flows]
    node = replace(scene.node, ips=[usual(address) for address in scene.node.ips])
    return replace(scene, node=node, flows=flows)


def sticky(scene: Scene, flow: Flow) -> bool:
    """Whether the Service a flow is for has ClientIP affinity."""
    for service in scene.services:
        spec = service.get("spec", {})
        if spec.get("sessionAffinity") != "ClientIP":
            continue
        addresses = _addresses(service)
        for port in spec.get("ports", []):
            if flow.protocol != port.get("protocol", "TCP"):
                continue
            if flow.port == port.get("nodePort") or (flow.destination in addresses and flow.port == port.get("port")):
                return True
    return False


def _addresses(service: Object) -> set[str]:
    """Every address that a Service names, in its usual form."""
    spec = service.get("spec", {})
    ingress = service.get("status", {}).get("loadBalancer", {}).get("ingress", [])
    named = [spec.get("clusterIP"), *spec.get("clusterIPs", []), *spec.get("externalIPs", [])]
    named += [one.get("ip") for one in ingress]
    return {address for text in named if (address := _usual_address(text)) is not None}


def _usual_address(text: object) -> str | None:
    try:
        return str(ipaddress.ip_address(str(text)))
    except ValueError:
        return None


class Layout:
    """A scene laid out in a sandbox: which namespace sends each flow, and servers at every endpoint."""

    def __init__(self, box: Sandbox, scene: Scene) -> None:
        self.box = box
        self.scene = scene
        self._pod_cidrs = [ipaddress.ip_network(text.strip()) for text in scene.node.pod_cidr.split(",") if text]
        self._served: set[tuple[str, str, int, str]] = set()
        self._build()

    def from_node(self, flow: Flow) -> bool:
        """The node itself sends it: by one of its addresses, by loopback, or by a service address bound on it."""
        return self.on_node(flow.source) or flow.source == flow.destination

    def borrowed(self, flow: Flow) -> bool:
        """The source is a service address, which the node holds only while the packet is sent."""
        return self.from_node(flow) and not self.on_node(flow.source)

    def from_pod(self, flow: Flow) -> bool:
        """A pod of this node sends it."""
        address = ipaddress.ip_address(flow.source)
        return not self.from_node(flow) and any(address in cidr for cidr in self._pod_cidrs)

    @contextmanager
    def sender(self, flow: Flow) -> Iterator[Namespace]:
        """The namespace to send a flow from, with its source address there."""
        with self.box.node_address(flow.source) if self.borrowed(flow) else nullcontext():
            if self.from_node(flow):
                yield self.box.node
            elif flow.source in self.box.pods:
                yield self.box.pods[flow.source]
            else:
                yield self.box.clients[flow.source]

    def on_node(self, address: str) -> bool:
        """Whether an address is the node's own, or loopback."""
        return address in self.scene.node.ips or ipaddress.ip_address(address).is_loopback

    def _endpoints(self) -> Iterator[tuple[str, int, str, bool]]:
        """(address, port, protocol, is local) of every endpoint in the slices, usable or not."""
        for one in self.scene.endpoint_slices:
            for endpoint in one.get("endpoints") or []:
                local = endpoint.get("nodeName") == self.scene.node.name
                for port in one.get("ports") or []:
                    if port.get("port") is not None:
                        for address in endpoint["addresses"]:
                            yield address, port["port"], port.get("protocol", "TCP"), local

    def _build(self) -> None:
        senders = {flow.source for flow in self.scene.flows if self.from_pod(flow)}
        local = {address for address, _, _, is_local in self._endpoints() if is_local and not self.on_node(address)}
        self.box.add_pods([[address] for address in sorted(senders | local)])
        outside = {f.source for f in self.scene.flows if not self.from_node(f) and not self.from_pod(f)}
        self.box.add_clients([[address] for address in sorted(outside - self.box.pods.keys())])
        for address, port, protocol, _ in self._endpoints():
            where = self.box.node if self.on_node(address) else self.box.pods.get(address, self.box.outside)
            self._serve(where, address, port, protocol, host_port(address, port))
        for flow in self.scene.flows:
            if flow.expect == "ACCEPT":
                continue  # a port of the agent's own
            if self.on_node(flow.destination) or self.borrowed(flow):
                self._serve(self.box.node, flow.destination, flow.port, flow.protocol, ON_NODE)
            if not self.on_node(flow.destination):
                where = self.box.clients.get(flow.destination, self.box.outside)
                self._serve(where, flow.destination, flow.port, flow.protocol, OUTSIDE)

    def _serve(self, where: Namespace, address: str, port: int, protocol: str, name: str) -> None:
        key = (where.name, address, port, protocol)
        if key not in self._served:
            self._served.add(key)
            self.box.serve(where, address, port, protocol=protocol, name=name)


@contextmanager
def lay_out(scene: Scene, *, node_addresses: Sequence[str] | None = None) -> Iterator[Layout]:
    """A sandbox with the scene laid out in it; gone afterwards."""
    with Sandbox(node_addresses=scene.node.ips if node_addresses is None else node_addresses) as box:
        yield Layout(box, scene)
