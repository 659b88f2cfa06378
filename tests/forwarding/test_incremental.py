"""Properties of change tracking: increments lead where a fresh start leads, deltas are exact and minimal, and they merge."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import batches, endpoints
from world import HERE, World, node, ready, service, slice_of

from nodeproxy.api.objects import EndpointSlice, Kind, Node, ObjectKey, Service
from nodeproxy.cluster.state import ClusterChanges, ClusterState
from nodeproxy.forwarding.endpoints import PortMatch, choose, explain, group_by_port, merge_endpoints
from nodeproxy.forwarding.node import NodeFacts
from nodeproxy.forwarding.table import (
    Action,
    BackendSet,
    Delta,
    Family,
    ForwardingTable,
    Frontend,
    FrontendKind,
    HealthCheck,
    IPProtocol,
    Problem,
    RowChange,
    ServiceName,
    ServicePort,
    ServicePortKey,
    merge_deltas,
)
from nodeproxy.forwarding.tracker import ForwardingTracker
from nodeproxy.source.events import Deleted, Event, Upserted

FACTS = NodeFacts(HERE, addresses=("192.168.0.2",))


class Replica:
    """What somebody has who applies the deltas and nothing else."""

    def __init__(self) -> None:
        self.rows: dict[ServicePortKey, ServicePort] = {}
        self.health_checks: dict[ServiceName, HealthCheck] = {}

    def apply(self, delta: Delta) -> None:
        for key, change in delta.rows.items():
            assert change.before != change.after
            assert self.rows.get(key) == change.before
            if change.after is None:
                del self.rows[key]
            else:
                assert change.after.key == key
                self.rows[key] = change.after
        for name, check in delta.health_checks.items():
            if check is None:
                del self.health_checks[name]
            else:
                self.health_checks[name] = check


class Run:
    """A tracker that is fed events, beside one started afresh after each batch."""

    def __init__(self) -> None:
        self.state = ClusterState(HERE)
        self.tracker = ForwardingTracker(FACTS)
        self.objects: dict[ObjectKey, Upserted] = {}

    def step(self, batch: Sequence[Event]) -> Delta:
        for event in batch:
            if isinstance(event, Deleted):
                self.objects.pop(event.key, None)
            elif isinstance(event, Upserted) and self.trusted(event.object):
                self.objects[event.object.key] = event
        return self.tracker.update(self.state, self.state.apply(batch))

    def trusted(self, obj: Service | EndpointSlice | Node) -> bool:
        """A refused object leaves in force what was known of it before."""
        labels = obj.metadata.labels
        return labels is None or labels.service_name != "Bad Name"

    def fresh(self) -> ForwardingTracker:
        state, tracker = ClusterState(HERE), ForwardingTracker(FACTS)
        for event in reversed(list(self.objects.values())):
            state.apply([event])
        tracker.update(state, ClusterChanges(services=frozenset(state.services)))
        return tracker


def all_problems(tracker: ForwardingTracker) -> set[Problem]:
    return {problem for problems in tracker.problems.values() for problem in problems}


@settings(max_examples=200, deadline=None)
@given(batches)
def test_any_history_leads_where_a_fresh_start_leads(history: list[list[Event]]) -> None:
    run, replica, deltas = Run(), Replica(), []
    for batch in history:
        before = all_problems(run.tracker)
        delta = run.step(batch)
        replica.apply(delta)
        assert (replica.rows, replica.health_checks) == (run.tracker.table.rows, run.tracker.table.health_checks)
        assert set(delta.problems) == all_problems(run.tracker) - before
        deltas.append(delta)
    fresh = run.fresh()
    assert run.tracker.table == fresh.table
    assert run.tracker.problems == fresh.problems
    assert_merged(functools.reduce(merge_deltas, deltas), fresh.table)
    assert_well_formed(fresh.table)


def assert_merged(whole: Delta, table: ForwardingTable) -> None:
    """The deltas of a history that began with nothing, as one: it makes the table out of nothing."""
    assert all(change.before is None for change in whole.rows.values())
    assert {key: change.after for key, change in whole.rows.items()} == table.rows
    assert {name: check for name, check in whole.health_checks.items() if check} == table.health_checks


def assert_well_formed(table: ForwardingTable) -> None:
    """What the vocabulary promises to those who read a table."""
    places = set()
    for key, row in table.rows.items():
        assert row.key == key
        assert row.frontends
        for backends in row.cluster_backends, row.local_backends:
            assert list(backends) == sorted(set(backends))
            assert len({(b.address, b.port) for b in backends}) == len(backends)
        assert all(backend.local for backend in row.local_backends)
        for frontend in row.frontends:
            place = (key.family, frontend.address, key.protocol, frontend.port)
            assert place not in places
            places.add(place)
            assert_makes_sense(row, frontend)


def assert_makes_sense(row: ServicePort, frontend: Frontend) -> None:
    """A frontend's action, set and short-cuts fit together."""
    if frontend.action is Action.FORWARD:
        assert row.backends(frontend.backend_set)
    elif frontend.action is Action.DROP:
        assert frontend.backend_set is BackendSet.LOCAL
        assert not row.local_backends
    else:
        assert not row.all_backends
    assert not frontend.short_cuts or row.cluster_backends
    assert frontend.allowed_sources is None or frontend.kind is FrontendKind.LOAD_BALANCER_IP


