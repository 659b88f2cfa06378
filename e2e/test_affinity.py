"""Session affinity ClientIP."""

from __future__ import annotations

import time
from typing import Any

import pytest

from e2e.harness.asking import name_of
from e2e.harness.settings import MODE
from e2e.harness.stage import SERVERS
from e2e.harness.waiting import eventually
from e2e.harness.world import Service, World

# IPVS counts the time from when it has forgotten the last connection: 10 s after one that was reset.
SECONDS, FORGOTTEN = (6, 9.0) if MODE == "iptables" else (20, 45.0)


def sticky(seconds: int = 10800) -> dict[str, Any]:
    """The fields of a Service with affinity that lasts so long."""
    return {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}}


def who(world: World, service: Service, source: str, count: int = 1) -> set[str]:
    """Who answers a source address outside, at the node port of node a."""
    address = world.stage.a.address
    return {name_of(one) for one in world.stage.outside.ask(address, service.node_port, count, source=source, reset=True)}


@pytest.mark.smoke
def test_affinity(world: World) -> None:
    """With affinity each client keeps its pod, at every address of the Service; clients together reach all pods."""
    service = world.service(type="NodePort", **sticky())
    for place in world.stage.inside:
        eventually(lambda: name_of(place.ask(service.address, 80)[0]) in SERVERS, f"{place} is served")  # noqa: B023
        assert len({name_of(one) for one in place.ask(service.address, 80, 15)}) == 1
    client, a = world.stage.client_a, world.stage.a
    at_both = {
        name_of(client.ask(address, number)[0])
        for address, number in ((service.address, 80), (a.address, service.node_port))
    }
    assert len(at_both) == 1
    kept = {source: who(world, service, source, 6) for source in world.stage.sources()}
    assert all(len(names) == 1 for names in kept.values()), kept
    assert {name for names in kept.values() for name in names} == SERVERS


def test_affinity_ends_with_its_timeout(world: World) -> None:
    """A client that comes back within the time-out keeps its pod, each time; one that stays away longer need not."""
    service = world.service(type="NodePort", **sticky(SECONDS))
    sources = world.stage.sources(20)
    eventually(lambda: who(world, service, sources[0]) <= SERVERS, "the node port is served")
    first: dict[str, set[str]] = {}
    asked: dict[str, float] = {}
    kept = 0
    for _ in range(4):
        for source in sources:
            before = asked.get(source)
            names = who(world, service, source)
            asked[source] = time.monotonic()
            if before is not None and asked[source] - before < SECONDS - 1:  # else this machine was too slow to tell
                kept += 1
                assert names == first[source], f"{source} was moved after {asked[source] - before:.1f} s"
            first[source] = names
        time.sleep(SECONDS / 2)
    assert kept > 0
    time.sleep(FORGOTTEN)
    moved = [source for source in sources if who(world, service, source) != first[source]]
    assert moved, f"none of {len(sources)} clients was given another pod after {FORGOTTEN} s"


def test_affinity_to_a_pod_that_goes(world: World) -> None:
    """A client whose pod goes is given another one at once, and keeps that."""
    labels = {"app": world.unique("goes")}
    names = world.servers([("one", world.stage.a), ("two", world.stage.b)], labels)
    service = world.service(selector=labels, **sticky())
    client = world.stage.client_a
    eventually(lambda: len({name_of(client.ask(service.address, 80)[0])} & set(names)) == 1, "the Service is served")
    (kept,) = {name_of(one) for one in client.ask(service.address, 80, 10)}
    (other,) = set(names) - {kept}
    world.api.delete("Pod", kept)
    world.answers(client, service.address, 80, {other}, count=10)


def test_affinity_switched_on_and_off(world: World) -> None:
    """Affinity begins and ends with the field of a Service that serves."""
    service = world.service()
    client = world.stage.client_b
    world.answers(client, service.address, 80, SERVERS)
    world.change(service, **sticky())
    eventually(lambda: len({name_of(one) for one in client.ask(service.address, 80, 20)}) == 1, "the client keeps its pod")
    world.change(service, sessionAffinity="None", sessionAffinityConfig=None)
    world.answers(client, service.address, 80, SERVERS)
