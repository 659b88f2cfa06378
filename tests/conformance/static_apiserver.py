"""A small API server that lists and watches objects given as data, without validating them.

Scenes hold objects that a real API server would refuse (a node port of 3001, a load balancer without node ports);
this one serves them as they are: lists, watches with and without `sendInitialEvents`, label selectors and field
selectors. It can be started in any network namespace. Objects may be changed while it runs, and watchers
are told.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from aiohttp import web

from nodeproxy.sandbox.namespace import Namespace

Object = dict[str, Any]
PORT = 8001
KINDS = {  # resource path -> kind
    "/api/v1/services": "Service",
    "/api/v1/nodes": "Node",
    "/apis/discovery.k8s.io/v1/endpointslices": "EndpointSlice",
    "/apis/networking.k8s.io/v1/servicecidrs": "ServiceCIDR",
}


def matches(item: Object, label_selector: str, field_selector: str) -> bool:
    """Whether an object passes a label selector (`a`, `!a`, `a=b`, `a!=b`) and a field selector (`a.b=c`, `a.b!=c`)."""
    labels = item["metadata"].get("labels") or {}
    for term in filter(None, label_selector.split(",")):
        key, value, negated = _term(term)
        found = key.lstrip("!") in labels if value is None else labels.get(key) == value
        if found == (negated or key.startswith("!")):
            return False
    for term in filter(None, field_selector.split(",")):
        key, value, negated = _term(term)
        field: Any = item
        for part in key.split("."):
            field = field.get(part, "")
        if (field == value) == negated:
            return False
    return True


def _term(term: str) -> tuple[str, str | None, bool]:
    """(key, value if any, is it negated with `!=`) of one term of a selector."""
    if "!=" in term:
        key, _, value = term.partition("!=")
        return key, value, True
    key, equals, value = term.replace("==", "=").partition("=")
    return key, value if equals else None, False


class StaticApiServer:
    """Serves `objects` on 127.0.0.1:8001 of the namespace it is started in."""

    def __init__(self, objects: Iterable[Object]) -> None:
        self._version = 0
        self._objects: dict[tuple[str, str, str], Object] = {}
        self._watchers: list[asyncio.Queue[tuple[str, Object]]] = []
        for item in objects:
            self._store(item)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="static-apiserver", daemon=True)

    def _store(self, item: Object) -> tuple[str, Object]:
        self._version += 1
        meta = {"namespace": "", **item["metadata"], "resourceVersion": str(self._version)}
        meta.setdefault("uid", f"00000000-0000-4000-8000-{self._version:012}")
        key = (item["kind"], meta["namespace"], meta["name"])
        event = "MODIFIED" if key in self._objects else "ADDED"
        self._objects[key] = {**item, "metadata": {k: v for k, v in meta.items() if v != ""}}
        return event, self._objects[key]

    def apply(self, item: Object) -> None:
        """Add or change an object, and tell the watchers."""
        self._loop.call_soon_threadsafe(lambda: self._publish(*self._store(item)))

    def delete(self, kind: str, namespace: str, name: str) -> None:
        """Delete an object, and tell the watchers."""
        self._loop.call_soon_threadsafe(lambda: self._publish("DELETED", self._objects.pop((kind, namespace, name))))

    def _publish(self, event: str, item: Object) -> None:
        for watcher in self._watchers:
            watcher.put_nowait((event, item))

    def start(self, sock: socket.socket) -> None:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._serve(sock), self._loop).result(10)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self, sock: socket.socket) -> None:
        app = web.Application()
        for path, kind in KINDS.items():
            app.router.add_get(path, self._collection(kind))
        app.router.add_get("/api/v1/nodes/{name}", self._get_node)
        app.router.add_get("/version", self._get_version)
        app.router.add_route("POST", "/{path:.*/events}", self._echo)
        app.router.add_route("PATCH", "/{path:.*/events/.*}", self._echo)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.SockSite(self._runner, sock).start()

    async def _end(self) -> None:
        await self._runner.cleanup()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _collection(self, kind: str) -> Any:
        async def handle(request: web.Request) -> web.StreamResponse:
            selectors = (request.query.get("labelSelector", ""), request.query.get("fieldSelector", ""))
            if request.query.get("watch", "") not in ("1", "true"):
                items = [o for (of, _, _), o in self._objects.items() if of == kind and matches(o, *selectors)]
                return web.json_response(
                    {
                        "kind": f"{kind}List",
                        "apiVersion": next((o["apiVersion"] for o in items), "v1"),
                        "metadata": {"resourceVersion": str(self._version)},
                        "items": items,
                    }
                )
            return await self._watch(request, kind, selectors)

        return handle

    async def _watch(self, request: web.Request, kind: str, selectors: tuple[str, str]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        queue: asyncio.Queue[tuple[str, Object]] = asyncio.Queue()
        initial = request.query.get("sendInitialEvents") == "true"
        since = 0 if initial else int(request.query.get("resourceVersion") or self._version)
        for item in self._objects.values():
            if int(item["metadata"]["resourceVersion"]) > since:
                queue.put_nowait(("ADDED", item))
        if initial:
            meta = {"resourceVersion": str(self._version), "annotations": {"k8s.io/initial-events-end": "true"}}
            queue.put_nowait(("BOOKMARK", {"kind": kind, "apiVersion": _version_of(kind), "metadata": meta}))
        self._watchers.append(queue)
        await response.prepare(request)
        try:
            while True:
                event, item = await queue.get()
                if item["kind"] == kind and (event == "BOOKMARK" or matches(item, *selectors)):
                    await response.write(json.dumps({"type": event, "object": item}).encode() + b"\n")
        finally:
            self._watchers.remove(queue)

    async def _get_node(self, request: web.Request) -> web.Response:
        node = self._objects.get(("Node", "", request.match_info["name"]))
        if node is None:
            status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
            return web.json_response(status, status=404)
        return web.json_response(node)

    async def _get_version(self, request: web.Request) -> web.Response:
        return web.json_response({"major": "1", "minor": "36", "gitVersion": "v1.36.0"})

    async def _echo(self, request: web.Request) -> web.Response:
        return web.json_response(await request.json(), status=201)


def _version_of(kind: str) -> str:
    path = next(path for path, of in KINDS.items() if of == kind)
    return "/".join(path.split("/")[2:-1])


def _listen() -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", PORT))
    sock.listen()
    return sock


@contextmanager
def serving(where: Namespace, objects: Iterable[Object]) -> Iterator[StaticApiServer]:
    """An API server inside a namespace, at http://127.0.0.1:8001 there."""
    server = StaticApiServer(objects)
    server.start(where.run(_listen))
    try:
        yield server
    finally:
        with suppress(TimeoutError):
            server.stop()