def test_a_row_that_changed_and_changed_back_disappears() -> None:
    world = World(service(), slice_of("web", ready("10.0.0.1")))
    first = world.apply(slice_of("web", ready("10.0.0.2")), service("b", clusterIP="10.96.0.2"))
    second = world.apply(slice_of("web", ready("10.0.0.1")))
    merged = merge_deltas(first, second)
    assert [key.name.name for key in merged.rows] == ["b"]
    assert not merge_deltas(world.apply(slice_of("web")), world.apply(slice_of("web", ready("10.0.0.1"))))


def test_a_row_that_changed_twice_keeps_both_ends() -> None:
    world = World(service(), slice_of("web", ready("10.0.0.1")))
    start = world.row
    merged = merge_deltas(world.apply(slice_of("web")), world.apply(slice_of("web", ready("10.0.0.3"))))
    assert dict(merged.rows) == {start.key: RowChange(start, world.row)}


def test_an_event_that_changes_nothing_makes_no_delta() -> None:
    world = World(node("a", "192.168.0.2"), service(), slice_of("web", ready("10.0.0.1")))
    assert not world.apply(node("a", "192.168.0.2"), service(), slice_of("web", ready("10.0.0.1")))
    assert not world.apply(node("b", "192.168.0.3"))  # a node change that no row depends on
    assert not world.feed(Deleted(ObjectKey(Kind.SERVICE, "ns", "unknown")))


def test_the_node_changes_what_depends_on_it() -> None:
    world = World(node("a"), service(), slice_of("web", ready("10.0.0.1", zones=["a"]), ready("10.0.0.2", zones=["b"])))
    assert [b.address for b in world.row.cluster_backends] == ["10.0.0.1"]
    world.apply(node("b"))
    assert [b.address for b in world.row.cluster_backends] == ["10.0.0.2"]
    world.delete(Kind.NODE, HERE)
    assert len(world.row.cluster_backends) == 2


def test_other_facts_take_effect_with_the_next_update() -> None:
    world = World(service(clusterIPs=["10.96.0.1", "fd00::1"]))
    world.tracker.facts = NodeFacts(HERE, families=(Family.IPV6,))
    delta = world.feed()
    assert [(key.family, change.after) for key, change in delta.rows.items()] == [(Family.IPV4, None)]
    world.tracker.facts = FACTS
    assert [key.family for key in world.feed().rows] == [Family.IPV4]


def usable(entry: Any) -> int:
    """2 for ready, 1 for draining, 0 for neither, by the words of SPEC section 2."""
    conditions = entry["conditions"] or {}
    is_ready = True if conditions.get("ready") is None else conditions["ready"]
    serving = is_ready if conditions.get("serving") is None else conditions["serving"]
    terminating = bool(conditions.get("terminating"))
    return 2 if is_ready else 1 if serving and terminating else 0


def by_the_book(entries: list[Any], zone: str | None) -> tuple[set[str], set[str]]:
    """SPEC section 2 as it is written, for endpoints with different addresses."""
    here = {e["addresses"][0] for e in entries if e["nodeName"] == HERE}
    ready_ones = [e for e in entries if usable(e) == 2]
    draining_ones = {e["addresses"][0] for e in entries if usable(e) == 1}
    nodes = [{h["name"] for h in (e["hints"] or {}).get("forNodes", [])} for e in ready_ones]
    zones = [{h["name"] for h in (e["hints"] or {}).get("forZones", [])} for e in ready_ones]
    everybody = {e["addresses"][0] for e in ready_ones}
    cluster = everybody
    if all(nodes) and HERE in set().union(*nodes):
        cluster = {e["addresses"][0] for e, hints in zip(ready_ones, nodes, strict=True) if HERE in hints}
    elif zone and all(zones) and zone in set().union(*zones):
        cluster = {e["addresses"][0] for e, hints in zip(ready_ones, zones, strict=True) if zone in hints}
    return cluster or draining_ones, everybody & here or draining_ones & here


@settings(max_examples=300, deadline=None)
@given(st.lists(endpoints, max_size=5), st.sampled_from(["zone-a", "zone-b", None]))
def test_endpoint_choice_is_by_the_book(entries: list[Any], zone: str | None) -> None:
    for last, entry in enumerate(entries, 1):
        entry["addresses"] = [f"10.0.0.{last}"]
    world = World(node(zone), service(), slice_of("web", *entries))
    facts = world.tracker.facts_in_force
    groups = group_by_port(world.state.slices(ServiceName("ns", "web")))
    candidates = merge_endpoints(groups[PortMatch(Family.IPV4, "http", IPProtocol.TCP)], HERE)
    choice = choose(candidates, facts)
    assert ({b.address for b in choice.cluster}, {b.address for b in choice.local}) == by_the_book(entries, zone)
    for which, chosen in (BackendSet.CLUSTER, choice.cluster), (BackendSet.LOCAL, choice.local):
        for candidate in candidates:
            reason = explain(candidate, which, choice, facts)
            assert (reason.name == "CHOSEN") == (candidate.backend in chosen)
