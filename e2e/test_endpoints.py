"""Endpoints that come, become ready or unready, terminate and go."""

from __future__ import annotations

import time
import urllib.parse
from collections import Counter
from typing import Any

import pytest

from e2e.harness.flow import Lane
from e2e.harness.objects import port
from e2e.harness.pace import scaled
from e2e.harness.stage import A1, A2, SERVERS, B
from e2e.harness.waiting import eventually
from e2e.harness.world import DROPPED, REJECTED, World
from nodeproxy.sandbox.client import Answered


def lingering(seconds: float = 60) -> dict[str, Any]:
    """A server that goes on serving for so long after it was told to end, as one does that waits for its clients."""
    delay = int(scaled(seconds))
    probe = {"httpGet": {"path": "/healthz", "port": 8080}}
    return {"arguments": ["--delay-shutdown", str(delay)], "grace": delay + 30, "probe": probe}


def terminating(world: World, service: str, pod: str) -> bool:
    """Whether the Service's slices say so of a pod: no longer ready, still serving, terminating."""
    slices = world.api.list("EndpointSlice", f"kubernetes.io/service-name={service}")
    conditions = [one["conditions"] for each in slices for one in each["endpoints"] if one["targetRef"]["name"] == pod]
    return conditions == [{"ready": False, "serving": True, "terminating": True}]


@pytest.mark.smoke
def test_the_last_pods_terminate(world: World) -> None:
    """While all pods of a Service terminate, those that still serve are used: no request fails until the last is gone.

    This is what a rolling update of a single replica, or a drained node, comes to. Afterwards the Service refuses.
    """
    labels = {"app": world.unique("ending")}
    (pod,) = world.servers([("ending", world.stage.a)], labels, **lingering())
    service = world.service(selector=labels, type="NodePort")
    stage = world.stage
    for place in (stage.client_a, stage.client_b):
        world.answers(place, service.address, 80, {pod})
    world.answers(stage.outside, stage.b.address, service.node_port, {pod})
    lanes = [*world.lanes((stage.client_a, stage.client_b), service.address, 80, "connection", "stream")]
    with world.requests(*lanes, Lane(stage.outside, stage.b.address, service.node_port)) as requests:
        world.api.delete("Pod", pod)
        eventually(lambda: terminating(world, service.name, pod), "the pod is terminating")
        time.sleep(4)
        requests.steady()
    world.api.delete("Pod", pod, at_once=True)
    world.never(stage.client_b, service.address, 80, REJECTED)


def test_terminating_pods_get_nothing_new_while_others_are_ready(world: World) -> None:
    """A pod that terminates gets no new connection while another is ready; the connections that it has go on."""
    labels = {"app": world.unique("drain")}
    stage = world.stage
    (old,) = world.servers([("old", stage.a)], labels, **lingering())
    service = world.service(selector=labels)
    world.answers(stage.client_b, service.address, 80, {old})
    with world.requests(Lane(stage.client_b, service.address, 80, "stream")) as requests:
        eventually(lambda: requests.seen[0].answers, "the stream has begun")
        (new,) = world.servers([("new", stage.b)], labels)
        world.answers(stage.client_b, service.address, 80, {old, new})
        world.api.delete("Pod", old)
        world.answers(stage.client_b, service.address, 80, {new}, count=10)
        world.answers(stage.client_b, stage.pod_address(old), 8080, {old})  # it would have answered
        time.sleep(3)
        requests.steady()
        assert set(requests.seen[0].answers) == {old}


def test_terminating_and_policy_local(world: World) -> None:
    """With policy Local the last pod of a node, terminating, goes on serving those who come to that node."""
    labels = {"app": world.unique("local")}
    stage = world.stage
    (here,) = world.servers([("here", stage.a)], labels, **lingering())
    world.servers([("there", stage.b)], labels)
    service = world.service(selector=labels, type="NodePort", externalTrafficPolicy="Local")
    world.answers(stage.outside, stage.a.address, service.node_port, {here})
    with world.requests(Lane(stage.outside, stage.a.address, service.node_port)) as requests:
        world.api.delete("Pod", here)
        eventually(lambda: terminating(world, service.name, here), "the pod is terminating")
        time.sleep(3)
        requests.steady()
    world.api.delete("Pod", here, at_once=True)
    world.never(stage.outside, stage.a.address, service.node_port, DROPPED)


