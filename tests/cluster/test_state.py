"""ClusterState: which Services a batch of events concerns, and what is left of the objects."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from nodeproxy.api.objects import ApiObject, EndpointSlice, Kind, Node, ObjectKey, Service
from nodeproxy.cluster.checked import Readiness
from nodeproxy.cluster.names import ServiceName
from nodeproxy.cluster.state import ClusterChanges, ClusterState
from nodeproxy.source.events import Deleted, ListComplete, Refused, Upserted

A, B = ServiceName("ns", "a"), ServiceName("ns", "b")
TRIGGER = "endpoints.kubernetes.io/last-change-trigger-time"


def service(name: str = "a", *, metadata: Any = None, **spec: Any) -> Service:
    meta = {"name": name, "namespace": "ns", **(metadata or {})}
    return msgspec.convert({"metadata": meta, "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}], **spec}}, Service)


def slice_(name: str = "a-1", owner: str | None = "a", address: str = "10.0.0.1", **rest: Any) -> EndpointSlice:
    labels = {"kubernetes.io/service-name": owner} if owner is not None else {}
    annotations = {TRIGGER: rest.pop("trigger")} if "trigger" in rest else {}
    metadata = {"name": name, "namespace": "ns", "labels": labels, "annotations": annotations, **rest.pop("metadata", {})}
    body = {"metadata": metadata, "addressType": "IPv4", "endpoints": [{"addresses": [address]}], "ports": [{"port": 8080}]}
    return msgspec.convert({**body, **rest}, EndpointSlice)


def node(name: str = "here", **rest: Any) -> Node:
    return msgspec.convert({"metadata": {"name": name, **rest.pop("metadata", {})}, **rest}, Node)


@pytest.fixture
def state() -> ClusterState:
    return ClusterState("here")


def apply(state: ClusterState, *objects: ApiObject) -> ClusterChanges:
    return state.apply([Upserted(obj) for obj in objects])


def test_what_appears_changes_and_goes(state: ClusterState) -> None:
    assert apply(state, service("a"), service("b")).services == {A, B}
    assert apply(state, slice_()).services == {A}
    assert apply(state, slice_(address="10.0.0.2")).services == {A}
    assert state.apply([Deleted(slice_().key)]).services == {A}
    assert state.apply([Deleted(service("b").key)]).services == {B}
    assert list(state.services) == [A]
    assert not state.slices(A)


@pytest.mark.parametrize(
    "metadata", [{"resourceVersion": "2"}, {"uid": "x"}, {"annotations": {TRIGGER: "2024-01-01T00:00:00Z"}}]
)
def test_what_does_not_matter_concerns_nobody(state: ClusterState, metadata: Any) -> None:
    apply(state, service(), slice_(), node())
    held = state.services[A]
    changes = apply(state, service(metadata=metadata), slice_(metadata=metadata), node(metadata=metadata))
    assert changes == ClusterChanges()
    assert state.services[A] is held


def test_deleting_the_unknown_concerns_nobody(state: ClusterState) -> None:
    events = [Deleted(ObjectKey(kind, "ns", "unknown")) for kind in Kind]
    assert state.apply(events) == ClusterChanges()


def test_a_slice_that_moves_concerns_both_services(state: ClusterState) -> None:
    apply(state, slice_(owner="a"))
    assert apply(state, slice_(owner="b")).services == {A, B}
    assert (len(state.slices(A)), len(state.slices(B))) == (0, 1)
    assert apply(state, slice_(owner=None)).services == {B}
    assert not state.slices(B)


def test_a_slice_may_come_before_its_service(state: ClusterState) -> None:
    assert apply(state, slice_()).services == {A}
    assert len(state.slices(A)) == 1


def test_a_service_that_becomes_headless_is_gone(state: ClusterState) -> None:
    apply(state, service())
    assert apply(state, service(clusterIP="None")).services == {A}
    assert not state.services
    assert apply(state, service(clusterIP="None")).services == frozenset()


def test_only_our_node_counts(state: ClusterState) -> None:
    assert not apply(state, node("other")).node
    assert apply(state, node(metadata={"labels": {"topology.kubernetes.io/zone": "z"}})).node
    assert state.node is not None
    assert state.node.zone == "z"
    assert not state.apply([Deleted(node("other").key)]).node
    assert state.apply([Deleted(node().key)]).node
    assert state.node is None


def test_what_matters_of_a_node(state: ClusterState) -> None:
    addresses = [
        {"type": "InternalIP", "address": "192.168.0.2"},
        {"type": "Hostname", "address": "here"},
        {"type": "ExternalIP", "address": "2001:DB8::2"},
        {"type": "InternalIP", "address": "rubbish"},
    ]
    apply(
        state,
        node(status={"addresses": addresses}, spec={"podCIDRs": ["10.1.0.0/24", "fd01::/64"], "podCIDR": "10.1.0.0/24"}),
    )
    assert state.node is not None
    assert [a.text for a in state.node.addresses] == ["192.168.0.2", "2001:db8::2"]
    assert [c.text for c in state.node.pod_cidrs] == ["10.1.0.0/24", "fd01::/64"]
    assert state.node.eligible
    apply(state, node(spec={"podCIDR": "10.1.0.0/24"}))
    assert [c.text for c in state.node.pod_cidrs] == ["10.1.0.0/24"]


@pytest.mark.parametrize(
    "going",
    [
        {"metadata": {"deletionTimestamp": "2024-01-01T00:00:00Z"}},
        {"spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler"}]}},
    ],
)
def test_a_node_that_goes_is_not_eligible(state: ClusterState, going: Any) -> None:
    apply(state, node(spec={"taints": [{"key": "other"}]}))
    assert state.node is not None
    assert state.node.eligible
    assert apply(state, node(**going)).node
    assert not state.node.eligible


def test_lists_are_complete_when_both_are(state: ClusterState) -> None:
    assert not state.apply([ListComplete(Kind.NODE), ListComplete(Kind.SERVICE)]).lists_complete
    assert state.apply([ListComplete(Kind.ENDPOINT_SLICE)]).lists_complete
    assert state.apply([]).lists_complete


def test_trigger_times_of_the_slices_that_changed(state: ClusterState) -> None:
    changes = apply(
        state,
        slice_("a-1", trigger="t1"),
        slice_("a-2", trigger="t2"),
        slice_("b-1", owner="b"),
        slice_("a-1", trigger="t3"),  # nothing but the annotation
    )
    assert changes.trigger_times == {A: ("t1", "t2")}


def test_a_slice_that_goes_takes_its_trigger_time_along(state: ClusterState) -> None:
    events = [Upserted(slice_(trigger="t1")), Deleted(slice_().key)]
    assert state.apply(events).trigger_times == {}


class TestRefused:
    """A name that cannot be trusted, or an object that could not even be read."""

    @pytest.mark.parametrize("name", ['a"b', "a\nb", "a b", "A", "a_b", "-a", "a-", "a" * 64, "", "a.b", "ä", "a\0"])
    def test_bad_names_of_services(self, state: ClusterState, name: str) -> None:
        for obj in service(name), service(metadata={"namespace": name}) if name else service(name):
            (refused,) = apply(state, obj).refused
            assert refused.key == obj.key
            assert refused.reason.isascii()
            assert refused.reason.isprintable()
        assert not state.services

    @pytest.mark.parametrize(
        "bad", [slice_("a\nb"), slice_(owner='"; DROP'), slice_(metadata={"namespace": "n s"}), slice_("a" * 254)]
    )
    def test_bad_names_of_slices(self, state: ClusterState, bad: EndpointSlice) -> None:
        changes = apply(state, bad, slice_())
        assert [refused.key for refused in changes.refused] == [bad.key]
        assert changes.services == {A}

    def test_what_was_known_before_stays_in_force(self, state: ClusterState) -> None:
        apply(state, slice_())
        assert apply(state, slice_(owner="B A D")).services == frozenset()
        assert len(state.slices(A)) == 1

    def test_the_source_s_refusals_are_handed_on(self, state: ClusterState) -> None:
        refused = Refused(None, "not YAML", "x.yaml")
        assert state.apply([refused]).refused == (refused,)

    def test_our_own_node_by_a_bad_name(self) -> None:
        state = ClusterState("He re")
        changes = apply(state, node("He re"))
        assert len(changes.refused) == 1
        assert state.node is None

    def test_names_at_the_limit_are_good(self, state: ClusterState) -> None:
        changes = apply(state, service("a" * 63), slice_("a." * 126 + "a", owner="0"))
        assert not changes.refused


def test_a_slice_that_is_no_longer_of_an_ip_family_is_gone(state: ClusterState) -> None:
    apply(state, slice_())
    assert apply(state, slice_(addressType="FQDN")).services == {A}
    assert not state.slices(A)


def test_conditions_are_read_once(state: ClusterState) -> None:
    gone = {"ready": False, "serving": False, "terminating": True}
    conditions = [{}, {"ready": False, "serving": True, "terminating": True}, {"ready": False}, gone]
    endpoints = [{"addresses": [f"10.0.0.{i}"], "conditions": c} for i, c in enumerate(conditions, 1)]
    apply(state, slice_(endpoints=endpoints))
    found = [endpoint.readiness for endpoint in state.slices(A)["a-1"].endpoints]
    assert found == [Readiness.READY, Readiness.DRAINING, Readiness.UNUSABLE, Readiness.GONE]
