"""Where the throw-away node's pods and clients are."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest
from msgspec.structs import replace
from states import CONFIG, endpoints, every_sort, port, service, snapshot

from nodeproxy.compare.places import PlacesError, find_places, source_within, with_node_addresses
from nodeproxy.forwarding.table import Family
from nodeproxy.programmer.base import DetectLocalMode
from nodeproxy.snapshot.view import NodeView


def test_places_are_free_and_pods_are_where_detect_local_finds_them(tmp_path: Path) -> None:
    view = NodeView(snapshot(every_sort(), tmp_path))
    places = find_places(view)
    assert set(places) == {Family.IPV4, Family.IPV6}
    four = places[Family.IPV4]
    assert four.node == "192.168.0.2"
    assert len({four.pod, *four.changing}) == 3
    for pod in (four.pod, *four.changing):
        assert ipaddress.ip_address(pod) in ipaddress.ip_network("10.0.0.0/8")
        assert view.packet(pod, "10.96.0.10", 80).from_local_pod
    assert not view.packet(four.outside, "10.96.0.10", 80).from_local_pod
    assert len({four.client(number) for number in range(250)}) == 250


def test_addresses_of_the_snapshot_are_avoided(tmp_path: Path) -> None:
    objects = [service("web", "198.19.0.1", port(80)), endpoints("web", 8080, "198.18.0.1", "10.255.255.254")]
    places = find_places(NodeView(with_node_addresses(*_with_view(objects, tmp_path))[0]))[Family.IPV4]
    assert places.clients == "203.0.113.0/24"
    assert places.pod == "10.255.255.253"


def _with_view(objects: list[dict[str, object]], directory: Path):  # type: ignore[no-untyped-def]
    taken = replace(snapshot(objects, directory), node_addresses=())
    return taken, NodeView(taken)


def test_an_address_of_the_node_is_made_up_where_none_is_known_and_said(tmp_path: Path) -> None:
    objects = [service("web", "10.96.0.1", port(80)), endpoints("web", 8080, "10.2.0.1")]
    changed, words = with_node_addresses(*_with_view(objects, tmp_path))
    assert changed.node_addresses == ("192.0.2.2",)
    assert "192.0.2.2" in words[0]
    assert find_places(NodeView(changed))[Family.IPV4].node == "192.0.2.2"


def test_the_sandboxes_own_links_are_refused(tmp_path: Path) -> None:
    objects = [*every_sort(), service("clash", "10.96.9.9", port(80)), endpoints("clash", 8080, "100.64.0.1")]
    with pytest.raises(PlacesError, match=r"100\.64\.0\.1"):
        find_places(NodeView(snapshot(objects, tmp_path)))


def test_no_room_for_pods_is_said(tmp_path: Path) -> None:
    config = replace(CONFIG, cluster_cidrs=("10.1.0.0/31",), detect_local_mode=DetectLocalMode.CLUSTER_CIDR)
    with pytest.raises(PlacesError, match=r"pods in 10\.1\.0\.0/31"):
        find_places(NodeView(snapshot(every_sort(), tmp_path, config)))


def test_a_source_within_ranges() -> None:
    assert source_within(["203.0.113.0/24"], [], "10.0.0.0/8") == "203.0.113.1"
    assert source_within(["203.0.113.0/24"], ["203.0.113.1"], None) not in (None, "203.0.113.1")
    assert source_within(["192.0.2.7/32"], ["192.0.2.7"], None) is None
    assert source_within(["10.1.0.0/16", "192.0.2.0/30"], [], "10.0.0.0/8") == "192.0.2.1"
    assert source_within(["127.0.0.0/8"], [], None) is None
