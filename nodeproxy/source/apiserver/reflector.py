"""Owns keeping one kind in step with the API server: list, watch, resume, relist, and patience when it does not answer.

The states are two. Without a resource version a complete list is needed: streamed by a watch that begins with all objects
(KEP-3157) or, where the server refuses that, in pages. With one, a watch goes on from it. The server's 410 Gone is the way
back.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing

import structlog

from nodeproxy.source.apiserver.connection import Cancel, Connection, RequestError, StatusError
from nodeproxy.source.apiserver.credentials import CredentialsError
from nodeproxy.source.apiserver.known import Known
from nodeproxy.source.apiserver.observer import Observer
from nodeproxy.source.apiserver.retrying import Patience, again_and_again
from nodeproxy.source.apiserver.threads import in_thread
from nodeproxy.source.apiserver.wire import (
    Bookmark,
    Gone,
    Item,
    Opened,
    Present,
    Resource,
    Restarted,
    Unreadable,
    list_all,
    watch,
)
from nodeproxy.source.events import Deliver, Event

_WATCH_SECONDS = (300, 600)  # as client-go: spread out, so that not all clients come back at once
_HEALTHY_SECONDS = 1.0  # a request that was served for this long is no failure, however it ended
_MAX_UNFINISHED_LISTS = 2

# What servers answer that do not know streamed lists: 422 those with the feature gate off, the others old ones and proxies.
_NO_STREAMED_LIST = frozenset({400, 404, 405, 406, 415, 422, 501})

_log = structlog.get_logger(__name__)


class Reflector:
    """Delivers the changes of one kind until cancelled."""

    def __init__(
        self, resource: Resource, connection: Connection, deliver: Deliver, observer: Observer, *, streamed_list: bool = True
    ) -> None:
        self._resource = resource
        self._connection = connection
        self._deliver = deliver
        self._observer = observer
        self._streamed_list = streamed_list
        self._unfinished_lists = 0
        self._version: str | None = None
        self._listed_at = 0.0
        self._known = Known(resource.kind, f"API server, {resource.path}")
        self._complaint: str | None = None
        self._log = _log.bind(kind=str(resource.kind))

    async def run(self) -> None:
        """Deliver events in batches until cancelled; failures are logged and retried."""
        await again_and_again(self._serve_once, Patience)

    async def _serve_once(self) -> None:
        """One request to its end. Raises what is to be retried later; returns where the next request may follow at once."""
        started = time.monotonic()
        listing = self._version is None
        in_pages = listing and not self._streamed_list
        opened_at: float | None = None
        try:
            if listing:
                self._known.begin_list()
            async with aclosing(self._request(in_pages)) as batches:
                async for batch in batches:
                    if opened_at is None:
                        opened_at = time.monotonic()
                        self._opened(in_pages)
                    self._take(batch, started)
        except (RequestError, CredentialsError) as error:
            await self._failed(error, listing, in_pages, opened_at)
        else:
            self._ended(in_pages, opened_at)

    def _request(self, in_pages: bool) -> AsyncGenerator[list[Item], None]:
        name = f"{self._resource.kind}-{'list' if in_pages else 'watch'}"
        version, seconds = self._version, random.randint(*_WATCH_SECONDS)

        def pages(cancel: Cancel) -> Iterator[Item]:
            return list_all(self._connection, self._resource, cancel)

        def follow(cancel: Cancel) -> Iterator[Item]:
            return watch(self._connection, self._resource, cancel, version=version, seconds=seconds)

        produce: Callable[[Cancel], Iterator[Item]] = pages if in_pages else follow
        return in_thread(produce, name)

    def _opened(self, in_pages: bool) -> None:
        if not in_pages:
            self._observer.watch_started(self._resource.kind)
        if self._complaint is not None:
            self._log.info("API server answers again")
            self._complaint = None

    def _take(self, batch: list[Item], started: float) -> None:
        """Deliver what a batch changes."""
        events: list[Event] = []
        known = self._known
        for item in batch:
            event: Event | None = None
            match item:
                case Present():
                    event = known.present(item)
                case Gone():
                    event = known.gone(item)
                case Unreadable():
                    event = known.unreadable(item)
                    self._observer.refused(self._resource.kind)
                case Bookmark():
                    if item.ends_list and known.listing:
                        count, ending = known.end_list()
                        self._listed_at = time.monotonic()
                        events.extend(ending)
                        self._unfinished_lists = 0
                        self._observer.listed(self._resource.kind, count, time.monotonic() - started)
                        self._log.debug("listed", objects=count, version=item.version)
                    if not known.listing:
                        self._version = item.version
                    continue
                case Restarted():
                    known.begin_list()
                    continue
                case Opened():
                    continue
            if event is not None:
                events.append(event)
            # While a list comes in, its objects have older versions than it has itself.
            if item.version is not None and not known.listing:
                self._version = item.version
        if events:
            self._deliver(events)

    def _ended(self, in_pages: bool, opened_at: float | None) -> None:
        """The answer ended without an error: a list that is complete, or a watch whose time is up."""
        if in_pages:
            return
        self._observer.watch_ended(self._resource.kind, None)
        if self._known.listing:
            # A server that ignores `sendInitialEvents` never ends the list.
            self._unfinished_lists += 1
            if self._unfinished_lists >= _MAX_UNFINISHED_LISTS:
                self._streamed_list = False
        if opened_at is None or time.monotonic() - opened_at < _HEALTHY_SECONDS:
            error = RequestError("the server ended the watch at once")
            self._complain(error)
            raise error

    async def _failed(
        self, error: RequestError | CredentialsError, listing: bool, in_pages: bool, opened_at: float | None
    ) -> None:
        """Decide what an error means. Raises it if the next request shall wait."""
        kind = self._resource.kind
        status = error.status if isinstance(error, StatusError) else None
        if opened_at is not None and not in_pages:
            self._observer.watch_ended(kind, str(error))
        if listing and not in_pages and opened_at is None and status in _NO_STREAMED_LIST:
            self._streamed_list = False
            self._log.info("server does not stream lists: listing in pages", error=str(error))
            return
        if status == 410:
            self._log.info("version is no longer known to the server: listing anew", version=self._version)
            self._version = None
            if not listing and time.monotonic() - self._listed_at >= _HEALTHY_SECONDS:
                return  # after an outage the wait for the next attempt may be long by now, and the server does answer
            raise error
        if opened_at is not None and time.monotonic() - opened_at >= _HEALTHY_SECONDS and _is_transport(error):
            self._log.info("connection lost: resuming", error=str(error), version=self._version)
            return
        if opened_at is not None and status is not None:
            # An ERROR event: going on from the same version may meet it again and again. As client-go, list anew.
            self._version = None
        self._observer.request_failed(kind, str(error))
        self._complain(error)
        if status == 401 or isinstance(error, CredentialsError):
            await self._renew_credentials()
        raise error

    def _complain(self, error: Exception) -> None:
        """Warn once for each change of error."""
        text = str(error)
        if text != self._complaint:
            self._complaint = text
            self._log.warning("cannot read from API server, retrying", error=text, path=self._resource.path)

    async def _renew_credentials(self) -> None:
        """Read the credentials again: a token file or certificate may have been replaced since."""
        try:
            await asyncio.to_thread(self._connection.connect)
        except CredentialsError as error:
            self._complain(error)


def _is_transport(error: Exception) -> bool:
    """Whether the connection failed, as opposed to the server saying no."""
    return isinstance(error, RequestError) and not isinstance(error, StatusError)
