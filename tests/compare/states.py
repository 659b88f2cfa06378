"""Cluster states for comparing: one with a Service of every sort, one with very many, those of the conformance scenes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from nodeproxy.configuration.agent_config import AgentConfig
from nodeproxy.sandbox.scene import Scene
from nodeproxy.snapshot.directory import load
from nodeproxy.snapshot.model import Snapshot

NODE = "this-node"
NODE_ADDRESS = "192.168.0.2"
CONFIG = AgentConfig(node_name=NODE, cluster_cidrs=("10.0.0.0/8", "fd00:10::/32"))
Json = dict[str, Any]


def service(name: str, address: str, *ports: Json, **spec: Any) -> Json:
    family = "IPv6" if ":" in address else "IPv4"
    status = {"loadBalancer": {"ingress": [{"ip": ip} for ip in spec.pop("ingress", [])]}}
    spec = {"clusterIP": address, "clusterIPs": [address], "ipFamilies": [family], "ports": list(ports), **spec}
    metadata = {"name": name, "namespace": "shop"}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec, "status": status}


def endpoints(name: str, port: int, *addresses: str, protocol: str = "TCP", local: tuple[str, ...] = ()) -> Json:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": "shop", "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv6" if ":" in addresses[0] else "IPv4",
        "ports": [{"name": "main", "port": port, "protocol": protocol}],
        "endpoints": [
            {"addresses": [address], "nodeName": NODE if address in local else "elsewhere", "conditions": {"ready": True}}
            for address in addresses
        ],
    }


def port(number: int, protocol: str = "TCP", **more: int) -> Json:
    return {"name": "main", "port": number, "protocol": protocol, **more}


def every_sort() -> list[Json]:
    """Services with every sort of frontend, policy and answer."""
    return [
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": NODE},
            "status": {"addresses": [{"type": "InternalIP", "address": a} for a in (NODE_ADDRESS, "2001:db8::2")]},
        },
        service("web", "10.96.0.10", port(80, nodePort=30080), type="NodePort"),
        endpoints("web", 8080, "10.1.0.1", "10.1.0.2", "10.2.0.1", "10.2.0.2", local=("10.1.0.1", "10.1.0.2")),
        service("web6", "fd00:96::10", port(80, nodePort=30086), type="NodePort"),
        endpoints("web6", 8080, "fd00:10:1::1", "fd00:10:2::1", local=("fd00:10:1::1",)),
        service(
            "shielded", "10.96.0.20", port(443, nodePort=30443), type="LoadBalancer", externalTrafficPolicy="Local",
            loadBalancerSourceRanges=["203.0.113.0/24"], ingress=["1.2.3.4"], externalIPs=["192.168.77.7"],
        ),
        endpoints("shielded", 8443, "10.1.0.1", "10.2.0.3", local=("10.1.0.1",)),
        service("sticky", "10.96.0.30", port(80), sessionAffinity="ClientIP"),
        endpoints("sticky", 8080, "10.2.0.4", "10.2.0.5", "10.1.0.3", local=("10.1.0.3",)),
        service("names", "10.96.0.40", port(53, "UDP")),
        endpoints("names", 5353, "10.2.0.6", "10.2.0.7", protocol="UDP"),
        service("nobody", "10.96.0.50", port(80), externalIPs=["192.168.77.8"]),
        service(
            "far", "10.96.0.60", port(80, nodePort=30060), type="LoadBalancer", externalTrafficPolicy="Local",
            ingress=["1.2.3.5"],
        ),
        endpoints("far", 8080, "10.2.0.8"),
        service("host", "10.96.0.70", port(80)),
        endpoints("host", 8090, NODE_ADDRESS, "192.168.0.3", local=(NODE_ADDRESS,)),
    ]  # fmt: skip


def very_many(services: int, endpoints_each: int = 10) -> list[Json]:
    """So many Services, every tenth with a node port, every twentieth with affinity; a quarter of the endpoints is local."""
    objects = every_sort()[:1]
    for number in range(services):
        address = f"10.{100 + number // 65536}.{number // 256 % 256}.{number % 256}"
        node_port = {"nodePort": 30000 + number // 10} if number % 10 == 5 else {}
        more: Json = {"sessionAffinity": "ClientIP"} if number % 20 == 3 else {}
        more |= {"type": "NodePort"} if node_port else {}
        objects.append(service(f"svc-{number}", address, port(80, **node_port), **more))
        held = range(number * endpoints_each, (number + 1) * endpoints_each)
        addresses = [f"10.{16 + one // 65536}.{one // 256 % 256}.{one % 256}" for one in held]
        objects.append(endpoints(f"svc-{number}", 8080, *addresses, local=tuple(addresses[::4])))
    return objects


def write(objects: list[Json], directory: Path) -> Path:
    """As manifests."""
    directory.mkdir(exist_ok=True)
    (directory / "all.json").write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))
    return directory


def snapshot(objects: list[Json], directory: Path, config: AgentConfig = CONFIG) -> Snapshot:
    """As `nodeproxy compare --manifests` takes it."""
    return replace(_loaded(write(objects, directory), config), config=config)


def of_scene(scene: Scene, directory: Path) -> Snapshot:
    """A conformance scene as its node sees it; its flows are not used, `compare` asks its own."""
    flags = scene.flags()
    config = AgentConfig(
        node_name=flags.hostname,
        cluster_cidrs=tuple(flags.cluster_cidr.split(",")) if flags.detect_local else (),
        node_port_addresses=tuple(flags.nodeport_addresses),
        localhost_node_ports=flags.localhost_nodeports,
        masquerade_all=flags.masquerade_all,
    )
    scene.write_manifests(directory, with_node=True)
    return replace(_loaded(directory, config), config=config)


def _loaded(directory: Path, config: AgentConfig) -> Snapshot:
    (directory / "config.conf").write_text(
        json.dumps({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "hostnameOverride": config.node_name,
        })
    )  # fmt: skip
    return load(directory)
