"""Owns the way of an agent to the ProxyNode of its node: what it says now and from now on, and writing its status.

One object is followed, and few clusters have any: so there is no store, every request begins with a list of that one object,
and a server without the resource is asked again a few times soon, as one that starts may know it, or our rights, a moment
later, and then once in a minute or so.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from typing import Any, Final, TypeVar

import msgspec
import structlog
from msgspec import Struct, field
from tenacity import RetryCallState

from nodeproxy.api.proxy_node import PROXY_NODES, ProxyNode
from nodeproxy.source.apiserver.connection import Cancel, Connection, RequestError, StatusError
from nodeproxy.source.apiserver.credentials import Credentials, CredentialsError
from nodeproxy.source.apiserver.retrying import Patience, again_and_again, failure
from nodeproxy.source.apiserver.threads import call_in_thread, in_thread
from nodeproxy.source.apiserver.wire import Line, lines_of, status_error
from nodeproxy.source.decoding import DECODE_ERRORS, explain, read_json

_log = structlog.get_logger(__name__)

_WATCH_SECONDS: Final = (300, 600)
_WATCH_SLACK_SECONDS: Final = 30.0
_SOON_SECONDS: Final = (1.0, 4.0)
_SOON: Final = 3
"""So many times it is asked again soon."""
_ABSENT_SECONDS: Final = (45.0, 75.0)
_CONFIRM_SECONDS: Final = 5.0
_HEALTHY_SECONDS: Final = 1.0
_REFUSED: Final = (403, 404)
_MERGE_PATCH: Final = "application/merge-patch+json"

T = TypeVar("T")
Deliver = Callable[[ProxyNode | None], None]


class _ListMeta(Struct):
    resource_version: str = field(name="resourceVersion")


class _List(Struct):
    metadata: _ListMeta
    items: list[msgspec.Raw] = []


class ProxyNodes:
    """Reads the ProxyNode of one name, and writes its status. A server without that resource has none."""

    def __init__(self, credentials: Credentials, name: str) -> None:
        self._connection = Connection(credentials)
        self._connected = False
        self._connecting = threading.Lock()
        self._name = name
        self._said: str | None = None
        self._known: ProxyNode | None = None

    async def look(self) -> ProxyNode | None:
        """The object as it is now, None where there is none. Raises RequestError, CredentialsError."""
        try:
            _, found = await call_in_thread(self._list, "proxynode-list")
        except StatusError as error:
            if error.status in _REFUSED:
                return None
            raise
        return found

    async def follow(self, deliver: Deliver) -> None:
        """Deliver the object as it is, and each time that it changed; None: there is none (any more). Until cancelled.

        While the server does not answer, or refuses, what was delivered last stays.
        """
        await again_and_again(lambda: self._follow_once(deliver), _Patience)

    async def write_status(self, status: dict[str, Any]) -> ProxyNode:
        """Write the fields of a status, of JSON's types; None removes one. Returns the object as it is then.

        Raises RequestError, CredentialsError; StatusError 404 where there is no such object.
        """
        body = msgspec.json.encode({"status": status})

        def write(cancel: Cancel) -> bytes:
            path = f"{PROXY_NODES}/{self._name}/status"
            return self._do(lambda: self._connection.send("PATCH", path, cancel, body=body, content_type=_MERGE_PATCH))

        answer = await call_in_thread(write, "proxynode-status")
        try:
            return read_json(answer, ProxyNode)
        except DECODE_ERRORS as error:
            raise RequestError(f"the answer cannot be read: {explain(error)}") from error

    async def _follow_once(self, deliver: Deliver) -> None:
        """One list and one watch. Raises what is to be tried again later; returns where the next may follow at once."""
        opened: float | None = None
        try:
            async with aclosing(in_thread(self._list_and_watch, "proxynode-watch")) as batches:
                async for batch in batches:
                    opened = time.monotonic() if opened is None else opened
                    self._said, self._known = None, batch[-1]  # the last counts
                    deliver(self._known)
        except (RequestError, CredentialsError) as error:
            if opened is not None and time.monotonic() - opened >= _HEALTHY_SECONDS:
                return
            await self._note(error, deliver)
            raise
        if opened is None or time.monotonic() - opened < _HEALTHY_SECONDS:
            raise RequestError("the server ended the watch at once")

    async def _note(self, error: RequestError | CredentialsError, deliver: Deliver) -> None:
        """Say what keeps us from following, once for each change of it."""
        status = error.status if isinstance(error, StatusError) else None
        if status == 404 and self._known is not None and await self._is_gone():
            self._known = None
            deliver(None)
        text = "" if status == 404 else str(error)
        if text == self._said:
            return
        self._said = text
        if status == 404:
            _log.debug("the API server has no ProxyNodes")
        elif status == 403:
            _log.info("may not read ProxyNodes, so that no roll-out reaches this node", error=text)
        else:
            _log.info("cannot follow the ProxyNode; what it said last stays in force", error=text)

    async def _is_gone(self) -> bool:
        """Whether the resource is not there a while later either: a server that starts may not know all of them yet."""
        await asyncio.sleep(_CONFIRM_SECONDS)
        try:
            await call_in_thread(self._list, "proxynode-list")
        except StatusError as error:
            return error.status == 404
        except (RequestError, CredentialsError):
            return False
        return False

    def _list(self, cancel: Cancel) -> tuple[str, ProxyNode | None]:
        """Its version and the object."""
        query = {"fieldSelector": f"metadata.name={self._name}"}
        answer = self._do(lambda: self._connection.send("GET", PROXY_NODES, cancel, query=query))
        try:
            found = read_json(answer, _List)
            return found.metadata.resource_version, read_json(found.items[0], ProxyNode) if found.items else None
        except DECODE_ERRORS as error:
            raise RequestError(f"the ProxyNode cannot be read: {explain(error)}") from error

    def _list_and_watch(self, cancel: Cancel) -> Iterator[ProxyNode | None]:
        version, found = self._list(cancel)
        yield found
        seconds = random.randint(*_WATCH_SECONDS)
        query = {
            "fieldSelector": f"metadata.name={self._name}",
            "watch": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(seconds),
        }
        pieces = self._do(lambda: self._connection.read(PROXY_NODES, query, cancel, seconds + _WATCH_SLACK_SECONDS))
        for line in lines_of(pieces):
            try:
                event = read_json(line, Line)
                match event.type:
                    case "ADDED" | "MODIFIED":
                        yield read_json(event.object, ProxyNode)
                    case "DELETED":
                        yield None
                    case "ERROR":
                        raise status_error(event)
            except DECODE_ERRORS as error:
                raise RequestError(f"the ProxyNode cannot be read: {explain(error)}") from error

    def _do(self, request: Callable[[], T]) -> T:
        """Make a request, with credentials read for the first one and again after they were refused."""
        with self._connecting:
            if not self._connected:
                self._connection.connect()
                self._connected = True
        try:
            return request()
        except StatusError as error:
            if error.status == 401:
                self._connected = False
            raise


class _Patience(Patience):
    """Where there is no such resource, or no right to it: soon at first, then a minute or so. Else as with any resource."""

    def __init__(self) -> None:
        super().__init__()
        self._refused = 0

    def __call__(self, retry_state: RetryCallState) -> float:
        error = failure(retry_state)
        if isinstance(error, StatusError) and error.status in _REFUSED:
            self._refused += 1
            return random.uniform(*(_SOON_SECONDS if self._refused <= _SOON else _ABSENT_SECONDS))
        return super().__call__(retry_state)
