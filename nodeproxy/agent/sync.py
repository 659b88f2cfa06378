"""Owns the sync loop: gathers changes, computes deltas, hands them to the programmer, and comes back to what failed.

A change is programmed at once when the agent is idle, and at most once per `min_sync_period` under load. Everything runs in
one task, so the programmer never sees two calls at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from types import MappingProxyType
from typing import NamedTuple, Protocol

import structlog

from nodeproxy.agent.backoff import Backoff
from nodeproxy.agent.events import REFUSED_BY_KERNEL, REFUSED_FIELD, EventRecorder
from nodeproxy.agent.health import Health
from nodeproxy.agent.metrics import Metrics
from nodeproxy.agent.record import Record
from nodeproxy.agent.waiting import wait_at_most
from nodeproxy.api.objects import EndpointSlice, Service
from nodeproxy.cluster.state import ClusterChanges, ClusterState
from nodeproxy.forwarding.table import Delta, ForwardingTable, RowChange, ServiceName, ServicePortKey, merge_deltas
from nodeproxy.forwarding.tracker import ForwardingTracker
from nodeproxy.programmer.base import ApplyResult, Programmer, ProgrammerConfig, ProgrammingError
from nodeproxy.source.events import Event, Upserted

_log = structlog.get_logger(__name__)

_AUDIT_PERIOD = 1.0
_RECENT = 256
_NOTHING = Delta(rows={}, health_checks={})


class Observer(Protocol):
    """Is told what was programmed, and never steers. Called on the event loop: must return at once."""

    def programmed(self, table: ForwardingTable, delta: Delta) -> None:
        """The kernel holds `table`, of which `delta` is new since the last call; with the first one, everything is."""


class Progress(NamedTuple):
    """How far the loop is. `pending`: Services of which something is not programmed; `refused`: by the kernel, and why."""

    first_done: bool = False
    pending: int = 0
    refused: Mapping[ServicePortKey, str] = MappingProxyType({})
    retry_seconds: float | None = None


class _Switch(NamedTuple):
    """A change of programmers that is asked for. `back`: how the one in force is configured, should the other one fail."""

    programmer: Programmer
    min_sync_period: float
    back: ProgrammerConfig
    done: asyncio.Future[None]


class SyncLoop:
    """Keeps the kernel in step with the cluster state.

    `first_sync` is set after the first one. `recent`: how long the latest syncs took that wrote only what changed, in
    seconds, since the programmer is in force.
    """

    def __init__(
        self,
        *,
        state: ClusterState,
        tracker: ForwardingTracker,
        programmer: Programmer,
        health: Health,
        metrics: Metrics,
        min_sync_period: float,
        on_node_change: Callable[[], None],
        events: EventRecorder,
        observers: Sequence[Observer] = (),
        record: Record | None = None,
    ) -> None:
        self._state = state
        self._tracker = tracker
        self._programmer = programmer
        self._health = health
        self._metrics = metrics
        self._min_sync_period = min_sync_period
        self._on_node_change = on_node_change
        self._events = events
        self._observers = tuple(observers)
        self._record = record or Record()
        self._switch: _Switch | None = None
        self._wake = asyncio.Event()
        self._services: set[ServiceName] = set()
        self._triggers: dict[ServiceName, list[str]] = {}
        self._node_changed = False
        self._unprogrammed = _NOTHING
        self._dirty = False
        self._synced_once = False
        self.first_sync = asyncio.Event()
        self.recent: deque[float] = deque(maxlen=_RECENT)
        self._checks: list[asyncio.Future[Sequence[str]]] = []
        self._refused: dict[ServicePortKey, str] = {}
        self._refused_backoff = Backoff(1.0, 300.0)
        self._failure_backoff = Backoff(0.5, 30.0)
        self._retry_at: float | None = None
        self._not_before = 0.0
        self._audit_at = 0.0

    def deliver(self, events: Sequence[Event]) -> None:
        """Take events of a source. Called on the event loop; returns at once."""
        changes = self._state.apply(events)
        self._record.delivered()
        for refused in changes.refused:
            kind = str(refused.key.kind) if refused.key else "unknown"
            self._metrics.refused_objects.labels(kind=kind).inc()
            _log.error("object refused", object=str(refused.key or "?"), reason=refused.reason, origin=refused.origin)
            self._record.trouble("source", f"{refused.key or refused.origin}: {refused.reason}")
        self._count(events)
        self._services |= changes.services
        for service, times in changes.trigger_times.items():
            self._triggers.setdefault(service, []).extend(times)
        if changes.node:
            self._node_changed = True
            self._on_node_change()
        if changes.services or changes.node or (changes.lists_complete and not self._synced_once):
            self.request()

    def request(self) -> None:
        """Ask for a sync, for instance because the node's own facts changed."""
        self._dirty = True
        if self._state.lists_complete:
            self._health.queued()
        self._metrics.last_queued.set_to_current_time()
        self._wake.set()

    def progress(self) -> Progress:
        """How far it is. Called on the event loop."""
        unprogrammed = {key.name.service for key in self._unprogrammed.rows}
        retry_at = self._retry_at
        return Progress(
            first_done=self._synced_once,
            pending=len(unprogrammed | self._services),
            refused=self._refused,  # never changed, only replaced
            retry_seconds=None if retry_at is None else max(0.0, round(retry_at - time.monotonic(), 1)),
        )

    async def switch(self, programmer: Programmer, min_sync_period: float, *, back: ProgrammerConfig) -> None:
        """Program everything by another programmer, which is prepared, and go on with it: make before break.

        Raises `ProgrammingError` where it cannot; then the one in force, configured as `back`, sets right what was changed.
        """
        done = asyncio.get_running_loop().create_future()
        self._switch = _Switch(programmer, min_sync_period, back, done)
        self._wake.set()
        await done

    async def check(self) -> Sequence[str]:
        """Once synced: program what waits, compare the whole kernel with it, and put right what differs.

        Returns what differed, in words. Raises `ProgrammingError` where one or the other failed.
        """
        done: asyncio.Future[Sequence[str]] = asyncio.get_running_loop().create_future()
        self._checks.append(done)
        self._wake.set()
        return await done

    @property
    def in_sync(self) -> bool:
        """Whether the kernel holds what is wanted, save for what came since the last sync began."""
        return self._synced_once and self._record.sync_error is None

    async def run(self) -> None:
        """Sync until cancelled. The kernel is not touched before the first complete list of both kinds."""
        while True:
            self._wake.clear()
            if self._switch is not None:
                switch, self._switch = self._switch, None
                await self._carry_out(switch)
                continue
            if self._checks and self._synced_once:
                checks, self._checks = self._checks, []
                await self._check(checks)
                continue
            now = time.monotonic()
            sync_at = self._sync_due()
            if sync_at is not None and sync_at <= now:
                await self._sync()
                continue
            if self._synced_once and self._audit_at <= now:
                await self._audit_in_passing()
                self._audit_at = time.monotonic() + _AUDIT_PERIOD
                continue
            deadlines = [at for at in (sync_at, self._audit_at if self._synced_once else None) if at is not None]
            await wait_at_most(self._wake, min(deadlines) - now if deadlines else None)

    def _sync_due(self) -> float | None:
        """When the next sync may start (monotonic seconds); None where there is nothing to do."""
        if not self._state.lists_complete:
            return None
        if self._dirty:
            return self._not_before
        return None if self._retry_at is None else max(self._retry_at, self._not_before)

    async def _carry_out(self, switch: _Switch) -> None:
        before, self._programmer = self._programmer, switch.programmer
        error = await self._sync() if self._synced_once else None
        if error is None:
            self._min_sync_period = switch.min_sync_period
            self.recent.clear()
            if not switch.done.cancelled():
                switch.done.set_result(None)
            return
        self._programmer = before
        before.configure(switch.back)
        self._hold(0.0)
        if not switch.done.cancelled():
            switch.done.set_exception(error)

    async def _check(self, checks: Sequence[asyncio.Future[Sequence[str]]]) -> None:
        error = await self._sync() if self._dirty else None
        differs: Sequence[str] = ()
        if error is None:
            try:
                differs = await self._audit(whole=True)
            except ProgrammingError as failure:
                error = failure
        for done in checks:
            if done.cancelled():
                continue
            if error is None:
                done.set_result(differs)
            else:
                done.set_exception(error)

    async def _audit_in_passing(self) -> None:
        with suppress(ProgrammingError):  # which is said already
            await self._audit()

    async def _audit(self, *, whole: bool = False) -> Sequence[str]:
        """What differs, which is put right. Raises `ProgrammingError` where the kernel cannot be read."""
        try:
            differs = await self._programmer.audit(whole=whole)
        except ProgrammingError as error:
            _log.error("audit failed", error=str(error))
            self._record.trouble("audit", str(error))
            raise
        self._record.audited(differs)
        if differs:
            self._metrics.drift.inc()
            _log.warning("somebody changed what was programmed; putting it back", what=differs)
            await self._sync()
        return differs

    async def _sync(self) -> ProgrammingError | None:
        """Program what changed. An error is said and counted, and the next sync tries again."""
        start = time.monotonic()
        self._dirty = False
        triggers, self._triggers = self._triggers, {}
        changes = ClusterChanges(services=frozenset(self._services), node=self._node_changed)
        self._services, self._node_changed = set(), False
        delta = self._tracker.update(self._state, changes)
        for problem in delta.problems:
            self._metrics.refused_objects.labels(kind="Service").inc()
            _log.error("part of an object refused", service=str(problem.service), field=problem.field, reason=problem.reason)
            self._events.service(problem.service, REFUSED_FIELD, f"{problem.field}: {problem.reason}")
        self._unprogrammed = merge_deltas(self._unprogrammed, delta)
        retry = self._retry_at is not None and start >= self._retry_at
        again = {key: RowChange(None, self._tracker.table.rows.get(key)) for key in self._refused} if retry else {}
        wanted = Delta(
            rows={**again, **self._unprogrammed.rows}, health_checks=self._unprogrammed.health_checks, problems=()
        )
        try:
            result = await self._programmer.apply(self._tracker.table, wanted)
        except ProgrammingError as error:
            self._metrics.restore_failures.inc()
            delay = self._failure_backoff.next()
            self._hold(delay)
            self._record.sync_failed(str(error), delay)
            _log.error("sync failed", error=str(error), retry_seconds=round(delay, 1))
            return error
        programmed, self._unprogrammed = self._unprogrammed, _NOTHING
        self._failure_backoff.reset()
        self._note_refused(result, wanted, retry)
        self._measure(result)
        self._finish(start, result.full, triggers, len(wanted.rows))
        for observer in self._observers:
            observer.programmed(self._tracker.table, programmed)
        return None

    def _hold(self, delay: float) -> None:
        """Come back after `delay` seconds, and not before."""
        self._dirty = True
        self._not_before = time.monotonic() + delay

    def _note_refused(self, result: ApplyResult, wanted: Delta, retried: bool) -> None:
        """Remember who is refused, and when to try them again. A full pass has tried all; else only `wanted` was tried."""
        before = self._refused
        untried = {} if result.full else {key: reason for key, reason in before.items() if key not in wanted.rows}
        self._refused = {**untried, **result.refused}
        for key, reason in self._refused.items():
            if before.get(key) != reason:
                _log.error(
                    "the kernel refuses a ServicePort; all others are programmed", service_port=str(key), reason=reason
                )
                self._events.service(key.name.service, REFUSED_BY_KERNEL, f"{key}: {reason}")
        if not self._refused:
            self._refused_backoff.reset()
            self._retry_at = None
        elif retried or self._retry_at is None or self._refused.keys() - before.keys():
            self._retry_at = time.monotonic() + self._refused_backoff.next()
        self._metrics.refused_service_ports.set(len(self._refused))

    def _measure(self, result: ApplyResult) -> None:
        for family in result.partial_failures:
            self._metrics.partial_restore_failures.of(family).inc()
        self._record.rules.update(result.rules)
        for family, tables in result.rules.items():
            in_force = {table: count.in_force for table, count in tables.items()}
            self._metrics.set_rules(family, in_force, {table: count.written for table, count in tables.items()})
        for family, flows in result.stale_flows.items():
            self._metrics.conntrack_deleted.of(family).inc(flows.deleted)
            self._metrics.conntrack_duration.of(family).observe(flows.seconds)

    def _finish(self, start: float, full: bool, triggers: Mapping[ServiceName, Sequence[str]], rows: int) -> None:
        took = time.monotonic() - start
        self._not_before = start + self._min_sync_period
        metrics = self._metrics
        self._record.synced(took, full, rows)
        metrics.sync.observe(took)
        if rows and not full:
            self.recent.append(took)
        (metrics.full_sync if full else metrics.partial_sync).observe(took)
        metrics.last_sync.set_to_current_time()
        metrics.service_changes_pending.set(0)
        metrics.endpoint_changes_pending.set(0)
        metrics.service_ports.set(len(self._tracker.table.rows))
        now = time.time()
        for times in triggers.values():
            for text in times:
                if (moment := _timestamp(text)) is not None and self._synced_once:
                    metrics.network_programming.observe(max(0.0, now - moment))
        if not self._dirty:
            self._health.programmed()
        if not self._synced_once:
            _log.info("first sync done", service_ports=len(self._tracker.table.rows), seconds=round(took, 3))
        else:
            _log.debug("synced", rows=rows, full=full, seconds=round(took, 4))
        self._synced_once = True
        self.first_sync.set()

    def _count(self, events: Sequence[Event]) -> None:
        objects = [event.object for event in events if isinstance(event, Upserted)]
        services = sum(isinstance(item, Service) for item in objects)
        slices = sum(isinstance(item, EndpointSlice) for item in objects)
        self._metrics.service_changes.inc(services)
        self._metrics.service_changes_pending.inc(services)
        self._metrics.endpoint_changes.inc(slices)
        self._metrics.endpoint_changes_pending.inc(slices)


def _timestamp(text: str) -> float | None:
    """Unix seconds of an RFC 3339 timestamp; None where it is none."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
