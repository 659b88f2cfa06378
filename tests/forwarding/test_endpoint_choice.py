"""SPEC section 2, line by line: which endpoints are in the Cluster set and in the Local set, and why."""

from __future__ import annotations

from typing import Any

import pytest
from world import HERE, HTTP, WEB, World, addresses, dead, draining, endpoint, node, ready, service, slice_of

from nodeproxy.forwarding.endpoints import PortMatch, Reason, choose, explain, group_by_port, merge_endpoints
from nodeproxy.forwarding.table import BackendSet, Family, IPProtocol

LOCAL = {"internalTrafficPolicy": "Local"}


def cluster_set(*endpoints: Any, zone: str | None = None) -> list[str]:
    return addresses(World(node(zone), service(), slice_of("web", *endpoints)).row.cluster_backends)


def local_set(*endpoints: Any, zone: str | None = None) -> list[str]:
    return addresses(World(node(zone), service(**LOCAL), slice_of("web", *endpoints)).row.local_backends)


@pytest.mark.parametrize(
    ("conditions", "usable"),
    [
        ({}, True),  # ready null means true
        ({"ready": True}, True),
        ({"ready": True, "terminating": True}, True),  # publishNotReadyAddresses
        ({"ready": False}, False),  # serving null means as ready
        ({"ready": False, "terminating": True}, False),
        ({"ready": False, "serving": True}, False),  # terminating null means false
        ({"ready": False, "serving": True, "terminating": True}, True),
        ({"ready": False, "serving": False, "terminating": True}, False),
    ],
)
def test_conditions_that_are_null(conditions: dict[str, bool], usable: bool) -> None:
    assert cluster_set(endpoint("10.0.0.1", **conditions)) == (["10.0.0.1"] if usable else [])


def test_cluster_set_is_all_ready_endpoints_of_all_nodes() -> None:
    assert cluster_set(ready("10.0.0.1", HERE), ready("10.0.0.2"), ready("10.0.0.3", None)) == [
        "10.0.0.1",
        "10.0.0.2",
        "10.0.0.3",
    ]


def test_draining_endpoints_are_used_only_where_nothing_is_ready() -> None:
    assert cluster_set(ready("10.0.0.1"), draining("10.0.0.2")) == ["10.0.0.1"]
    assert cluster_set(dead("10.0.0.1"), draining("10.0.0.2"), draining("10.0.0.3")) == ["10.0.0.2", "10.0.0.3"]


def test_local_set_is_the_ready_ones_of_this_node_else_the_draining_ones() -> None:
    assert local_set(ready("10.0.0.1", HERE), draining("10.0.0.2", HERE), ready("10.0.0.3")) == ["10.0.0.1"]
    assert local_set(draining("10.0.0.2", HERE), ready("10.0.0.3")) == ["10.0.0.2"]
    assert local_set(dead("10.0.0.2", HERE), ready("10.0.0.3"), draining("10.0.0.4")) == []


def test_an_endpoint_without_a_node_is_local_nowhere() -> None:
    assert local_set(ready("10.0.0.1", None), ready("10.0.0.2", "")) == []


class TestHints:
    """Topology mode, from the ready endpoints only."""

    def test_same_zone_where_all_have_zone_hints_and_one_is_for_ours(self) -> None:
        a, b = ready("10.0.0.1", zones=["a"]), ready("10.0.0.2", zones=["b", "c"])
        assert cluster_set(a, b, zone="a") == ["10.0.0.1"]
        assert cluster_set(a, b, zone="c") == ["10.0.0.2"]

    def test_none_where_no_hint_is_for_our_zone(self) -> None:
        both = ready("10.0.0.1", zones=["a"]), ready("10.0.0.2", zones=["b"])
        assert cluster_set(*both, zone="z") == ["10.0.0.1", "10.0.0.2"]

    def test_none_where_one_endpoint_has_no_hint(self) -> None:
        assert cluster_set(ready("10.0.0.1", zones=["a"]), ready("10.0.0.2"), zone="b") == ["10.0.0.1", "10.0.0.2"]
        assert cluster_set(ready("10.0.0.1", zones=["a"]), ready("10.0.0.2"), zone="a") == ["10.0.0.1", "10.0.0.2"]

    def test_none_on_a_node_without_a_zone_whatever_the_hints(self) -> None:
        assert cluster_set(ready("10.0.0.1", zones=[""]), ready("10.0.0.2", zones=["b"])) == ["10.0.0.1", "10.0.0.2"]

    def test_same_node_comes_before_same_zone(self) -> None:
        mine = ready("10.0.0.1", nodes=[HERE], zones=["b"])
        other = ready("10.0.0.2", nodes=["other"], zones=["a"])
        assert cluster_set(mine, other, zone="a") == ["10.0.0.1"]

    def test_same_zone_where_node_hints_are_for_others_or_missing(self) -> None:
        a = ready("10.0.0.1", nodes=["other"], zones=["a"])
        b = ready("10.0.0.2", nodes=["other"], zones=["b"])
        assert cluster_set(a, b, zone="a") == ["10.0.0.1"]
        assert cluster_set(a, ready("10.0.0.2", zones=["b"]), zone="b") == ["10.0.0.2"]

    def test_only_ready_endpoints_are_asked(self) -> None:
        assert cluster_set(ready("10.0.0.1", zones=["a"]), draining("10.0.0.2"), zone="a") == ["10.0.0.1"]
        assert cluster_set(ready("10.0.0.1", zones=["b"]), draining("10.0.0.2", zones=["a"]), zone="a") == ["10.0.0.1"]

    def test_draining_endpoints_are_not_filtered(self) -> None:
        assert cluster_set(draining("10.0.0.1", zones=["a"]), draining("10.0.0.2", zones=["b"]), zone="a") == [
            "10.0.0.1",
            "10.0.0.2",
        ]

    def test_the_local_set_knows_no_hints(self) -> None:
        assert local_set(ready("10.0.0.1", HERE, zones=["b"]), ready("10.0.0.2", zones=["a"]), zone="a") == ["10.0.0.1"]


