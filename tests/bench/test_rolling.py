"""What the rolling update writes, and what churn is judged by."""

from __future__ import annotations

from hack.bench.churning import keeps_up
from hack.bench.results import Churn, spread
from hack.bench.rolling import READY, TERMINATING, RollingSlices, objects, pods_of
from hack.controlplane.access import Json


def conditions(slice_: Json) -> dict[str, str]:
    """Of each endpoint of a slice by address: which conditions hold."""
    return {
        one["addresses"][0]: "+".join(name for name, holds in one["conditions"].items() if holds)
        for one in slice_["endpoints"]
    }


def test_a_pod_goes_through_the_states_that_the_controller_writes() -> None:
    old, new = pods_of(1)
    slices = RollingSlices([old])
    assert [conditions(slice_) for slice_ in slices.all()] == [{old: "ready+serving"}]
    assert conditions(slices.add(new)) == {old: "ready+serving", new: ""}
    assert conditions(slices.set(new, READY)) == {old: "ready+serving", new: "ready+serving"}
    assert conditions(slices.set(old, TERMINATING)) == {old: "serving+terminating", new: "ready+serving"}
    assert conditions(slices.remove(old)) == {new: "ready+serving"}


def test_no_slice_has_more_than_a_hundred_endpoints() -> None:
    pods = pods_of(200)
    assert len(set(pods)) == 400
    slices = RollingSlices(pods[:200])
    added = slices.add(pods[200])
    assert added["metadata"]["name"] == "rolling-2"
    assert [len(slice_["endpoints"]) for slice_ in slices.all()] == [100, 100, 1]
    removed = slices.remove(pods[150])
    assert (removed["metadata"]["name"], len(removed["endpoints"])) == ("rolling-1", 99)
    assert slices.add(pods[201])["metadata"]["name"] == "rolling-1"
    assert [item["kind"] for item in objects(200)] == ["Service", *["EndpointSlice"] * 3]


def churned(latency: list[float], drain: float = 0.5, missing: int = 0) -> Churn:
    return Churn(
        agent="nodeproxy",
        mode="iptables",
        variant="nft",
        source="static",
        program="nodeproxy",
        services=10,
        endpoints=1,
        rate=100.0,
        latency_seconds=latency,
        latency=spread(latency),
        drain_seconds=drain,
        missing=missing,
    )


def test_it_keeps_up_unless_work_is_left_in_the_end() -> None:
    steady = churned([0.1, 0.12] * 10)
    assert keeps_up(steady)
    assert steady.first_half == steady.second_half == 0.11
    assert keeps_up(churned([0.1] * 10 + [0.2] * 10))
    assert keeps_up(churned([8.0] * 20, drain=15.0))
    assert not keeps_up(churned([0.1] * 20, drain=1000.0))
    assert not keeps_up(churned([0.1] * 20, missing=1))
    one = churned([0.1])
    assert keeps_up(one)
    assert (one.first_half, one.second_half) == (None, None)
