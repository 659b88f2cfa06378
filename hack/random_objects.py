"""Seeded random Services and EndpointSlices, such as an API server would let through, with many corners of the API."""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Sequence
from typing import Any, Final

from msgspec import Struct

from nodeproxy.sandbox.scene import Object

NODE: Final = "test-node"
OTHER_NODES: Final = ("node-2", "node-3")
ZONE_LABEL: Final = "topology.kubernetes.io/zone"
ZONES: Final = ("zone-a", "zone-b")
NAMESPACES: Final = ("ns1", "ns2")
CLOSED: Final = {"ready": False, "serving": False}


class Plan(Struct, frozen=True):
    """Addresses of one family: who is who. `everything` is the CIDR of all addresses."""

    family: int
    everything: str
    loopback: str
    pod_cidr: str
    node_ips: list[str]
    node_networks: list[str]
    other_node_ips: list[str]
    client_pod: str
    local_pods: list[str]
    remote_pods: list[str]
    clients: list[str]
    source_ranges: list[str]
    service_address: str
    """With one more number at its end it is a cluster IP, external IP or load-balancer IP."""

    def has(self, text: str) -> bool:
        """Whether `text` is an address of the family."""
        try:
            return ipaddress.ip_address(text).version == self.family
        except ValueError:
            return False


PLANS: Final = {
    4: Plan(
        family=4,
        everything="0.0.0.0/0",
        loopback="127.0.0.1",
        pod_cidr="10.0.0.0/8",
        node_ips=["192.168.0.2", "192.168.1.2"],
        node_networks=["192.168.0.0/24", "192.168.1.0/24"],
        other_node_ips=["192.168.0.3"],
        client_pod="10.0.0.2",
        local_pods=["10.180.1.1", "10.180.1.2", "10.180.1.3"],
        remote_pods=["10.180.2.1", "10.180.2.2", "10.180.2.3"],
        clients=["203.0.113.2", "203.0.113.130"],
        source_ranges=["203.0.113.0/25", " 203.0.113.0/24", "192.168.0.0/24", "192.168.1.2/32", "10.0.0.0/8", "0.0.0.0/0"],
        service_address="172.30.{}.",
    ),
    6: Plan(
        family=6,
        everything="::/0",
        loopback="::1",
        pod_cidr="fd00:10::/64",
        node_ips=["2001:db8::1", "2001:db8:1::2"],
        node_networks=["2001:db8::/64", "2001:db8:1::/64"],
        other_node_ips=["2001:db8::3"],
        client_pod="fd00:10::2",
        local_pods=["fd00:10::1:1", "fd00:10::1:2", "fd00:10::1:3"],
        remote_pods=["fd00:10::2:1", "fd00:10::2:2", "fd00:10::2:3"],
        clients=["2600:5200::1", "2600:5200::8001"],
        source_ranges=["2600:5200::/113", " 2600:5200::/96", "2001:db8::/64", "2001:db8:1::2/128", "fd00:10::/64", "::/0"],
        service_address="fd00:172:30::{}:",
    ),
}
CONDITIONS: Final[Sequence[Object | None]] = (
    *[{"ready": True, "serving": True, "terminating": False}] * 6,
    *[{"ready": False, "serving": True, "terminating": True}] * 4,
    *[{"ready": False, "serving": False, "terminating": True}] * 2,
    {"ready": False, "serving": True, "terminating": False},
    {"ready": True, "serving": True, "terminating": True},
    {"ready": None, "serving": None, "terminating": None},
    {"ready": None, "serving": False, "terminating": None},
    *[{"ready": True}, {}, None] * 3,
    {"ready": False, "serving": None, "terminating": True},
    {"ready": False, "serving": None},
)


def zone_labels(rng: random.Random) -> dict[str, str]:
    """Labels of the node: a zone, mostly."""
    return {ZONE_LABEL: rng.choice(ZONES)} if rng.random() < 0.6 else {}


