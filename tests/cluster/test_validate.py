"""Bad values: each costs only itself, and is named with the path of its field."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from nodeproxy.api.objects import EndpointSlice, Service
from nodeproxy.cluster.checked import CheckedService, CheckedSlice
from nodeproxy.cluster.findings import MAX_PROBLEMS
from nodeproxy.cluster.names import ServiceName
from nodeproxy.cluster.slices import check_slice
from nodeproxy.cluster.validate import check_service

NAME = ServiceName("ns", "web")
GOOD: dict[str, Any] = {
    "clusterIP": "10.96.0.1",
    "type": "LoadBalancer",
    "ports": [{"name": "http", "port": 80, "nodePort": 30080}],
}


def checked(ingress: Any = (), **spec: Any) -> CheckedService:
    raw = {"metadata": {"name": "web", "namespace": "ns"}, "spec": {**GOOD, **spec}}
    result = check_service(msgspec.convert({**raw, "status": {"loadBalancer": {"ingress": list(ingress)}}}, Service), NAME)
    assert result is not None
    return result


def named(service: CheckedService | CheckedSlice) -> dict[str, str]:
    assert all(problem.service == NAME for problem in service.problems)
    return {problem.field: problem.reason for problem in service.problems}


def test_a_good_service_has_no_problems() -> None:
    assert checked().problems == ()


@pytest.mark.parametrize(
    ("spec", "field", "reason"),
    [
        ({"type": "Odd", "ports": [{"port": 80}]}, "spec.type", "'Odd' is unknown; taken as ClusterIP"),
        ({"sessionAffinity": "Always"}, "spec.sessionAffinity", "'Always' is unknown; taken as None"),
        ({"externalTrafficPolicy": "local"}, "spec.externalTrafficPolicy", "'local' is unknown; taken as Cluster"),
        ({"internalTrafficPolicy": "X"}, "spec.internalTrafficPolicy", "'X' is unknown; taken as Cluster"),
        ({"clusterIPs": ["10.96.0.1", "10.96.0.2"]}, "spec.clusterIPs[1]", "a second IPv4 address"),
        ({"externalIPs": ["192.0.2.1", "01.2.3.4"]}, "spec.externalIPs[1]", "'01.2.3.4' is not a canonical IP address"),
        ({"externalIPs": ["::ffff:1.2.3.4"]}, "spec.externalIPs[0]", "'::ffff:1.2.3.4' is not a canonical IP address"),
        ({"externalIPs": ["fe80::1%eth0"]}, "spec.externalIPs[0]", "'fe80::1%eth0' is not a canonical IP address"),
        ({"externalIPs": ["1.2.3.4\n-A X"]}, "spec.externalIPs[0]", "'1.2.3.4\\n-A X' is not a canonical IP address"),
        (
            {"externalIPs": ["127.0.0.1"]},
            "spec.externalIPs[0]",
            "127.0.0.1 is unspecified, loopback, link-local or multicast",
        ),
        ({"externalIPs": ["2001:db8::1"]}, "spec.externalIPs[0]", "2001:db8::1: the Service has no IPv6 cluster IP"),
        ({"loadBalancerSourceRanges": ["10/8"]}, "spec.loadBalancerSourceRanges[0]", "'10/8' is not a canonical CIDR"),
        (
            {"externalTrafficPolicy": "Local", "healthCheckNodePort": 70000},
            "spec.healthCheckNodePort",
            "70000 is not in 1-65535",
        ),
    ],
)
def test_a_bad_field_is_named(spec: Any, field: str, reason: str) -> None:
    service = checked(**spec)
    assert named(service) == {field: reason}
    assert len(service.ports) == 1
    assert [address.text for address in service.cluster_ips] == ["10.96.0.1"]


@pytest.mark.parametrize(
    ("port", "field"),
    [
        ({"port": 0}, "port"),
        ({"port": -1}, "port"),
        ({"port": 65536}, "port"),
        ({"port": 10**30}, "port"),
        ({"port": 80, "protocol": "ICMP"}, "protocol"),
        ({"port": 80, "protocol": "tcp"}, "protocol"),
        ({"port": 80, "name": 'x" -j ACCEPT'}, "name"),
        ({"port": 80, "name": "UPPER"}, "name"),
        ({"port": 80, "name": "a" * 64}, "name"),
        ({"port": 81, "name": "http"}, "name"),
    ],
)
def test_a_bad_port_is_left_out(port: Any, field: str) -> None:
    service = checked(ports=[*GOOD["ports"], port, {"name": "last", "port": 1}])
    assert list(named(service)) == [f"spec.ports[1].{field}"]
    assert [(p.index, p.name) for p in service.ports] == [(0, "http"), (2, "last")]


@pytest.mark.parametrize(("node_port", "type_"), [(65536, "NodePort"), (-1, "LoadBalancer"), (30080, "ClusterIP")])
def test_a_bad_node_port_costs_only_the_node_port(node_port: int, type_: str) -> None:
    service = checked(ports=[{"port": 80, "nodePort": node_port}], type=type_)
    assert list(named(service)) == ["spec.ports[0].nodePort"]
    assert [(p.port, p.node_port) for p in service.ports] == [(80, 0)]


@pytest.mark.parametrize("seconds", [0, -1, 86401, 10**12])
def test_an_affinity_timeout_out_of_range(seconds: int) -> None:
    service = checked(sessionAffinity="ClientIP", sessionAffinityConfig={"clientIP": {"timeoutSeconds": seconds}})
    assert service.affinity_seconds == 10800
    assert list(named(service)) == ["spec.sessionAffinityConfig.clientIP.timeoutSeconds"]


@pytest.mark.parametrize("seconds", [1, 86400])
def test_an_affinity_timeout_at_the_limit(seconds: int) -> None:
    service = checked(sessionAffinity="ClientIP", sessionAffinityConfig={"clientIP": {"timeoutSeconds": seconds}})
    assert (service.affinity_seconds, service.problems) == (seconds, ())


def test_load_balancer_ips() -> None:
    ingress = [
        {"ip": "192.0.2.1"},
        {"ip": "0.0.0.0"},
        {"ip": "nonsense"},
        {"ip": "192.0.2.2", "ipMode": "Odd"},
        {"ip": "2001:db8::1"},
    ]
    service = checked(ingress)
    assert [address.text for address in service.load_balancer_ips] == ["192.0.2.1", "2001:db8::1"]
    assert list(named(service)) == [
        "status.loadBalancer.ingress[1].ip",
        "status.loadBalancer.ingress[2].ip",
        "status.loadBalancer.ingress[3].ipMode",
    ]


def test_a_service_all_of_whose_cluster_ips_are_bad() -> None:
    service = checked(clusterIP="10.96.0.001")
    assert service.cluster_ips == ()
    assert list(named(service)) == ["spec.clusterIPs[0]"]


def test_bad_entries_of_a_slice() -> None:
    raw = {
        "metadata": {"name": "web-1", "namespace": "ns", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "endpoints": [
            {"addresses": ["10.0.0.1"]},
            {"addresses": []},
            {"addresses": ["fd00::1"]},
            {"addresses": ["169.254.0.1"]},
            {"addresses": ["10.0.0.2", "ignored"]},
        ],
        "ports": [
            {"port": 8080},
            {"name": "a b", "port": 1},
            {"name": "c", "port": 0},
            {"name": "d", "port": 1, "protocol": "X"},
        ],
    }
    slice_ = check_slice(msgspec.convert(raw, EndpointSlice), NAME)
    assert slice_ is not None
    assert [endpoint.address for endpoint in slice_.endpoints] == ["10.0.0.1", "10.0.0.2"]
    assert [port.port for port in slice_.ports] == [8080]
    prefix = "EndpointSlice web-1: "
    assert named(slice_) == {
        f"{prefix}ports[1].name": "'a b' is not a DNS label",
        f"{prefix}ports[2].port": "0 is not in 1-65535",
        f"{prefix}ports[3].protocol": "'X' is not TCP, UDP or SCTP",
        f"{prefix}endpoints[1].addresses": "is empty",
        f"{prefix}endpoints[2].addresses": "'fd00::1' is not a canonical IPv4 address",
        f"{prefix}endpoints[3].addresses": "169.254.0.1 is unspecified, loopback, link-local or multicast",
    }


def test_a_flood_of_problems_is_cut_short() -> None:
    service = checked(externalIPs=["rubbish"] * 1000)
    assert len(service.problems) == MAX_PROBLEMS + 1
    assert service.problems[-1].reason == "980 more problems"


def test_what_is_quoted_is_printable_and_short() -> None:
    (problem,) = checked(externalIPs=["\x1b[31m\u202e" + "x" * 10000]).problems
    assert str(problem).isascii()
    assert str(problem).isprintable()
    assert len(str(problem)) < 200
