"""Owns a small API server with faults on demand, for what a real one cannot be made to do.

It keeps objects as given (malformed ones too), lists them in pages, watches with initial events and bookmarks, and remembers
all requests. A fault is a handler that answers one request of a path in place of the server.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from aiohttp import web

from nodeproxy.api.objects import Kind

Json = dict[str, Any]
Fault = Callable[[web.Request], Awaitable[web.StreamResponse]]

PATHS = {
    Kind.SERVICE: "/api/v1/services",
    Kind.ENDPOINT_SLICE: "/apis/discovery.k8s.io/v1/endpointslices",
    Kind.NODE: "/api/v1/nodes",
}


def status(code: int, message: str = "no", headers: dict[str, str] | None = None) -> Fault:
    """A fault: this HTTP status."""

    async def answer(_: web.Request) -> web.StreamResponse:
        return web.json_response({"kind": "Status", "code": code, "message": message}, status=code, headers=headers)

    return answer


class FakeApiServer:
    """The server; `url` is where it listens once `serving` was entered."""

    def __init__(self) -> None:
        self.url = ""
        self.streamed_lists = True
        self.requests: dict[Kind, list[dict[str, str]]] = defaultdict(list)
        self.tokens: list[str | None] = []
        self.faults: dict[Kind, deque[Fault]] = defaultdict(deque)
        self.version = 100
        self._objects: dict[Kind, dict[tuple[str, str], Json]] = defaultdict(dict)
        self._history: dict[Kind, list[tuple[int, Json]]] = defaultdict(list)
        self._oldest = 0
        self._watchers: dict[Kind, set[web.StreamResponse]] = defaultdict(set)
        self._transports: dict[Kind, set[asyncio.Transport]] = defaultdict(set)
        self._changed = asyncio.Event()

    # What happens in the cluster

    def put(self, obj: Json) -> int:
        """Create or change an object; returns its version."""
        self.version += 1
        kind, name = Kind(obj["kind"]), self._name(obj)
        stored = {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(self.version)}}
        event = "MODIFIED" if name in self._objects[kind] else "ADDED"
        self._objects[kind][name] = stored
        self._record(kind, {"type": event, "object": stored})
        return self.version

    def remove(self, obj: Json) -> None:
        """Delete an object."""
        self.version += 1
        kind = Kind(obj["kind"])
        stored = self._objects[kind].pop(self._name(obj))
        stored = {**stored, "metadata": {**stored["metadata"], "resourceVersion": str(self.version)}}
        self._record(kind, {"type": "DELETED", "object": stored})

    def bookmark(self, kind: Kind, version: int | None = None) -> None:
        """Tell watchers of a kind how far they are."""
        metadata = {"resourceVersion": str(version or self.version), "creationTimestamp": None}
        self._record(kind, {"type": "BOOKMARK", "object": {"kind": str(kind), "metadata": metadata}}, version=0)

    def forget(self) -> None:
        """Compact: all versions before now are Gone."""
        self._oldest = self.version + 1
        self.version += 1

    def cut(self, kind: Kind) -> None:
        """Break the connections of all watches of a kind."""
        for transport in self._transports.pop(kind, set()):
            transport.abort()

    async def watched(self, kind: Kind, count: int) -> None:
        """Wait until so many requests of a kind were made."""
        async with asyncio.timeout(10):
            while len(self.requests[kind]) < count:
                self._changed.clear()
                await self._changed.wait()

    def objects(self, kind: Kind) -> list[Json]:
        """What is there."""
        return list(self._objects[kind].values())

    @staticmethod
    def _name(obj: Json) -> tuple[str, str]:
        return obj["metadata"].get("namespace") or "", obj["metadata"]["name"]

    def _record(self, kind: Kind, event: Json, version: int | None = None) -> None:
        self._history[kind].append((self.version if version is None else version, event))
        self._changed.set()

    # How it answers

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[FakeApiServer]:
        """Listen on a free port of the loopback."""
        app = web.Application()
        for kind, path in PATHS.items():
            app.router.add_get(path, partial(self._answer, kind))
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{port}"
        try:
            yield self
        finally:
            for kind in Kind:
                self.cut(kind)
            await runner.cleanup()

    async def _answer(self, kind: Kind, request: web.Request) -> web.StreamResponse:
        query = dict(request.query)
        self.requests[kind].append(query)
        self.tokens.append(request.headers.get("Authorization"))
        self._changed.set()
        if self.faults[kind]:
            return await self.faults[kind].popleft()(request)
        if "watch" not in query:
            return self._list(kind, query)
        if "sendInitialEvents" in query and not self.streamed_lists:
            return await status(422, "sendInitialEvents is forbidden")(request)
        if int(query.get("resourceVersion", self._oldest)) < self._oldest:
            return await status(410, "too old resource version")(request)
        return await self._watch(kind, request)

    def _list(self, kind: Kind, query: dict[str, str]) -> web.Response:
        start, version = map(int, query.get("continue", f"0-{self.version}").split("-"))
        if version < self._oldest:
            return web.json_response({"kind": "Status", "code": 410, "message": "continue is too old"}, status=410)
        end = start + int(query.get("limit", 1_000_000))
        items = [{k: v for k, v in obj.items() if k not in ("kind", "apiVersion")} for obj in self.objects(kind)]
        metadata = {"resourceVersion": str(version)}
        if end < len(items):
            metadata["continue"] = f"{end}-{version}"
        return web.json_response({"kind": f"{kind}List", "metadata": metadata, "items": items[start:end]})

    async def _watch(self, kind: Kind, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        assert isinstance(request.transport, asyncio.Transport)
        self._transports[kind].add(request.transport)
        position = len(self._history[kind])
        if "sendInitialEvents" in request.query:
            for obj in self.objects(kind):
                await response.write(json.dumps({"type": "ADDED", "object": obj}).encode() + b"\n")
            metadata = {"resourceVersion": str(self.version), "annotations": {"k8s.io/initial-events-end": "true"}}
            bookmark = {"type": "BOOKMARK", "object": {"kind": str(kind), "metadata": metadata}}
            await response.write(json.dumps(bookmark).encode() + b"\n")
        else:
            since = int(request.query["resourceVersion"])
            position = sum(1 for version, _ in self._history[kind] if version <= since)
        while not request.transport.is_closing():
            for _, event in self._history[kind][position:]:
                position += 1
                await response.write(json.dumps(event).encode() + b"\n")
            self._changed.clear()
            if position == len(self._history[kind]):
                await self._changed.wait()
        return response
