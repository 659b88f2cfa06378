"""Owns the scenario of a rolling update: the pods of a Deployment replaced one by one, under a load of connections.

The EndpointSlice is written as its controller does for `maxSurge: 1, maxUnavailable: 0`: the new pod is there but not
ready, it is ready, the old one terminates (and still serves), the old one is gone. A slice has 100 endpoints at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

from hack.bench import processes
from hack.bench.feeds import ServerFeed, Writer
from hack.bench.node import Entrant, Progress, Say, Stage, first_sync, settle, staged, told_in, wait
from hack.bench.objects import SERVICE_PORT, TARGET_PORT, addresses_of, endpoint, service, slice_of
from hack.bench.results import RollingUpdate, spread
from hack.bench.stream import Stream
from hack.controlplane.access import Json
from hack.controlplane.load import Shape
from nodeproxy.sandbox.load.generator import affordable
from nodeproxy.sandbox.pace import scaled

NAME: Final = "rolling"
ADDRESS: Final = "10.96.0.201"

_NODE: Final = "node-1"
_SLICE_SIZE: Final = 100
_STEP_TIMEOUT: Final = 120.0
_BEFORE: Final = 1.0  # of load, before anything is replaced
_PAUSE: Final = 0.2  # after a write that no connection can tell
_LOOK: Final = 0.002
_QUIET: Final = 10  # so many connections' worth of time without one: nobody goes there any more
_LEAST_QUIET: Final = 0.2

STARTING: Final = (False, False, False)
READY: Final = (True, True, False)
TERMINATING: Final = (False, True, True)


@dataclass(frozen=True, kw_only=True)
class RollingPlan:
    """What to do. `grace`: seconds from when a pod terminates until it ends; `rate`: connections a second, at most."""

    shape: Shape
    replicas: int = 10
    grace: float = 1.0
    rate: float = 1000.0
    timeout: float = 300.0


def objects(replicas: int) -> list[Json]:
    """The Service and the slices that the state begins with."""
    return [service(NAME, ADDRESS), *RollingSlices(pods_of(replicas)[:replicas]).all()]


def measure(entrant: Entrant, feed: ServerFeed, plan: RollingPlan, say: Say) -> RollingUpdate:
    """One agent, from start to end, on a state that has `objects` in it. What goes wrong is told in the result."""
    result = entrant.enter(RollingUpdate, feed, plan.shape, replicas=plan.replicas, grace_seconds=plan.grace)
    pods = pods_of(plan.replicas)
    writer = Writer(feed)
    try:
        with told_in(result, say):
            for slice_ in RollingSlices(pods[: plan.replicas]).all():
                writer.put(slice_)
            with staged(entrant, feed) as stage:
                _measure_on(stage, writer, plan, result, say)
    finally:
        writer.close()
    return result


def _measure_on(stage: Stage, writer: Writer, plan: RollingPlan, result: RollingUpdate, say: Say) -> None:
    waiting = Progress(say, lambda: f"{result.title}: first sync not done yet")
    first_sync(stage, [addresses_of(plan.shape)[-1], ADDRESS], timeout=plan.timeout, waiting=waiting)
    settle(stage.running, plan.timeout)
    node, pid = stage.node, stage.running.pid
    node.listener.close()  # it has all addresses; now each pod is to have its own
    with Stream(node.client, (ADDRESS, SERVICE_PORT), node.box.outside, pods_of(plan.replicas), TARGET_PORT) as stream:
        stream.start(affordable(plan.rate))
        time.sleep(_BEFORE)
        before, began = processes.cpu(pid), time.monotonic()
        update = _Update(stage, writer, stream, plan=plan, result=result, say=say)
        try:
            update.run()
            settle(stage.running, plan.timeout)
        finally:
            result.seconds = time.monotonic() - began
            with suppress(OSError):  # it has ended, which is told
                result.cpu = processes.difference(processes.cpu(pid), before)
            stream.stop()
            _sum_up(result, stream)
    say(
        f"{result.title}: {plan.replicas} pods replaced, {result.failed} of {result.connections} connections failed, "
        f"median {result.joined.median * 1000:.0f} ms until a new one has some"
        if result.joined
        else f"{result.title}: nothing replaced"
    )


def _sum_up(result: RollingUpdate, stream: Stream) -> None:
    result.resolution_seconds = result.replicas / stream.rate
    result.connections, result.failed, result.failures = stream.connections, stream.failed, stream.failures
    if result.joined_seconds:
        result.joined = spread(result.joined_seconds)
    if result.left_seconds:
        result.left = spread(result.left_seconds)
    if result.cpu and result.writes:
        result.cpu_per_write = result.cpu.total / result.writes
        result.core_percent = result.cpu.total / result.seconds * 100


class _Update:
    """The rolling update of one agent's node."""

    def __init__(
        self, stage: Stage, writer: Writer, stream: Stream, *, plan: RollingPlan, result: RollingUpdate, say: Say
    ) -> None:
        self._stage = stage
        self._writer = writer
        self._stream = stream
        self._plan = plan
        self._result = result
        self._tell = Progress(say, lambda: f"{result.title}: {len(result.left_seconds)} of {plan.replicas} pods replaced")
        self._quiet = max(_LEAST_QUIET, _QUIET * plan.replicas / stream.rate)

    def run(self) -> None:
        """Replace all pods. Raises AgentError or NoAnswer."""
        pods = pods_of(self._plan.replicas)
        slices = RollingSlices(pods[: self._plan.replicas])
        for old, new in zip(pods[: self._plan.replicas], pods[self._plan.replicas :], strict=True):
            self._write(slices.add(new))
            time.sleep(_PAUSE)
            started = self._write(slices.set(new, READY))
            self._wait(started, partial(self._stream.first.get, new))
            self._result.joined_seconds.append(max(0.0, self._stream.first[new] - started))
            started = self._write(slices.set(old, TERMINATING))
            self._wait(started, partial(self._nobody_goes_to, old, started))
            self._result.left_seconds.append(max(0.0, self._stream.last.get(old, started) - started))
            self._write(slices.remove(old))
            time.sleep(_PAUSE)

    def _write(self, slice_: Json) -> float:
        """When (monotonic) it began."""
        started = time.monotonic()
        self._writer.put(slice_)
        self._result.writes += 1
        return started

    def _wait(self, started: float, attempt: Callable[[], float | None]) -> None:
        def look() -> float | None:
            if (seen := attempt()) is None:
                time.sleep(_LOOK)
            return seen

        wait(self._stage.running, started + scaled(_STEP_TIMEOUT), self._tell, look)

    def _nobody_goes_to(self, old: str, since: float) -> float | None:
        """Now, if no connection has reached a terminating pod for a while; the pod ends when its time is up."""
        now = time.monotonic()
        ended = now - since >= self._plan.grace
        if ended:
            self._stream.end_backend(old)
        return now if ended and now - max(self._stream.last.get(old, since), since) >= self._quiet else None


