"""Random cluster objects: a small world, so that things collide, with every feature and every kind of rubbish in it."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import strategies as st

from nodeproxy.api.objects import EndpointSlice, Kind, Node, ObjectKey, Service
from nodeproxy.source.events import Deleted, Event, Upserted

NAMESPACES = ["ns"]
SERVICES = ["a", "b", "c"]
SLICES = ["s1", "s2", "s3", "s4"]
NODES = ["here", "elsewhere", "third"]
ZONES = ["zone-a", "zone-b"]
PROTOCOLS = ["TCP"] * 10 + ["UDP", None]
PORT_NAMES = ["http"] * 10 + ["dns", ""]
BAD_ADDRESSES = ["", "nonsense", "10.0.0.01", "::ffff:10.0.0.1", "fe80::1%eth0", "127.0.0.1", "0.0.0.0", "1.2.3.4\n"]


def mostly(good: list[Any], bad: list[Any]) -> st.SearchStrategy[Any]:
    """One of `good`; one time in eight one of `bad`."""
    return st.integers(0, 7).flatmap(lambda dice: st.sampled_from(bad if dice == 5 else good))


maybe = st.sampled_from([True, True, False, None])
port_numbers = mostly([80, 80, 81, 443], [0, -1, 65536])
node_ports = mostly([0, 30080, 30080, 30081], [None, 99999])
addresses = mostly(["192.0.2.1", "192.0.2.2", "2001:db8::1", "10.96.0.1", "2001:DB8:0::2"], BAD_ADDRESSES)
ipv4_cluster_ips = ["10.96.0.1", "10.96.0.2", "10.96.0.3"]
cluster_ips = mostly(ipv4_cluster_ips, ["None", "", "nonsense", "fd00::1"])
cluster_ip_lists = mostly(
    [[], [], *([ip, v6] for ip in ipv4_cluster_ips for v6 in ("fd00::1", "fd00::2"))],
    [["nonsense", "10.96.0.1"], ["10.96.0.1", "10.96.0.2"], ["None"], ["fd00::1"]],
)
ranges = mostly(["203.0.113.0/24", " 203.0.113.77/24 ", "192.168.0.0/16", "2001:db8::/32", "0.0.0.0/0"], ["rubbish"])
policies = mostly(["Cluster", "Local", "Local", None], ["Sideways"])


def lists(strategy: st.SearchStrategy[Any], most: int) -> st.SearchStrategy[list[Any]]:
    return st.lists(strategy, max_size=most)


service_specs = st.fixed_dictionaries(
    {
        "clusterIP": cluster_ips,
        "clusterIPs": cluster_ip_lists,
        "type": mostly(["ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer"], ["ExternalName", None, "Odd"]),
        "ports": st.lists(
            st.fixed_dictionaries(
                {
                    "name": st.sampled_from(PORT_NAMES),
                    "port": port_numbers,
                    "protocol": mostly(PROTOCOLS, ["ICMP", "SCTP"]),
                    "nodePort": node_ports,
                }
            ),
            min_size=1,
            max_size=2,
        ),
        "externalIPs": lists(addresses, 3),
        "sessionAffinity": mostly(["None", "ClientIP"], [None, "Always"]),
        "sessionAffinityConfig": st.none() | st.just({"clientIP": {"timeoutSeconds": 5}}),
        "loadBalancerSourceRanges": lists(ranges, 3),
        "externalTrafficPolicy": policies,
        "internalTrafficPolicy": policies,
        "healthCheckNodePort": mostly([31000, 31001], [0, None, -5]),
    }
)

ingress = lists(st.fixed_dictionaries({"ip": st.none() | addresses, "ipMode": mostly([None, "VIP"], ["Proxy", "Odd"])}), 3)


def _service(namespace: str, name: str, created: str | None, spec: Any, lb: Any) -> Service:
    metadata = {"name": name, "namespace": namespace, "creationTimestamp": created}
    return msgspec.convert({"metadata": metadata, "spec": spec, "status": {"loadBalancer": {"ingress": lb}}}, Service)


services = st.builds(
    _service,
    st.sampled_from(NAMESPACES),
    st.sampled_from(SERVICES),
    st.sampled_from([None, "2024-01-01T00:00:00Z", "2025-01-01T00:00:00Z", "yesterday"]),
    service_specs,
    ingress,
)

endpoints = st.fixed_dictionaries(
    {
        "addresses": st.lists(
            mostly(["10.0.0.1", "10.0.0.2", "10.0.0.3"], ["fd01::1", "fd01::2", *BAD_ADDRESSES]), min_size=1, max_size=1
        ),
        "conditions": st.none() | st.fixed_dictionaries({"ready": maybe, "serving": maybe, "terminating": maybe}),
        "nodeName": mostly(["here", "here", "elsewhere", "third"], [None, ""]),
        "hints": st.none()
        | st.fixed_dictionaries(
            {
                "forZones": lists(st.fixed_dictionaries({"name": st.sampled_from(ZONES)}), 2),
                "forNodes": lists(st.fixed_dictionaries({"name": st.sampled_from(NODES)}), 2),
            }
        ),
    }
)

slice_ports = st.fixed_dictionaries(
    {
        "name": st.sampled_from(PORT_NAMES),
        "port": mostly([8080, 8080, 8081], [None, 0, 70000]),
        "protocol": st.sampled_from(PROTOCOLS),
    }
)


def _slice(namespace: str, name: str, owner: str | None, content: dict[str, Any]) -> EndpointSlice:
    labels = {"kubernetes.io/service-name": owner} if owner is not None else {}
    return msgspec.convert({"metadata": {"name": name, "namespace": namespace, "labels": labels}, **content}, EndpointSlice)


slices = st.builds(
    _slice,
    st.sampled_from(NAMESPACES),
    st.sampled_from(SLICES),
    mostly(SERVICES, [None, "Bad Name"]),
    st.fixed_dictionaries(
        {
            "addressType": mostly(["IPv4"], ["IPv6", "FQDN"]),
            "endpoints": st.lists(endpoints, min_size=1, max_size=4),
            "ports": st.lists(slice_ports, min_size=1, max_size=2),
        }
    ),
)


def _node(name: str, zone: str | None, ips: list[str]) -> Node:
    labels = {"topology.kubernetes.io/zone": zone} if zone is not None else {}
    status = {"addresses": [{"type": "InternalIP", "address": ip} for ip in ips]}
    return msgspec.convert({"metadata": {"name": name, "labels": labels}, "status": status}, Node)


nodes = st.builds(
    _node,
    st.sampled_from(NODES),
    st.sampled_from([*ZONES, None, ""]),
    lists(st.sampled_from(["192.168.0.2", "203.0.113.9", "2001:db8::5", "rubbish"]), 2),
)


def _deleted(kind: Kind, namespace: str, name: str) -> Deleted:
    return Deleted(ObjectKey(kind, namespace, name))


deletions = (
    st.builds(_deleted, st.just(Kind.SERVICE), st.sampled_from(NAMESPACES), st.sampled_from(SERVICES))
    | st.builds(_deleted, st.just(Kind.ENDPOINT_SLICE), st.sampled_from(NAMESPACES), st.sampled_from(SLICES))
    | st.builds(_deleted, st.just(Kind.NODE), st.just(""), st.sampled_from(NODES))
)
new_services, new_slices = st.builds(Upserted, services), st.builds(Upserted, slices)
events: st.SearchStrategy[Event] = st.one_of(
    new_services, new_services, *[new_slices] * 4, st.builds(Upserted, nodes), deletions
)
beginnings: st.SearchStrategy[list[Event]] = st.tuples(new_services, new_services, *[new_slices] * 4).map(list)
later_batches: st.SearchStrategy[list[list[Event]]] = st.lists(st.lists(events, min_size=1, max_size=4), max_size=8)
batches = st.builds(lambda first, later: [first, *later], beginnings, later_batches)
