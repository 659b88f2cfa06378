"""The sync loop: when it programs, how often, and how it comes back to what failed.

The programmer here only records: what is tested is time and order, and failures that no kernel gives on demand.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

import msgspec
import pytest

from nodeproxy.agent.events import NoEvents
from nodeproxy.agent.health import Health
from nodeproxy.agent.metrics import Metrics
from nodeproxy.agent.sync import SyncLoop
from nodeproxy.api.objects import Kind, ObjectKey, Service
from nodeproxy.cluster.state import ClusterState
from nodeproxy.forwarding.node import NodeFacts
from nodeproxy.forwarding.table import Delta, Family, ForwardingTable, ServicePortKey
from nodeproxy.forwarding.tracker import ForwardingTracker
from nodeproxy.programmer.base import (
    ApplyResult,
    LocalDetector,
    NodePortAddresses,
    ProgrammerConfig,
    ProgrammingError,
    Withdrawal,
)
from nodeproxy.source.events import Deleted, Event, ListComplete, Upserted

COMPLETE: Sequence[Event] = (ListComplete(Kind.SERVICE), ListComplete(Kind.ENDPOINT_SLICE))


def service(number: int) -> Upserted:
    made = {
        "metadata": {"name": f"s{number}", "namespace": "ns"},
        "spec": {"clusterIP": f"10.96.{number // 250}.{number % 250 + 1}", "ports": [{"port": 80}]},
    }
    return Upserted(msgspec.convert(made, Service))


class Recorder:
    """A programmer that remembers what it was given, and fails or refuses when told to."""

    def __init__(self) -> None:
        self.programmed: dict[ServicePortKey, object] = {}
        self.calls: list[Delta] = []
        self.configured: list[ProgrammerConfig] = []
        self.failures = 0
        self.refuse: Callable[[ServicePortKey], bool] = lambda key: False

    draining = 0

    async def prepare(self) -> None:
        """Nothing to prepare."""

    def configure(self, config: ProgrammerConfig) -> None:
        self.configured.append(config)

    async def apply(self, table: ForwardingTable, delta: Delta) -> ApplyResult:
        self.calls.append(delta)
        await asyncio.sleep(0.01)
        if self.failures:
            self.failures -= 1
            raise ProgrammingError("told to fail")
        refused = {key: "told to refuse" for key in delta.rows if self.refuse(key)}
        for key, change in delta.rows.items():
            if key not in refused:
                self.programmed[key] = change.after
        return ApplyResult(refused=refused)

    async def audit(self, *, whole: bool = False) -> Sequence[str]:
        return ()

    async def withdraw(self) -> Withdrawal:
        return Withdrawal.DONE

    async def cleanup(self) -> None:
        """Nothing to clean up."""


class Listener:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []

    def programmed(self, table: ForwardingTable, delta: Delta) -> None:
        self.deltas.append(delta)


BACK = ProgrammerConfig((Family.IPV4,), LocalDetector(), {Family.IPV4: NodePortAddresses()})


@asynccontextmanager
async def running(
    programmer: Recorder, min_sync_period: float = 0.0, observer: Listener | None = None
) -> AsyncIterator[tuple[SyncLoop, Health]]:
    health = Health(sync_period=30)
    loop = SyncLoop(
        state=ClusterState("n"),
        tracker=ForwardingTracker(NodeFacts(name="n", families=(Family.IPV4,))),
        programmer=programmer,
        health=health,
        metrics=Metrics(),
        min_sync_period=min_sync_period,
        on_node_change=lambda: None,
        events=NoEvents(),
        observers=[observer] if observer else [],
    )
    task = asyncio.create_task(loop.run())
    try:
        yield loop, health
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not done():  # noqa: ASYNC110 - what is waited for knows nothing of events
            await asyncio.sleep(0.005)


async def test_nothing_is_programmed_before_both_lists_are_complete() -> None:
    programmer = Recorder()
    async with running(programmer) as (loop, health):
        loop.deliver([service(1), COMPLETE[0]])
        await asyncio.sleep(0.1)
        assert programmer.calls == []
        assert not health.healthy
        loop.deliver([COMPLETE[1]])
        await until(lambda: len(programmer.programmed) == 1)
        await until(lambda: health.healthy)


async def test_an_empty_cluster_is_synced_too() -> None:
    programmer = Recorder()
    async with running(programmer) as (loop, health):
        loop.deliver(COMPLETE)
        await until(lambda: health.healthy)
        assert len(programmer.calls) == 1


async def test_a_burst_is_gathered_and_a_lone_change_is_not_held() -> None:
    programmer = Recorder()
    async with running(programmer, min_sync_period=0.4) as (loop, _):
        loop.deliver(COMPLETE)
        await until(lambda: len(programmer.calls) == 1)
        await asyncio.sleep(0.5)  # idle for longer than the period
        start = asyncio.get_running_loop().time()
        loop.deliver([service(0)])
        await until(lambda: len(programmer.programmed) == 1)
        assert asyncio.get_running_loop().time() - start < 0.3, "held back although idle"
        for number in range(1, 101):
            loop.deliver([service(number)])
            await asyncio.sleep(0.001)
        await until(lambda: len(programmer.programmed) == 101)
        assert len(programmer.calls) <= 4


async def test_a_failed_sync_is_tried_again_with_all_that_changed_meanwhile() -> None:
    programmer = Recorder()
    async with running(programmer) as (loop, _):
        loop.deliver([service(1), *COMPLETE])
        await until(lambda: len(programmer.programmed) == 1)
        programmer.failures = 1
        loop.deliver([service(2)])
        await until(lambda: len(programmer.calls) == 2)
        loop.deliver([service(3), Deleted(ObjectKey(Kind.SERVICE, "ns", "s1"))])
        await until(lambda: len(programmer.programmed) == 3)
        assert {str(key.name) for key, row in programmer.programmed.items() if row} == {"ns/s2", "ns/s3"}
        assert {str(key.name) for key in programmer.calls[2].rows} == {"ns/s1", "ns/s2", "ns/s3"}


async def test_a_refused_row_is_tried_again() -> None:
    programmer = Recorder()
    programmer.refuse = lambda key: key.name.name == "s1"
    async with running(programmer) as (loop, _):
        loop.deliver([service(1), service(2), *COMPLETE])
        await until(lambda: len(programmer.programmed) == 1)
        programmer.refuse = lambda key: False
        await until(lambda: len(programmer.programmed) == 2)


async def test_a_refused_row_is_not_tried_with_every_other_change() -> None:
    programmer = Recorder()
    programmer.refuse = lambda key: key.name.name == "s1"
    async with running(programmer) as (loop, _):
        loop.deliver([service(1), *COMPLETE])
        await until(lambda: len(programmer.calls) == 1)
        for number in range(2, 12):
            loop.deliver([service(number)])
            await until(lambda: len(programmer.programmed) == number - 1)  # noqa: B023
        tried = sum(any(key.name.name == "s1" for key in delta.rows) for delta in programmer.calls)
        assert tried == 1
        await until(lambda: sum(any(key.name.name == "s1" for key in delta.rows) for delta in programmer.calls) == 2)


def test_health_is_lost_when_a_change_waits_too_long() -> None:
    now = 1000.0
    health = Health(sync_period=30, now=lambda: now)
    assert (health.healthy, health.alive) == (False, True)
    health.programmed()
    assert (health.healthy, health.alive) == (True, True)
    health.queued()
    now += 59
    assert health.alive
    health.queued()  # the oldest counts
    now += 2
    assert (health.healthy, health.alive) == (False, False)
    health.programmed()
    health.node_eligible = False
    assert (health.healthy, health.alive) == (False, True)
    assert msgspec.to_builtins(health.status())["nodeEligible"] is False


async def test_a_switch_programs_everything_by_the_other_programmer_and_goes_on_with_it() -> None:
    before, after = Recorder(), Recorder()
    async with running(before) as (loop, _):
        loop.deliver([service(1), *COMPLETE])
        await until(lambda: len(before.programmed) == 1)
        await loop.switch(after, 0.0, back=BACK)
        assert len(after.calls) == 1
        loop.deliver([service(2)])
        await until(lambda: len(after.programmed) == 1)
        assert len(before.calls) == 1


async def test_a_switch_that_fails_goes_back_and_programs_anew() -> None:
    before, after = Recorder(), Recorder()
    after.failures = 1
    async with running(before) as (loop, _):
        loop.deliver([service(1), *COMPLETE])
        await until(lambda: len(before.programmed) == 1)
        with pytest.raises(ProgrammingError, match="told to fail"):
            await loop.switch(after, 0.0, back=BACK)
        await until(lambda: len(before.calls) == 2)
        assert before.configured == [BACK]
        loop.deliver([service(2)])
        await until(lambda: len(before.programmed) == 2)
        assert len(after.calls) == 1


async def test_a_switch_before_the_first_sync_waits_for_nothing() -> None:
    before, after = Recorder(), Recorder()
    async with running(before) as (loop, _):
        await loop.switch(after, 0.0, back=BACK)
        loop.deliver([service(1), *COMPLETE])
        await until(lambda: len(after.programmed) == 1)
        assert before.calls == []


async def test_observers_hear_everything_once_also_after_a_failure() -> None:
    programmer, heard = Recorder(), Listener()
    async with running(programmer, observer=heard) as (loop, _):
        programmer.failures = 1
        loop.deliver([service(1), *COMPLETE])
        await until(lambda: len(heard.deltas) == 1)
        assert len(programmer.calls) == 2
        assert {str(key.name) for key in heard.deltas[0].rows} == {"ns/s1"}
        loop.deliver([service(2)])
        await until(lambda: len(heard.deltas) == 2)
        assert {str(key.name) for key in heard.deltas[1].rows} == {"ns/s2"}
