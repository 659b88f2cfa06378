"""Mutated objects: whatever is in them, only clean text gets into the table, nothing raises, and others go on working."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from world import HERE, World, ready, service, slice_of, strings_in

from nodeproxy.api.objects import EndpointSlice, Node, Service
from nodeproxy.cluster.names import Family
from nodeproxy.cluster.state import ClusterState
from nodeproxy.forwarding.node import NodeFacts
from nodeproxy.forwarding.tracker import ForwardingTracker
from nodeproxy.source.events import Upserted

UNREADABLE = (msgspec.ValidationError, UnicodeEncodeError)  # a wrong type, or a lone surrogate: the source refuses it
CLEAN = re.compile(r"[a-z0-9.:/-]*", re.ASCII)
NASTY = [
    '"',
    "'",
    "\n",
    "\r",
    " ",
    "\t",
    "\0",
    "\\",
    "#",
    ";",
    "-j ACCEPT",
    "\x1b",
    "\u202e",
    "\u0661",
    "\ud800",
    "%eth0",
    "%",
    "$(x)",
]

VICTIM: dict[str, Any] = {
    "metadata": {"name": "victim", "namespace": "ns", "creationTimestamp": "2020-01-01T00:00:00Z"},
    "spec": {
        "type": "LoadBalancer",
        "clusterIP": "10.96.0.9",
        "clusterIPs": ["10.96.0.9", "fd00::9"],
        "ports": [
            {"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080},
            {"name": "dns", "port": 53, "protocol": "UDP", "nodePort": 30053},
        ],
        "externalIPs": ["198.51.100.9", "2001:db8::9"],
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
        "loadBalancerSourceRanges": ["203.0.113.0/24", "2001:db8:1::/48"],
        "externalTrafficPolicy": "Local",
        "internalTrafficPolicy": "Cluster",
        "healthCheckNodePort": 31000,
    },
    "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.9", "ipMode": "VIP"}]}},
}
SLICE: dict[str, Any] = {
    "metadata": {"name": "victim-1", "namespace": "ns", "labels": {"kubernetes.io/service-name": "victim"}},
    "addressType": "IPv4",
    "endpoints": [
        {"addresses": ["10.0.0.9"], "nodeName": HERE, "hints": {"forZones": [{"name": "z"}], "forNodes": [{"name": HERE}]}},
        {"addresses": ["10.0.0.10"], "conditions": {"ready": False, "serving": True, "terminating": True}},
    ],
    "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "dns", "port": 5353, "protocol": "UDP"}],
}
NODE: dict[str, Any] = {
    "metadata": {"name": HERE, "labels": {"topology.kubernetes.io/zone": "z"}},
    "status": {"addresses": [{"type": "InternalIP", "address": "203.0.113.5"}]},
}
BYSTANDER = [service("bystander", created="2019-01-01T00:00:00Z"), slice_of("bystander", ready("10.0.0.1"))]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all scalars."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path


OBJECTS = [VICTIM, SLICE, NODE]
PATHS = [(which, path) for which, raw in enumerate(OBJECTS) for path in leaves(raw)]

nasty_insertions = st.tuples(st.sampled_from(NASTY), st.integers(0, 20))
other_values = st.sampled_from([None, "", "x" * 300, 0, -1, 65536, 10**20, True, [], {}, 1.5]) | st.text(max_size=8)
mutations = st.lists(st.tuples(st.sampled_from(PATHS), nasty_insertions, st.none() | other_values), min_size=1, max_size=4)


def mutated(changes: list[Any]) -> list[Any]:
    """The three objects with some scalars spoilt: something inserted into a text, or another value altogether."""
    raws = copy.deepcopy(OBJECTS)
    for (which, path), (insertion, at), replacement in changes:
        parent = raws[which]
        for step in path[:-1]:
            parent = parent[step]
        old = parent[path[-1]]
        spoilt = old[:at] + insertion + old[at:] if isinstance(old, str) else insertion
        parent[path[-1]] = spoilt if replacement is None else replacement
    return raws


def follow(objects: list[Any]) -> tuple[ForwardingTracker, list[str]]:
    """A tracker that has seen these objects; and everything that would be logged."""
    state, tracker = ClusterState(HERE), ForwardingTracker(NodeFacts(HERE))
    changes = state.apply([Upserted(obj) for obj in objects])
    tracker.update(state, changes)
    reasons = [refused.reason for refused in changes.refused]
    return tracker, reasons + [str(problem) for problems in tracker.problems.values() for problem in problems]


@settings(max_examples=400, deadline=None)
@given(mutations)
def test_nothing_dirty_gets_into_the_table(changes: list[Any]) -> None:
    objects: list[Any] = list(BYSTANDER)
    for raw, kind in zip(mutated(changes), (Service, EndpointSlice, Node), strict=True):
        try:
            objects.append(msgspec.convert(raw, kind))
        except UNREADABLE:
            continue
    tracker, logged = follow(objects)
    dirty = [text for text in strings_in(tracker.table.rows) if not CLEAN.fullmatch(text)]
    dirty += [text for text in strings_in(tracker.table.health_checks) if not CLEAN.fullmatch(text)]
    assert not dirty
    assert all(line.isascii() and line.isprintable() for line in logged)
    alive = [row for row in tracker.table.rows.values() if row.key.name.name == "bystander"]
    assert [[backend.address for backend in row.cluster_backends] for row in alive] == [["10.0.0.1"]]


def test_the_objects_are_good_before_they_are_spoilt() -> None:
    tracker, logged = follow(
        [msgspec.convert(VICTIM, Service), msgspec.convert(SLICE, EndpointSlice), msgspec.convert(NODE, Node)]
    )
    assert not logged
    assert len(tracker.table.rows) == 4
    assert any(row.cluster_backends and row.local_backends for row in tracker.table.rows.values())
    found = set(strings_in(tracker.table.rows))
    assert {"victim", "ns", "http", "192.0.2.9", "192.0.2.9/32", "203.0.113.0/24", "10.0.0.9"} <= found


def test_a_nasty_character_anywhere_in_a_name_or_address() -> None:
    """Every text field with every nasty character in the middle, one at a time."""
    for which, path in PATHS:
        for insertion in NASTY:
            raws = mutated([((which, path), (insertion, 3), None)])
            try:
                objects = [
                    msgspec.convert(raw, kind) for raw, kind in zip(raws, (Service, EndpointSlice, Node), strict=True)
                ]
            except UNREADABLE:
                continue
            tracker, _ = follow(objects)
            assert all(CLEAN.fullmatch(text) for text in strings_in(tracker.table.rows))


def test_a_thousand_ports() -> None:
    ports = [{"name": f"p{i}", "port": 1000 + i, "nodePort": 30000 + i} for i in range(1000)]
    world = World(
        service(ports=ports, type="NodePort", clusterIPs=["10.96.0.1", "fd00::1"]),
        slice_of("web", ready("10.0.0.1"), ports=ports),
    )
    assert len(world.rows) == 2000
    assert sum(len(row.cluster_backends) for row in world.rows if row.key.family is Family.IPV4) == 1000
    assert not world.apply(service(ports=ports, type="NodePort", clusterIPs=["10.96.0.1", "fd00::1"]))