class TestMerging:
    """EndpointSlices of one Service."""

    def test_slices_of_a_service_add_up_and_others_do_not(self) -> None:
        world = World(
            service(),
            slice_of("web", ready("10.0.0.2"), name="web-b"),
            slice_of("web", ready("10.0.0.1"), name="web-a"),
            slice_of("other", ready("10.0.0.3")),
        )
        assert addresses(world.row.cluster_backends) == ["10.0.0.1", "10.0.0.2"]

    @pytest.mark.parametrize("winner_first", [True, False])
    @pytest.mark.parametrize("loser", [draining, dead])
    def test_of_two_entries_the_ready_one_holds(self, loser: Any, winner_first: bool) -> None:
        names = ("web-a", "web-b") if winner_first else ("web-b", "web-a")
        world = World(
            service(),
            slice_of("web", ready("10.0.0.1"), name=names[0]),
            slice_of("web", loser("10.0.0.1"), draining("10.0.0.2"), name=names[1]),
        )
        assert addresses(world.row.cluster_backends) == ["10.0.0.1"]

    def test_of_two_entries_the_serving_one_holds(self) -> None:
        world = World(
            service(),
            slice_of("web", dead("10.0.0.1"), name="web-a"),
            slice_of("web", draining("10.0.0.1"), name="web-b"),
        )
        assert addresses(world.row.cluster_backends) == ["10.0.0.1"]

    def test_an_entry_that_does_not_terminate_holds_against_one_that_does(self) -> None:
        """The address has a new pod, which is not ready yet; as in kube-proxy."""
        new = endpoint("10.0.0.1", ready=False, serving=False, terminating=False)
        assert cluster_set(draining("10.0.0.1"), new, draining("10.0.0.2")) == ["10.0.0.2"]
        assert cluster_set(new, draining("10.0.0.1"), draining("10.0.0.2")) == ["10.0.0.2"]

    def test_of_two_equal_entries_the_local_one_holds(self) -> None:
        world = World(
            service(**LOCAL),
            slice_of("web", ready("10.0.0.1"), name="web-a"),
            slice_of("web", ready("10.0.0.1", HERE), name="web-b"),
        )
        assert addresses(world.row.local_backends) == ["10.0.0.1"]

    @pytest.mark.parametrize("names", [("web-a", "web-b"), ("web-b", "web-a")])
    def test_of_two_that_are_equal_otherwise_the_first_slice_by_name_holds(self, names: tuple[str, str]) -> None:
        """Whatever the order in which they came: here it shows by the hints."""
        by_name = {"web-a": ready("10.0.0.1", zones=["a"]), "web-b": ready("10.0.0.1", zones=["b"])}
        slices = [
            slice_of("web", by_name[name], ready(f"10.0.1.{last}", zones=["a"]), name=name)
            for last, name in enumerate(names)
        ]
        world = World(node("b"), service(), *slices)
        assert len(world.row.cluster_backends) == 3  # web-b's hint for our zone does not count, so no hint does
        world.apply(node("a"))
        assert len(world.row.cluster_backends) == 3  # all of them are for this zone now

    def test_within_a_slice_too(self) -> None:
        assert cluster_set(dead("10.0.0.1"), ready("10.0.0.1"), dead("10.0.0.1")) == ["10.0.0.1"]

    def test_one_address_with_two_ports_is_two_endpoints(self) -> None:
        ports = [{"name": "http", "port": 8081, "protocol": "TCP"}]
        world = World(
            service(),
            slice_of("web", ready("10.0.0.1"), name="a"),
            slice_of("web", ready("10.0.0.1"), name="b", ports=ports),
        )
        assert [(b.address, b.port) for b in world.row.cluster_backends] == [("10.0.0.1", 8080), ("10.0.0.1", 8081)]

    def test_an_endpoint_that_moves_between_slices_is_never_missing(self) -> None:
        world = World(service(), slice_of("web", ready("10.0.0.1"), name="a"))
        assert not world.apply(slice_of("web", ready("10.0.0.1"), name="b"))
        assert not world.apply(slice_of("web", name="a"))

    def test_fqdn_slices_are_ignored(self) -> None:
        fqdn = slice_of("web", {"addresses": ["a.example"]})
        world = World(service(), type(fqdn)(fqdn.metadata, "FQDN", fqdn.endpoints, fqdn.ports))
        assert world.row.cluster_backends == ()
        assert not world.problems


