"""The Services of the take-over tests: one of each kind that leaves something of its own in the kernel, in both families."""

from __future__ import annotations

from typing import Any

from nodeproxy.sandbox.topology import Sandbox

Object = dict[str, Any]

NODE = "test-node"
NODE_ADDRESS, NODE_ADDRESS6 = "192.168.0.2", "2001:db8::2"
POD_A, POD_B = ("10.1.0.1", "fd00:10::1"), ("10.1.0.2", "fd00:10::2")
REMOTE = "10.1.5.1"
ASKING_POD = ("10.1.0.9", "fd00:10::9")
CLIENT = ("203.0.113.5", "2001:db8:5::5")
REFUSED_CLIENT = "198.51.100.7"

WEB, WEB6, REMOTE_WEB, STICKY, LOCAL, DNS, SCTP, EMPTY = (
    *("10.96.0.10", "fd00:96::10", "10.96.0.20", "10.96.0.30"),
    *("10.96.0.40", "10.96.0.50", "10.96.0.60", "10.96.0.70"),
)
EXTERNAL_IP, BALANCED_IP, FENCED_IP = "198.18.0.1", "198.18.0.2", "198.18.0.3"
WEB_PORT, LOCAL_PORT, DNS_PORT, SCTP_PORT, HEALTH_PORT = 30080, 30081, 30053, 30090, 30099


def _service(name: str, cluster_ips: list[str], port: int, protocol: str = "TCP", node_port: int = 0, **spec: Any) -> Object:
    ingress = [{"ip": address} for address in spec.pop("balanced", ())]
    one = {"name": "p", "port": port, "protocol": protocol, **({"nodePort": node_port} if node_port else {})}
    kind = "LoadBalancer" if ingress else "NodePort" if node_port else "ClusterIP"
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "shop", "creationTimestamp": "2025-01-01T00:00:00Z"},
        "spec": {
            "type": kind,
            "clusterIP": cluster_ips[0],
            "clusterIPs": cluster_ips,
            "ipFamilies": ["IPv6" if ":" in address else "IPv4" for address in cluster_ips],
            "ipFamilyPolicy": "PreferDualStack" if len(cluster_ips) > 1 else "SingleStack",
            "ports": [one],
            **spec,
        },
        "status": {"loadBalancer": {"ingress": ingress}},
    }


def endpoints(name: str, addresses: list[str], port: int = 8080, protocol: str = "TCP", node: str = NODE) -> Object:
    """A slice of ready endpoints of a Service."""
    family = "IPv6" if ":" in addresses[0] else "IPv4"
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{name}-{family.lower()}",
            "namespace": "shop",
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": family,
        "endpoints": [{"addresses": [one], "nodeName": node, "conditions": {"ready": True}} for one in addresses],
        "ports": [{"name": "p", "port": port, "protocol": protocol}],
    }


def fenced(sources: str) -> Object:
    """The Service behind a load balancer that only some sources may use."""
    spec = {"loadBalancerSourceRanges": [sources], "allocateLoadBalancerNodePorts": False}
    return _service("fenced", ["10.96.0.41"], 80, balanced=[FENCED_IP], **spec)


def node_object() -> Object:
    """The Node that kube-proxy waits for."""
    addresses = [{"type": "InternalIP", "address": address} for address in (NODE_ADDRESS, NODE_ADDRESS6)]
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": NODE},
        "spec": {},
        "status": {"addresses": addresses},
    }


def objects() -> list[Object]:
    """All of them, without the Node."""
    both = [POD_A[0], POD_B[0]]
    affinity = {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}}}
    local = {"externalTrafficPolicy": "Local", "healthCheckNodePort": HEALTH_PORT}
    return [
        _service("web", [WEB, WEB6], 80, node_port=WEB_PORT, externalIPs=[EXTERNAL_IP]),
        endpoints("web", both),
        endpoints("web", [POD_A[1], POD_B[1]]),
        _service("remote", [REMOTE_WEB], 80),
        endpoints("remote", [REMOTE], node="elsewhere"),
        _service("sticky", [STICKY], 80, **affinity),
        endpoints("sticky", both),
        _service("local", [LOCAL], 80, node_port=LOCAL_PORT, balanced=[BALANCED_IP], **local),
        endpoints("local", both),
        fenced("203.0.113.0/24"),
        endpoints("fenced", both),
        _service("dns", [DNS], 53, "UDP", DNS_PORT),
        endpoints("dns", both, 8053, "UDP"),
        _service("sctp", [SCTP], 90, "SCTP", SCTP_PORT),
        endpoints("sctp", both, 8090, "SCTP"),
        _service("empty", [EMPTY], 80),
    ]


def serve(box: Sandbox) -> None:
    """Make the pods and the clients, and start servers at every endpoint."""
    box.add_pods([POD_A, POD_B, ASKING_POD])
    box.add_clients([CLIENT, [REFUSED_CLIENT]])
    for name, addresses in (("a", POD_A), ("b", POD_B)):
        pod = box.pods[addresses[0]]
        for address in addresses:
            box.serve(pod, address, 8080, name=name)
        box.serve(pod, addresses[0], 8053, protocol="UDP", name=name)
    box.serve(box.outside, REMOTE, 8080, name="remote")
