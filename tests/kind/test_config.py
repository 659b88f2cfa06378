"""What a cluster is asked to be: kind's configuration, CNI configuration, routes, and the key that tells clusters apart."""

from __future__ import annotations

import ipaddress
import json

import pytest
import yaml

from hack.kind.config import IP_FAMILIES, Shape, cni_config, routes

PODS = {"a": ["10.244.0.0/24", "fd00:10:f4::/64"], "b": ["10.244.1.0/24", "fd00:10:f4:1::/64"], "c": ["10.244.2.0/24"]}


def test_kind_gets_nodes_no_cni_and_the_proxy_that_was_asked_for() -> None:
    asked = yaml.safe_load(Shape(workers=2, kube_proxy="none").kind_config())
    assert [node["role"] for node in asked["nodes"]] == ["control-plane", "worker", "worker"]
    assert asked["networking"]["disableDefaultCNI"] is True
    assert asked["networking"]["kubeProxyMode"] == "none"
    assert asked["networking"]["ipFamily"] == "ipv4"
    assert yaml.safe_load(Shape(kube_proxy="nftables").kind_config())["networking"]["kubeProxyMode"] == "nftables"


def test_kubelet_is_allowed_on_cgroup_v1() -> None:
    patches = map(yaml.safe_load, yaml.safe_load(Shape().kind_config())["kubeadmConfigPatches"])
    (kubelet,) = [patch for patch in patches if patch["kind"] == "KubeletConfiguration"]
    assert kubelet["failCgroupV1"] is False


@pytest.mark.parametrize("family", IP_FAMILIES)
def test_subnets_are_of_the_family_and_apart(family: str) -> None:
    shape = Shape(ip_family=family)
    networks = [ipaddress.ip_network(subnet) for subnet in (*shape.pod_subnets, *shape.service_subnets)]
    assert {network.version for network in networks} == ({4, 6} if family == "dual" else {4})
    for one in networks:
        assert not any(one is not other and one.version == other.version and one.overlaps(other) for other in networks)  # type: ignore[arg-type]


def test_clusters_of_other_names_have_other_pod_subnets() -> None:
    names = ("nodeproxy-e2e", "nodeproxy-e2e-second", "nodeproxy-e2e-peer", "nodeproxy-conformance")
    assert len({Shape(name).pod_subnets for name in names}) == len(names)


def test_the_key_changes_with_all_that_makes_the_cluster() -> None:
    key = Shape().key("sha256:1", "network")
    assert key == Shape().key("sha256:1", "network")
    others = [
        Shape().key("sha256:2", "network"),
        Shape().key("sha256:1", "other network"),
        Shape(workers=1).key("sha256:1", "network"),
        Shape(ip_family="dual").key("sha256:1", "network"),
        Shape(kube_proxy="iptables").key("sha256:1", "network"),
    ]
    assert len({key, *others}) == 1 + len(others)


def test_pods_reach_themselves_and_are_not_masqueraded() -> None:
    bridge = json.loads(cni_config(PODS["a"]))["plugins"][0]
    assert bridge["hairpinMode"] is True
    assert bridge["isGateway"] is True
    assert bridge["ipMasq"] is False
    assert bridge["ipam"]["ranges"] == [[{"subnet": "10.244.0.0/24"}], [{"subnet": "fd00:10:f4::/64"}]]
    assert [route["dst"] for route in bridge["ipam"]["routes"]] == ["0.0.0.0/0", "::/0"]


def test_a_node_has_routes_to_the_others_pods_only() -> None:
    assert routes("a", PODS) == "b 10.244.1.0/24\nb fd00:10:f4:1::/64\nc 10.244.2.0/24\n"
    assert routes("c", {"c": PODS["c"]}) == ""