def test_readiness(world: World) -> None:
    """A pod that is not ready gets no connection until it is again, unless `publishNotReadyAddresses` says otherwise."""
    labels = {"app": world.unique("moody")}
    stage = world.stage
    probe = {"exec": {"command": ["test", "!", "-e", "/tmp/moody"]}, "failureThreshold": 1}
    moody, steady = world.servers([("moody", stage.a), ("steady", stage.b)], labels, probe=probe)
    service = world.service(selector=labels)
    tolerant = world.service("tolerant", selector=labels, publishNotReadyAddresses=True)
    world.answers(stage.client_a, service.address, 80, {moody, steady})
    shell = f"http://{stage.pod_address(moody)}:8080/shell?cmd="
    assert stage.client_a.get(shell + urllib.parse.quote("touch /tmp/moody"))[0] == 200
    world.answers(stage.client_a, service.address, 80, {steady}, count=12)
    world.answers(stage.client_a, tolerant.address, 80, {moody, steady})
    assert stage.client_a.get(shell + urllib.parse.quote("rm /tmp/moody"))[0] == 200
    world.answers(stage.client_a, service.address, 80, {moody, steady})


def test_slices_by_hand(world: World) -> None:
    """A Service without a selector serves what its slices say: several of them, each with its own port."""
    service = world.service(selector=None, ports=[port(80, 80)])
    moved = {"app": world.unique("moved")}
    (other,) = world.servers([("moved", world.stage.b)], moved, arguments=["--http-port", "9090"], ports={"http": 9090})
    world.slice(service, [world.endpoint(A1), world.endpoint(A2, ready=False, serving=False)])
    world.slice(service, [world.endpoint(other)], target=9090)
    for place in world.stage.inside:
        world.answers(place, service.address, 80, {A1, other})


def test_the_same_endpoint_in_two_slices(world: World) -> None:
    """An endpoint that is in two slices for a while, as when they are rewritten, is one endpoint: ready if one says so."""
    service = world.service(selector=None)
    world.slice(service, [world.endpoint(A1, ready=False, serving=False), world.endpoint(B)])
    second = world.slice(service, [world.endpoint(A1)])
    world.answers(world.stage.client_b, service.address, 80, {A1, B})
    world.api.delete("EndpointSlice", second)
    world.answers(world.stage.client_b, service.address, 80, {B}, count=10)


@pytest.mark.smoke
def test_a_rolling_update(world: World) -> None:
    """Pods replaced one by one, each told to end with a moment to do so: no request fails, from wherever it comes."""
    labels = {"app": world.unique("rolling")}
    stage = world.stage
    gentle = lingering(5)
    olds = world.servers([("old", stage.a), ("old", stage.b)], labels, **gentle)
    service = world.service(selector=labels, type="NodePort")
    places = (stage.client_a, stage.client_b, stage.node_b)
    for place in places:
        world.answers(place, service.address, 80, olds)
    world.answers(stage.outside, stage.b.address, service.node_port, olds)
    lanes = [
        *world.lanes(places, service.address, 80, "connection"),
        Lane(stage.outside, stage.b.address, service.node_port),
    ]
    with world.requests(*lanes) as requests:
        news = []
        for old, node in zip(olds, (stage.a, stage.b), strict=True):
            news += world.servers([("new", node)], labels, **gentle)
            world.api.delete("Pod", old)
        world.answers(stage.client_a, service.address, 80, news)
        for old in olds:
            eventually(lambda: old not in names(world), f"{old} is gone", within=60)  # noqa: B023
        requests.steady()


def names(world: World) -> set[str]:
    """The pods there are."""
    return {pod["metadata"]["name"] for pod in world.api.list("Pod")}


@pytest.mark.smoke
def test_balance(world: World) -> None:
    """New connections are spread evenly over the pods."""
    service = world.service()
    client, count = world.stage.client_a, 300
    world.answers(client, service.address, 80, SERVERS)
    answers = [one for one in client.ask(service.address, 80, count) if isinstance(one, Answered)]
    assert len(answers) == count
    shares = Counter(one.name for one in answers)
    assert all(count / 6 < share < count / 2 for share in shares.values()), shares  # chance alone: once in a billion