class TestPorts:
    """A port is matched by name and protocol."""

    def test_by_name_not_by_number(self) -> None:
        ports = [{"name": "other", "port": 80, "protocol": "TCP"}, {"name": "http", "port": 9376, "protocol": "TCP"}]
        row = World(service(), slice_of("web", ready("10.0.0.1"), ports=ports)).row
        assert [b.port for b in row.cluster_backends] == [9376]

    def test_the_protocol_has_to_agree(self) -> None:
        udp = [{"name": "http", "port": 8080, "protocol": "UDP"}]
        assert World(service(), slice_of("web", ready("10.0.0.1"), ports=udp)).row.cluster_backends == ()

    def test_a_port_without_a_name_and_one_without_a_protocol(self) -> None:
        world = World(
            service(ports=[{"port": 80}]),
            slice_of("web", ready("10.0.0.1"), ports=[{"port": 1234}]),
            slice_of("web", ready("10.0.0.2"), name="b", ports=[{"name": "", "port": 4321, "protocol": "TCP"}]),
        )
        assert [b.port for b in world.row.cluster_backends] == [1234, 4321]
        assert world.row.key.protocol is IPProtocol.TCP

    def test_a_null_port_is_not_usable(self) -> None:
        world = World(
            service(), slice_of("web", ready("10.0.0.1"), ports=[{"name": "http", "port": None, "protocol": "TCP"}])
        )
        assert world.row.cluster_backends == ()
        assert not world.problems

    def test_slices_may_differ_in_port_numbers(self) -> None:
        """Named target ports: old and new pods may listen on different numbers."""
        new = [{"name": "http", "port": 9090, "protocol": "TCP"}]
        world = World(service(), slice_of("web", ready("10.0.0.1")), slice_of("web", ready("10.0.0.2"), name="b", ports=new))
        assert [(b.address, b.port) for b in world.row.cluster_backends] == [("10.0.0.1", 8080), ("10.0.0.2", 9090)]

    def test_the_same_name_in_two_protocols_is_two_rows(self) -> None:
        dns = [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns", "port": 53, "protocol": "TCP"}]
        world = World(service(ports=dns), slice_of("web", ready("10.0.0.1"), ports=dns[:1]))
        assert {row.key.protocol.value: len(row.cluster_backends) for row in world.rows} == {"udp": 1, "tcp": 0}


def test_the_family_of_a_slice_picks_the_family_of_the_row() -> None:
    world = World(
        service(clusterIPs=["10.96.0.1", "fd00::1"]),
        slice_of("web", ready("10.0.0.1")),
        slice_of("web", ready("fd01::1"), family=6),
    )
    assert {row.key.family: addresses(row.cluster_backends) for row in world.rows} == {
        Family.IPV4: ["10.0.0.1"],
        Family.IPV6: ["fd01::1"],
    }


def test_every_endpoint_has_its_reason() -> None:
    world = World(
        node("a"),
        service(ports=[HTTP]),
        slice_of(
            "web",
            ready("10.0.0.1", HERE, zones=["a"]),
            ready("10.0.0.2", zones=["a"]),
            ready("10.0.0.3", HERE, zones=["b"]),
            draining("10.0.0.4", HERE),
            dead("10.0.0.5", HERE),
        ),
    )
    facts = world.tracker.facts_in_force
    sources = group_by_port(world.state.slices(WEB))[PortMatch(Family.IPV4, "http", IPProtocol.TCP)]
    candidates = merge_endpoints(sources, facts.name)
    choice = choose(candidates, facts)
    reasons = {c.backend.address: [explain(c, which, choice, facts) for which in BackendSet] for c in candidates}
    assert reasons == {
        "10.0.0.1": [Reason.CHOSEN, Reason.CHOSEN],
        "10.0.0.2": [Reason.CHOSEN, Reason.REMOTE],
        "10.0.0.3": [Reason.OTHER_ZONE, Reason.CHOSEN],
        "10.0.0.4": [Reason.DRAINING, Reason.DRAINING],
        "10.0.0.5": [Reason.NOT_READY, Reason.NOT_READY],
    }
