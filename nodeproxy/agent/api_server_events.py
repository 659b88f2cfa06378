"""Owns the recording of Kubernetes Events at the API server: what is written, how much of it, and patience.

What happens again is no new Event, but a series: its second time is written at once, further ones now and then, and when it
is over (as client-go's tools/events does). New Events about one object are limited by a token bucket (as client-go's spam
filter). Whatever cannot be taken or written is dropped and counted: nothing waits for Events.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, NamedTuple

import structlog
from msgspec.structs import replace
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from nodeproxy.agent.events import action_of
from nodeproxy.agent.metrics import Metrics
from nodeproxy.agent.waiting import wait_at_most
from nodeproxy.forwarding.table import ServiceName
from nodeproxy.source.apiserver.connection import Cancel, RequestError, StatusError
from nodeproxy.source.apiserver.credentials import CredentialsError
from nodeproxy.source.apiserver.event_writer import (
    MAX_INSTANCE_BYTES,
    MAX_NOTE_BYTES,
    Event,
    EventMetadata,
    EventSeries,
    EventWriter,
    ObjectReference,
)
from nodeproxy.source.apiserver.retrying import asked_seconds
from nodeproxy.source.apiserver.threads import call_in_thread

_log = structlog.get_logger(__name__)

_CONTROLLER: Final = "nodeproxy"
_BURST: Final = 25
_TOKEN_SECONDS: Final = 300.0
_MAX_OBJECTS: Final = 4096  # whose tokens are remembered
_MAX_QUEUED: Final = 1000
_MAX_RECORDS: Final = 4096
_LOOK_SECONDS: Final = 60.0  # between looks at the series
_SERIES_ENDS_SECONDS: Final = 360.0
_SERIES_WRITTEN_SECONDS: Final = 1800.0
_ATTEMPTS: Final = 6
_RETRY_SECONDS: Final = (0.5, 10.0)
_TEMPORARY: Final = frozenset({401, 403, 408, 409, 429})  # 403: an API server that starts does not know the roles yet
_MAX_NAME: Final = 230  # of an object, as the beginning of an Event's name


class TokenBuckets:
    """So many Events about one object at once (`burst`), and one more in `seconds`. Remembers the latest objects."""

    def __init__(self, burst: int, seconds: float, objects: int, now: Callable[[], float]) -> None:
        self._burst, self._seconds, self._objects, self._now = burst, seconds, objects, now
        self._buckets: dict[ObjectReference, tuple[float, float]] = {}  # tokens, as of when; the latest used last

    def take(self, reference: ObjectReference) -> bool:
        """Whether there may be one more."""
        now = self._now()
        tokens, then = self._buckets.pop(reference, (float(self._burst), now))
        tokens = min(self._burst, tokens + (now - then) / self._seconds)
        taken = tokens >= 1
        self._buckets[reference] = (tokens - taken, now)
        if len(self._buckets) > self._objects:
            del self._buckets[next(iter(self._buckets))]
        return taken


class _Key(NamedTuple):
    """What makes two happenings the same."""

    regarding: ObjectReference
    reason: str
    note: str
    type: str


class _Record:
    """Something that happened, once or often. Times are Unix seconds.

    `metadata` is None until it is written; `tried` is under which name that was tried, perhaps with success.
    """

    def __init__(self, key: _Key, now: float) -> None:
        self.key = key
        self.first = self.last = now
        self.count = 1
        self.written_count = 0
        self.written = now
        self.metadata: EventMetadata | None = None
        self.tried: EventMetadata | None = None
        self.queued = False


class ApiServerEvents:
    """Records Events about Services and this node. `now` gives Unix seconds."""

    def __init__(self, writer: EventWriter, node_name: str, metrics: Metrics, now: Callable[[], float] = time.time) -> None:
        self._writer = writer
        self._node = ObjectReference("v1", "Node", node_name)
        self._instance = node_name[:MAX_INSTANCE_BYTES]
        self._metrics = metrics
        self._now = now
        self._buckets = TokenBuckets(_BURST, _TOKEN_SECONDS, _MAX_OBJECTS, now)
        self._records: dict[_Key, _Record] = {}  # the latest new one last
        self._queue: deque[_Record] = deque()
        self._wake = asyncio.Event()
        self._complained = False
        self._last_name = 0

    def service(self, name: ServiceName, reason: str, note: str, *, warning: bool = True) -> None:
        """Something happened to a Service on this node."""
        self._add(ObjectReference("v1", "Service", name.name, name.namespace), reason, note, warning)

    def node(self, reason: str, note: str, *, warning: bool = False) -> None:
        """Something happened to this node's Services as a whole."""
        self._add(self._node, reason, note, warning)

    async def run(self) -> None:
        """Write what is recorded, until cancelled."""
        while True:
            self._wake.clear()
            while self._queue:
                record = self._queue.popleft()
                record.queued = False
                await self._write(record)
            await wait_at_most(self._wake, _LOOK_SECONDS if self._records else None)
            self._look()

    def _add(self, regarding: ObjectReference, reason: str, note: str, warning: bool) -> None:
        key = _Key(regarding, reason, _shortened(note), "Warning" if warning else "Normal")
        now = self._now()
        record = self._records.get(key)
        if record is not None:
            record.count += 1
            record.last = now
            if record.count == 2:
                self._enqueue(record)
            return
        if len(self._queue) >= _MAX_QUEUED or not self._buckets.take(regarding):
            self._metrics.events_dropped.inc()
            _log.debug("event dropped: too many", kind=regarding.kind, name=regarding.name, reason=reason)
            return
        record = self._records[key] = _Record(key, now)
        if len(self._records) > _MAX_RECORDS:
            del self._records[next(iter(self._records))]
        self._enqueue(record)

    def _enqueue(self, record: _Record) -> None:
        """Have a record written. One that is in the queue already is written as it is when its turn comes."""
        if not record.queued:
            record.queued = True
            self._queue.append(record)
            self._wake.set()

    def _look(self) -> None:
        """Write series that went on, and forget what is over."""
        now = self._now()
        for key, record in list(self._records.items()):
            ended = now - record.last >= _SERIES_ENDS_SECONDS
            if record.count > record.written_count and (ended or now - record.written >= _SERIES_WRITTEN_SECONDS):
                self._enqueue(record)
            if ended:
                del self._records[key]

    async def _write(self, record: _Record) -> None:
        try:
            async for attempt in _retrying():
                with attempt:
                    await self._try(record)
        except (RequestError, CredentialsError) as error:
            record.written_count, record.written = record.count, self._now()  # not before more is to be said
            self._metrics.events_dropped.inc()
            if not self._complained:
                self._complained = True
                _log.warning("cannot write Kubernetes Events; dropping them", error=str(error))
        else:
            if self._complained:
                self._complained = False
                _log.info("Kubernetes Events can be written again")

    async def _try(self, record: _Record) -> None:
        """Write a record as it is now."""
        count, last = record.count, record.last
        series = EventSeries(count, _micro_time(last)) if count > 1 else None
        if record.metadata is not None and series is not None:
            metadata = record.metadata
            try:
                await call_in_thread(lambda cancel: self._writer.continue_series(metadata, series, cancel), "events")
            except StatusError as error:
                if error.status != 404:
                    raise
                record.metadata = record.tried = None  # Events are kept for an hour or so: begin a new one
        if record.metadata is None:
            await self._create(record, series)
        record.written_count, record.written = count, self._now()

    async def _create(self, record: _Record, series: EventSeries | None) -> None:
        before, metadata = record.tried, record.tried or self._metadata(record.key.regarding)
        record.tried = metadata
        event = Event(
            metadata=metadata,
            event_time=_micro_time(record.first),
            reporting_controller=_CONTROLLER,
            reporting_instance=self._instance,
            action=action_of(record.key.reason),
            reason=record.key.reason,
            regarding=record.key.regarding,
            note=record.key.note,
            type=record.key.type,
            series=series,
        )
        try:
            await call_in_thread(lambda cancel: self._create_with_uid(event, cancel), "events")
        except StatusError as error:
            if error.status != 409:
                raise
            if before is None:  # another node's; else ours, of a try whose answer was lost
                record.tried = None
                raise
        record.metadata = metadata

    def _create_with_uid(self, event: Event, cancel: Cancel) -> None:
        try:
            uid = self._writer.uid(event.regarding, cancel)
        except StatusError as error:
            if _is_temporary(error):
                raise
            uid = ""
        self._writer.create(replace(event, regarding=replace(event.regarding, uid=uid)), cancel)

    def _metadata(self, regarding: ObjectReference) -> EventMetadata:
        """A name of its own for an Event, as client-go makes them: that of the object, and the time."""
        self._last_name = max(time.time_ns(), self._last_name + 1)
        name = f"{regarding.name[:_MAX_NAME].rstrip('-.')}.{self._last_name:x}"
        return EventMetadata(name, regarding.namespace or "default")


def _retrying() -> AsyncRetrying:
    """A few times within half a minute or so, where that may help."""
    initial, longest = _RETRY_SECONDS
    backoff = wait_exponential_jitter(multiplier=initial, max=longest, jitter=initial)

    def wait(state: RetryCallState) -> float:
        asked = asked_seconds(state)
        return backoff(state) if asked is None else min(asked, longest)

    return AsyncRetrying(
        stop=stop_after_attempt(_ATTEMPTS),
        wait=wait,
        sleep=asyncio.sleep,
        retry=retry_if_exception(_is_temporary),
        reraise=True,
    )


def _is_temporary(error: BaseException) -> bool:
    if isinstance(error, StatusError):
        return error.status in _TEMPORARY or error.status >= 500
    return isinstance(error, (RequestError, CredentialsError))


def _shortened(note: str) -> str:
    """As much of a note as the API takes."""
    data = note.encode(errors="replace")
    if len(data) <= MAX_NOTE_BYTES:
        return data.decode()
    return data[: MAX_NOTE_BYTES - 3].decode(errors="ignore") + "..."


def _micro_time(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
