"""Owns an API server without etcd behind it: a process that serves objects from a file, as they are, each encoded once.

    python -m hack.bench.static_api --listen 100.64.3.1:6443 OBJECTS    # OBJECTS: JSON, one object in each line

It knows what agents ask for: lists (whole: `limit` is ignored), watches with and without initial events, selectors of labels
and fields, one Node; and PUT, of which watchers are told. It checks nothing and allows everything. Filling a real API
server with thousands of Services takes minutes on an emulated machine; this one is there in seconds, and takes next to no
processor time from the agents that are measured.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from aiohttp import web

from nodeproxy.sandbox.sockets import split_host_port

Object = dict[str, Any]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

KINDS: Final = {
    "Service": "/api/v1/services",
    "Node": "/api/v1/nodes",
    "EndpointSlice": "/apis/discovery.k8s.io/v1/endpointslices",
    "ServiceCIDR": "/apis/networking.k8s.io/v1/servicecidrs",
}
_LIST_ENDS: Final = "k8s.io/initial-events-end"
_PIECE: Final = 1 << 18
_WATCH_SECONDS: Final = 1800.0
_KEEP_ALIVE: Final = 3600.0
_JSON: Final = {"Content-Type": "application/json"}


@dataclass(frozen=True, slots=True)
class _Stored:
    """An object, as it came and encoded."""

    version: int
    item: Object
    body: bytes


class _Selector:
    """A label selector (`a`, `!a`, `a=b`, `a!=b`, joined by commas) and a field selector (`a.b=c`, `a.b!=c`)."""

    def __init__(self, query: Any) -> None:
        self._labels = [_term(text) for text in query.get("labelSelector", "").split(",") if text]
        self._fields = [_term(text) for text in query.get("fieldSelector", "").split(",") if text]

    def accepts(self, stored: _Stored) -> bool:
        """Whether all terms hold."""
        labels = stored.item["metadata"].get("labels") or {}
        for key, wanted, negated in self._labels:
            if (key in labels if wanted is None else labels.get(key) == wanted) == negated:
                return False
        return all((_field(stored.item, path) == wanted) != negated for path, wanted, negated in self._fields)


def _field(item: Any, path: str) -> Any:
    for part in path.split("."):
        item = item.get(part, "")
    return item


def _term(text: str) -> tuple[str, str | None, bool]:
    """(key, value if one is asked for, whether it is negated) of one term."""
    if "!=" in text:
        key, _, value = text.partition("!=")
        return key, value, True
    key, equals, value = text.replace("==", "=").partition("=")
    return key.removeprefix("!"), value if equals else None, key.startswith("!")


class StaticApi:
    """The objects, and the web application that serves them."""

    def __init__(self, objects: Iterable[Object]) -> None:
        self._version = 0
        self._stored: dict[str, dict[tuple[str, str], _Stored]] = {kind: {} for kind in KINDS}
        self._watchers: dict[str, list[asyncio.Queue[_Stored]]] = {kind: [] for kind in KINDS}
        for item in objects:
            self._store(item)

    def application(self) -> web.Application:
        """To be run by aiohttp."""
        app = web.Application()
        for kind, path in KINDS.items():
            app.router.add_get(path, self._collection(kind))
            parent, _, plural = path.rpartition("/")
            app.router.add_put(f"{parent}/namespaces/{{namespace}}/{plural}/{{name}}", self._put)
        app.router.add_get(KINDS["Node"] + "/{name}", self._get_node)
        app.router.add_get("/version", self._get_version)
        app.router.add_post("/{path:.*/events}", self._echo)
        return app

    def _store(self, item: Object) -> _Stored:
        self._version += 1
        meta = {
            "uid": f"00000000-0000-4000-8000-{self._version:012}",
            **item["metadata"],
            "resourceVersion": str(self._version),
        }
        body = msgspec.json.encode({**item, "metadata": meta})
        stored = _Stored(self._version, item, body)
        self._stored[item["kind"]][meta.get("namespace", ""), meta["name"]] = stored
        return stored

    def _collection(self, kind: str) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            selector = _Selector(request.query)
            if request.query.get("watch") in ("1", "true"):
                return await self._watch(request, kind, selector)
            found = b",".join(item.body for item in self._stored[kind].values() if selector.accepts(item))
            head = {
                "kind": f"{kind}List",
                "apiVersion": _api_version(kind),
                "metadata": {"resourceVersion": str(self._version)},
            }
            body = msgspec.json.encode(head).removesuffix(b"}") + b',"items":[' + found + b"]}"
            return web.Response(body=body, headers=_JSON)

        return handle

    async def _watch(self, request: web.Request, kind: str, selector: _Selector) -> web.StreamResponse:
        response = web.StreamResponse(headers=_JSON)
        queue: asyncio.Queue[_Stored] = asyncio.Queue()
        begin = b"".join(self._begin(request, kind, selector))
        self._watchers[kind].append(queue)
        try:
            await response.prepare(request)
            for start in range(0, len(begin), _PIECE):
                await response.write(begin[start : start + _PIECE])
            with suppress(TimeoutError):
                async with asyncio.timeout(float(request.query.get("timeoutSeconds") or _WATCH_SECONDS)):
                    async for item in _taken_from(queue):
                        if selector.accepts(item):
                            await response.write(_event(b"MODIFIED", item.body))
        finally:
            self._watchers[kind].remove(queue)
        return response

    def _begin(self, request: web.Request, kind: str, selector: _Selector) -> Iterator[bytes]:
        """The events that a watch begins with: all objects and the end of the list, or what came after a version."""
        initial = request.query.get("sendInitialEvents") == "true"
        since = 0 if initial else int(request.query.get("resourceVersion") or self._version)
        for item in self._stored[kind].values():
            if item.version > since and selector.accepts(item):
                yield _event(b"ADDED", item.body)
        if initial:
            meta = {"resourceVersion": str(self._version), "annotations": {_LIST_ENDS: "true"}}
            end = {"kind": kind, "apiVersion": _api_version(kind), "metadata": meta}
            yield _event(b"BOOKMARK", msgspec.json.encode(end))

    async def _put(self, request: web.Request) -> web.Response:
        item = msgspec.json.decode(await request.read())
        stored = self._store(item)
        for watcher in self._watchers[item["kind"]]:
            watcher.put_nowait(stored)
        return web.Response(body=stored.body, headers=_JSON)

    async def _get_node(self, request: web.Request) -> web.Response:
        node = self._stored["Node"].get(("", request.match_info["name"]))
        if node is None:
            status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
            return web.json_response(status, status=404)
        return web.Response(body=node.body, headers=_JSON)

    async def _get_version(self, request: web.Request) -> web.Response:
        return web.json_response({"major": "1", "minor": "36", "gitVersion": "v1.36.0"})

    async def _echo(self, request: web.Request) -> web.Response:
        return web.Response(body=await request.read(), status=201, headers=_JSON)


def _event(kind: bytes, body: bytes) -> bytes:
    return b'{"type":"' + kind + b'","object":' + body + b"}\n"


def _api_version(kind: str) -> str:
    return "/".join(KINDS[kind].split("/")[2:-1])


async def _taken_from(queue: asyncio.Queue[_Stored]) -> AsyncIterator[_Stored]:
    while True:
        yield await queue.get()


def read_objects(file: Path) -> Iterator[Object]:
    """The objects of a file, one in each line."""
    with file.open("rb") as lines:
        for line in lines:
            yield msgspec.json.decode(line)


@click.command()
@click.option("--listen", required=True, metavar="ADDRESS:PORT")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def main(listen: str, file: Path) -> None:
    """Serve the objects of FILE until terminated. It listens once all are read."""
    address, port = split_host_port(listen)
    app = StaticApi(read_objects(file)).application()
    web.run_app(app, host=address, port=port, print=None, access_log=None, keepalive_timeout=_KEEP_ALIVE)


if __name__ == "__main__":
    main()