def pods_of(replicas: int) -> list[str]:
    """Addresses of the pods that are there in the beginning, and of those that replace them."""
    return [f"10.244.{100 + number // 250}.{number % 250 + 1}" for number in range(2 * replicas)]


class RollingSlices:
    """The Service's EndpointSlices: a new endpoint goes into the first that has room."""

    def __init__(self, pods: Sequence[str]) -> None:
        # There is always room for the one pod more than there are replicas.
        parts = [pods[start : start + _SLICE_SIZE] for start in range(0, len(pods) + 1, _SLICE_SIZE)]
        self._parts = [dict.fromkeys(part, READY) for part in parts]

    def all(self) -> list[Json]:
        """All of them."""
        return [self._slice(number) for number in range(len(self._parts))]

    def add(self, pod: str) -> Json:
        """The slice that has this endpoint now, not ready."""
        number = next(number for number, part in enumerate(self._parts) if len(part) < _SLICE_SIZE)
        return self._set(number, pod, STARTING)

    def set(self, pod: str, state: tuple[bool, bool, bool]) -> Json:
        """The slice that says this of an endpoint: ready, serving, terminating."""
        return self._set(self._where(pod), pod, state)

    def remove(self, pod: str) -> Json:
        """The slice that had this endpoint."""
        number = self._where(pod)
        del self._parts[number][pod]
        return self._slice(number)

    def _where(self, pod: str) -> int:
        return next(number for number, part in enumerate(self._parts) if pod in part)

    def _set(self, number: int, pod: str, state: tuple[bool, bool, bool]) -> Json:
        self._parts[number][pod] = state
        return self._slice(number)

    def _slice(self, number: int) -> Json:
        endpoints = [
            endpoint(pod, node_name=_NODE, ready=ready, serving=serving, terminating=terminating)
            for pod, (ready, serving, terminating) in self._parts[number].items()
        ]
        return slice_of(NAME, f"{NAME}-{number}", endpoints)
