"""Owns the scenario of churn: many endpoints moved every second, each of a Service chosen at random.

The probe's endpoint moves, too, now and then: the time until packets follow is how long any change of that time takes.
"""

from __future__ import annotations

import itertools
import random
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

from hack.bench import processes, rules, virtual_servers
from hack.bench.changing import CHANGE_TIMEOUT
from hack.bench.feeds import ServerFeed, Writer
from hack.bench.node import ASK, PODS, REST_SECONDS, Entrant, Progress, Say, Stage, first_sync, settle, staged, told_in, wait
from hack.bench.objects import addresses_of
from hack.bench.results import Churn, spread
from hack.controlplane.load import Shape
from nodeproxy.sandbox.pace import scaled

_WRITERS: Final = 4
_PAUSE: Final = 0.002  # between connections: the agent is to have the processors
_BETWEEN: Final = 0.5  # two moves of the probe, at least
_SOON: Final = 2.0  # after the last change


@dataclass(frozen=True, kw_only=True)
class ChurnPlan:
    """`rate` changes a second for `seconds`."""

    shape: Shape
    rate: float = 100.0
    seconds: float = 30.0
    timeout: float = 300.0


class Churning:
    """Endpoints that have been moved so far; goes on from one agent to the next, which finds the state as it is then."""

    def __init__(self, shape: Shape, feed: ServerFeed) -> None:
        self._shape = shape
        self._feed = feed
        self._changed: list[dict[int, dict[int, int]]] = [{} for _ in range(_WRITERS)]
        self._number = itertools.count()
        self._stop = threading.Event()
        self.made = 0

    @contextmanager
    def going(self, rate: float, seed: int) -> Iterator[None]:
        """Make so many changes a second while the block lasts; `made` is how many. Raises what a writer met with."""
        self._stop.clear()
        self.made = 0
        with ThreadPoolExecutor(_WRITERS) as pool:
            works = [pool.submit(self._work, number, rate / _WRITERS, seed) for number in range(_WRITERS)]
            try:
                yield
            finally:
                self._stop.set()
            self.made = sum(work.result() for work in works)

    def written(self) -> set[str]:
        """The present addresses of all endpoints that have been moved."""
        return {
            self._shape.address("IPv4", service, member, change)
            for changed in self._changed
            for service, moved in changed.items()
            for member, change in moved.items()
        }

    def _work(self, writer_number: int, rate: float, seed: int) -> int:
        """Writes of Services of its own, so that no older slice comes after a newer one; returns how many."""
        choice = random.Random(seed * _WRITERS + writer_number)
        services = self._shape.numbers[writer_number::_WRITERS]
        changed = self._changed[writer_number]
        due, done = time.monotonic(), 0
        with closing(Writer(self._feed)) as writer:
            while services and not self._stop.wait(max(0.0, due - time.monotonic())):
                due += 1 / rate
                service, member = choice.choice(services), choice.randrange(self._shape.endpoints)
                moved = changed.setdefault(service, {})
                moved[member] = next(self._number)
                address = self._shape.address("IPv4", service, member, moved[member])
                for slice_ in self._shape.slices(service, moved):
                    if any(address in one["addresses"] for one in slice_["endpoints"]):
                        writer.put(slice_)
                done += 1
        return done


def measure(entrant: Entrant, feed: ServerFeed, churning: Churning, plan: ChurnPlan, say: Say) -> Churn:
    """One agent, from start to end. What goes wrong is told in the result."""
    result = entrant.enter(Churn, feed, plan.shape, rate=plan.rate)
    with told_in(result, say), staged(entrant, feed) as stage:
        waiting = Progress(say, lambda: f"{result.title}: first sync not done yet")
        first_sync(stage, [addresses_of(plan.shape)[-1]], timeout=plan.timeout, waiting=waiting)
        settle(stage.running, plan.timeout)
        _measure_on(stage, churning, plan, result, say)
    return result


def _measure_on(stage: Stage, churning: Churning, plan: ChurnPlan, result: Churn, say: Say) -> None:
    pid = stage.running.pid
    result.rss_before_kib = processes.memory(pid).rss_kib
    before, began = processes.cpu(pid), time.monotonic()
    with churning.going(plan.rate, seed=plan.shape.services):
        _ask_probe(stage, began + plan.seconds, result, say)
        result.seconds = time.monotonic() - began
        result.cpu = processes.difference(processes.cpu(pid), before)
    result.core_percent = result.cpu.total / result.seconds * 100
    result.changes, result.achieved_rate = churning.made, churning.made / result.seconds
    result.latency = spread(result.latency_seconds)
    ended = time.monotonic()
    rested = settle(stage.running, plan.timeout)
    result.drain_seconds = max(0.0, time.monotonic() - ended - REST_SECONDS)
    memory = processes.memory(pid)
    result.rss_after_kib, result.peak_kib = memory.rss_kib, memory.peak_kib
    result.missing = len(churning.written() - _endpoints(stage, result.mode))
    result.keeps_up = rested and keeps_up(result)
    say(
        f"{result.title}: {result.achieved_rate:.0f} changes/s for {result.seconds:.0f} s, latency "
        f"{result.latency.median * 1000:.0f} ms (99 of 100: {result.latency.p99 * 1000:.0f}), {result.core_percent:.0f}% of "
        f"a core, rests {result.drain_seconds:.1f} s after; {result.missing} endpoints missing"
    )


def _ask_probe(stage: Stage, until: float, result: Churn, say: Say) -> None:
    """Move the probe again and again, and note how long that takes. Raises AgentError or NoAnswer."""
    tell = Progress(say, lambda: f"{result.title}: {len(result.latency_seconds)} moves of the probe so far")
    at = 0
    while not result.latency_seconds or time.monotonic() < until:
        time.sleep(_BETWEEN * random.uniform(0.5, 1.0))
        at = 1 - at
        started = time.monotonic()
        stage.feed.point_to(PODS[at])
        limit = started + scaled(CHANGE_TIMEOUT)
        seen = wait(stage.running, limit, tell, partial(stage.witness.wait_for, at, ASK, _PAUSE))
        result.latency_seconds.append(seen - started)


def keeps_up(result: Churn) -> bool:
    """Whether next to nothing was left to do in the end: who is too slow has a backlog by then that grew all the time.

    (That latency grows is not enough: others may use the machine.)
    """
    half = len(result.latency_seconds) // 2
    if half:
        result.first_half = statistics.median(result.latency_seconds[:half])
        result.second_half = statistics.median(result.latency_seconds[half:])
    soon = max(scaled(_SOON), 2 * (result.first_half or 0.0))
    return (result.drain_seconds or 0.0) <= soon and result.missing == 0


def _endpoints(stage: Stage, mode: str) -> set[str]:
    """The addresses of all endpoints that are in the kernel."""
    where = stage.node.box.node
    if mode == "ipvs":
        return virtual_servers.real_addresses(where)
    return rules.destinations(rules.saved(where, stage.variant))