class RandomObjects:
    """Makes the Services of one scene and their slices; no two frontends of different Services collide."""

    def __init__(self, rng: random.Random, plans: Sequence[Plan]) -> None:
        self._rng = rng
        self._plans = plans
        self._number = 0

    def objects(self, count: int) -> list[Object]:
        """`count` Services that are to be programmed and at least one that is not, with all their slices, with `kind`."""
        made: list[Object] = []
        for _ in range(count):
            made += self._service()
        made += self._to_be_ignored()
        return made

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _address(self, plan: Plan, net: int) -> str:
        return f"{plan.service_address.format(net)}{self._next()}"

    def _service(self) -> list[Object]:
        rng = self._rng
        plans = list(self._plans) if rng.random() < 0.7 else [rng.choice(self._plans)]
        type_ = rng.choice(["ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer"])
        name, namespace = f"svc{self._next()}", rng.choice(NAMESPACES)
        ports = self._ports(type_)
        cluster_ips = [self._address(plan, 1) for plan in plans]
        spec: Object = {
            "type": type_,
            "clusterIP": cluster_ips[0],
            "clusterIPs": cluster_ips,
            "ipFamilies": [f"IPv{plan.family}" for plan in plans],
            "ports": ports,
            "internalTrafficPolicy": rng.choice(["Cluster", "Cluster", "Local"]),
        }
        if rng.random() < 0.4:
            spec["externalIPs"] = [self._address(plan, 2) for plan in self._plans]
        if type_ != "ClusterIP" or "externalIPs" in spec:
            spec["externalTrafficPolicy"] = rng.choice(["Cluster", "Local"])
        if rng.random() < 0.25:
            spec["sessionAffinity"] = "ClientIP"
            spec["sessionAffinityConfig"] = {"clientIP": {"timeoutSeconds": rng.choice([60, 10800])}}
        status: Object = {}
        if type_ == "LoadBalancer":
            self._load_balancer(spec, status)
        service = {
            "kind": "Service",
            "metadata": {"name": name, "namespace": namespace},
            "spec": spec,
            "status": status,
        }
        return [service, *(one for plan in plans for one in self._slices(name, namespace, ports, plan))]

    def _ports(self, type_: str) -> list[Object]:
        rng = self._rng
        shape = rng.choice(["one", "one", "unnamed", "two", "same number", "three"])
        protocols = {
            "one": [rng.choice(["TCP", "TCP", "UDP", "SCTP"])],
            "unnamed": [rng.choice(["TCP", "UDP"])],
            "two": ["TCP", rng.choice(["TCP", "UDP"])],
            "same number": ["TCP", "UDP"],
            "three": ["TCP", "UDP", "SCTP"],
        }[shape]
        ports = []
        common = rng.choice([53, 80, 443])
        for index, protocol in enumerate(protocols):
            port: Object = {"port": common if shape == "same number" else common + index, "protocol": protocol}
            if shape != "unnamed":
                port["name"] = f"p{index}"
            if type_ == "NodePort" or (type_ == "LoadBalancer" and rng.random() < 0.8):
                port["nodePort"] = 30000 + self._next()
            ports.append(port)
        if shape == "same number" and type_ == "NodePort" and rng.random() < 0.7:
            ports[1]["nodePort"] = ports[0]["nodePort"]
        return ports

    def _load_balancer(self, spec: Object, status: Object) -> None:
        rng = self._rng
        ingress: list[Object] = []
        for plan in self._plans:
            for _ in range(rng.choice([1, 1, 2])):
                entry: Object = {"ip": self._address(plan, 3)}
                if rng.random() < 0.4:
                    entry["ipMode"] = rng.choice(["VIP", "Proxy"])
                ingress.append(entry)
        if rng.random() < 0.1:
            ingress.append({"hostname": "lb.example.org"})
        status["loadBalancer"] = {"ingress": ingress}
        if rng.random() < 0.5:
            ranges = [one for plan in PLANS.values() for one in plan.source_ranges]
            ours = [one for plan in self._plans for one in plan.source_ranges[:5]]
            spec["loadBalancerSourceRanges"] = rng.sample(rng.choice([ranges, ours, ours]), rng.randint(1, 3))
        if spec["externalTrafficPolicy"] == "Local":
            spec["healthCheckNodePort"] = 31000 + self._next()

    def _slices(self, service: str, namespace: str, ports: Sequence[Object], plan: Plan) -> list[Object]:
        rng = self._rng
        slices: list[Object] = []
        hinting = rng.choice(["none", "none", "zones", "nodes", "both", "some"])
        locations = rng.choice(["any", "any", "any", "remote"])
        conditions = rng.choice(["any", "any", "any", "any", "any", "not ready", "not ready", "closed"])
        for index in range(rng.choice([0, 1, 1, 1, 1, 1, 2, 2, 2, 2])):
            endpoints = [
                self._endpoint(address, plan, hinting, conditions)
                for address in rng.sample(self._pool(plan, locations), rng.randint(1, 3))
            ]
            if slices and slices[0]["endpoints"] and rng.random() < 0.25:
                again = dict(rng.choice(slices[0]["endpoints"]))
                again["conditions"] = rng.choice(CONDITIONS)
                endpoints = [one for one in endpoints if one["addresses"] != again["addresses"]] + [again]
            slices.append(
                {
                    "kind": "EndpointSlice",
                    "metadata": {
                        "name": f"{service}-{plan.family}-{index}",
                        "namespace": namespace,
                        "labels": {"kubernetes.io/service-name": service},
                    },
                    "addressType": f"IPv{plan.family}",
                    "endpoints": endpoints,
                    "ports": self._slice_ports(ports, index),
                }
            )
        if rng.random() < 0.1:
            slices.append(self._fqdn_slice(service, namespace, ports))
        return slices

    def _slice_ports(self, ports: Sequence[Object], index: int) -> list[Object]:
        made = []
        shift = self._rng.choice([0, 0, 100 * index])
        for position, port in enumerate(ports):
            fate = self._rng.random()
            if fate < 0.05:
                continue
            number = None if fate < 0.1 else 8000 + position + shift
            made.append({"name": port.get("name", ""), "protocol": port["protocol"], "port": number})
        return made

    def _fqdn_slice(self, service: str, namespace: str, ports: Sequence[Object]) -> Object:
        return {
            "kind": "EndpointSlice",
            "metadata": {
                "name": f"{service}-fqdn-{self._next()}",
                "namespace": namespace,
                "labels": {"kubernetes.io/service-name": service},
            },
            "addressType": "FQDN",
            "endpoints": [],
            "ports": self._slice_ports(ports, 0),
        }

    def _pool(self, plan: Plan, locations: str) -> list[str]:
        if locations == "remote":
            return [*plan.remote_pods, *plan.other_node_ips]
        return [*plan.local_pods, *plan.remote_pods, plan.node_ips[0], *plan.other_node_ips]

    def _endpoint(self, address: str, plan: Plan, hinting: str, allowed: str) -> Object:
        rng = self._rng
        endpoint: dict[str, Any] = {"addresses": [address]}
        if address in plan.local_pods or address in plan.node_ips:
            endpoint["nodeName"] = NODE
        elif rng.random() < 0.8:
            endpoint["nodeName"] = rng.choice(OTHER_NODES)
        if allowed == "closed":
            endpoint["conditions"] = CLOSED
        else:
            usable = [one for one in CONDITIONS if allowed == "any" or (one and one.get("ready") is False)]
            condition = rng.choice(usable)
            if condition is not None:
                endpoint["conditions"] = condition
        hints: Object = {}
        kind = rng.choice(["none", "zones", "nodes"]) if hinting == "some" else hinting
        if kind in ("zones", "both"):
            hints["forZones"] = [{"name": rng.choice(ZONES)}]
        if kind in ("nodes", "both"):
            hints["forNodes"] = [{"name": name} for name in rng.sample([NODE, *OTHER_NODES], rng.randint(1, 2))]
        if hints:
            endpoint["hints"] = hints
        return endpoint

    def _to_be_ignored(self) -> list[Object]:
        """Services that are none of ours, with slices that would do, had they been."""
        plan = self._rng.choice(self._plans)
        port: Object = {"name": "p0", "port": 80, "protocol": "TCP"}
        labels: dict[str, str] = {}
        spec: Object = {"type": "ClusterIP", "ports": [port]}
        match self._rng.choice(["headless", "headless label", "other proxy", "external name", "no cluster IP"]):
            case "headless":
                spec |= {"clusterIP": "None", "clusterIPs": ["None"], "externalIPs": [self._address(plan, 2)]}
            case "headless label":
                labels["service.kubernetes.io/headless"] = ""
                spec |= self._cluster_ip(plan)
            case "other proxy":
                labels["service.kubernetes.io/service-proxy-name"] = "other"
                spec |= self._cluster_ip(plan)
            case "external name":
                spec |= {"type": "ExternalName", "externalName": "example.org", "externalIPs": [self._address(plan, 2)]}
            case _:
                spec |= {"clusterIP": "", "externalIPs": [self._address(plan, 2)]}
        name = f"ignored{self._next()}"
        metadata = {"name": name, "namespace": "ns1", **({"labels": labels} if labels else {})}
        slice_labels = {"kubernetes.io/service-name": name, **labels}
        return [
            {"kind": "Service", "metadata": metadata, "spec": spec, "status": {}},
            {
                "kind": "EndpointSlice",
                "metadata": {"name": f"{name}-0", "namespace": "ns1", "labels": slice_labels},
                "addressType": f"IPv{plan.family}",
                "endpoints": [{"addresses": [plan.local_pods[0]], "nodeName": NODE}],
                "ports": [{"name": "p0", "protocol": "TCP", "port": 8000}],
            },
        ]

    def _cluster_ip(self, plan: Plan) -> Object:
        address = self._address(plan, 1)
        return {"clusterIP": address, "clusterIPs": [address], "ipFamilies": [f"IPv{plan.family}"]}
