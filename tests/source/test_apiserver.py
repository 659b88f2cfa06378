"""The reflectors against a server that does what real ones do only rarely."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import structlog
from aiohttp import web
from tenacity import RetryCallState
from tenacity.wait import wait_base

from nodeproxy.api.objects import TYPE_OF_KIND, ApiObject, Kind, ObjectKey, Service
from nodeproxy.source.apiserver import ApiServerSource, Credentials, reflector
from nodeproxy.source.decoding import read_builtins
from tests.source.fake_apiserver import FakeApiServer, Json, status
from tests.source.manifest_objects import endpoint_slice, node, service
from tests.source.replay import Replay
from tests.source.test_credentials import kubeconfig


class Counts:
    """An observer that counts."""

    def __init__(self) -> None:
        self.lists: Counter[Kind] = Counter()
        self.watches: Counter[Kind] = Counter()
        self.ended: Counter[Kind] = Counter()
        self.failed: list[tuple[Kind, str]] = []
        self.refusals: Counter[Kind] = Counter()

    def listed(self, kind: Kind, objects: int, seconds: float) -> None:
        self.lists[kind] += 1

    def watch_started(self, kind: Kind) -> None:
        self.watches[kind] += 1

    def watch_ended(self, kind: Kind, error: str | None) -> None:
        self.ended[kind] += 1

    def request_failed(self, kind: Kind, error: str) -> None:
        self.failed.append((kind, error))

    def refused(self, kind: Kind) -> None:
        self.refusals[kind] += 1


class Run:
    """A running source."""

    def __init__(self, source: ApiServerSource, counts: Counts) -> None:
        self.replay = Replay()
        self.counts = counts
        self.task = asyncio.create_task(source.run(self.replay))


@asynccontextmanager
async def running(
    server: FakeApiServer, *, credentials: Credentials | None = None, streamed: bool = True, proxy_name: str | None = None
) -> AsyncIterator[Run]:
    counts = Counts()
    chosen = credentials or Credentials(master=server.url)
    run = Run(ApiServerSource(chosen, "here", proxy_name, observer=counts, streamed_list=streamed), counts)
    try:
        yield run
        assert not run.task.done(), run.task
        assert not run.replay.redundant
    finally:
        run.task.cancel()
        with suppress(asyncio.CancelledError):
            await run.task


@pytest.fixture
async def server() -> AsyncIterator[FakeApiServer]:
    async with FakeApiServer().serving() as fake:
        yield fake


@pytest.fixture(params=[True, False], ids=["streamed", "paged"])
def streamed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def key(name: str) -> ObjectKey:
    return ObjectKey(Kind.SERVICE, "shop", name)


def stored(server: FakeApiServer, kind: Kind = Kind.SERVICE) -> dict[ObjectKey, ApiObject]:
    objects = [read_builtins(obj, TYPE_OF_KIND[kind]) for obj in server.objects(kind)]
    return {obj.key: obj for obj in objects}


def known(run: Run, kind: Kind = Kind.SERVICE) -> dict[ObjectKey, ApiObject]:
    return {name: obj for name, obj in run.replay.objects.items() if name.kind is kind}


async def in_step(run: Run, server: FakeApiServer, seconds: float = 10) -> None:
    await run.replay.until(lambda: all(known(run, kind) == stored(server, kind) for kind in Kind), seconds)


async def test_list_then_watch(server: FakeApiServer, streamed: bool) -> None:
    for i in range(1200):
        server.put(service(f"s{i}"))
    server.put(endpoint_slice("s1", ["10.0.0.1"]))
    server.put(node("here"))
    async with running(server, streamed=streamed) as run:
        await run.replay.synced()
        assert run.replay.complete == dict.fromkeys(Kind, 1)
        await in_step(run, server)
        server.put(service("s1", 81))
        server.remove(service("s2"))
        server.put(service("new"))
        await in_step(run, server)
        assert run.replay.upserts[key("s1")] == 2
        assert run.replay.deletes == {key("s2"): 1}
        assert run.counts.lists == run.counts.watches == dict.fromkeys(Kind, 1)
    if streamed:
        assert [r.get("sendInitialEvents") for r in server.requests[Kind.SERVICE]] == ["true"]
    else:
        assert [r.get("limit") for r in server.requests[Kind.SERVICE]] == ["500", "500", "500", None]


async def test_requests(server: FakeApiServer) -> None:
    async with running(server) as run:
        await run.replay.synced()
    for kind in (Kind.SERVICE, Kind.ENDPOINT_SLICE):
        (query,) = server.requests[kind]
        assert query["labelSelector"] == "!service.kubernetes.io/service-proxy-name,!service.kubernetes.io/headless"
        assert "resourceVersion" not in query
        assert {
            "watch": "true",
            "sendInitialEvents": "true",
            "resourceVersionMatch": "NotOlderThan",
        }.items() <= query.items()
        assert query["allowWatchBookmarks"] == "true"
        assert 300 <= int(query["timeoutSeconds"]) <= 600
    assert server.requests[Kind.NODE][0]["fieldSelector"] == "metadata.name=here"
    assert "labelSelector" not in server.requests[Kind.NODE][0]


async def test_service_proxy_name_in_the_selector(server: FakeApiServer) -> None:
    async with running(server, proxy_name="mine", streamed=False) as run:
        await run.replay.synced()
    for query in server.requests[Kind.SERVICE]:
        assert query["labelSelector"] == "service.kubernetes.io/service-proxy-name=mine,!service.kubernetes.io/headless"


@pytest.mark.parametrize("code", [400, 404, 422])
async def test_server_that_refuses_streamed_lists(server: FakeApiServer, code: int) -> None:
    server.put(service("a"))
    server.faults[Kind.SERVICE].append(status(code, "sendInitialEvents is forbidden"))
    async with running(server) as run:
        await run.replay.synced()
        await in_step(run, server)
        await server.watched(Kind.SERVICE, 3)
        server.forget()
        server.cut(Kind.SERVICE)
        await run.replay.until(lambda: True)
        server.put(service("b"))
        await in_step(run, server)
        assert not [error for kind, error in run.counts.failed if "forbidden" in error]
    streams = ["sendInitialEvents" in query for query in server.requests[Kind.SERVICE]]
    assert streams.count(True) == 1, "remembered"


async def test_server_that_never_ends_the_initial_events(server: FakeApiServer) -> None:
    server.put(service("a"))

    async def plain_watch(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await asyncio.sleep(0.01)
        return response

    server.faults[Kind.SERVICE].extend([plain_watch, plain_watch])
    async with running(server) as run:
        await run.replay.synced()
        await in_step(run, server)
    assert "limit" in server.requests[Kind.SERVICE][2]


async def test_continuation_expires_while_paging(server: FakeApiServer) -> None:
    for i in range(700):
        server.put(service(f"s{i}"))
    first = service("s0", 99)

    async def expired(request: web.Request) -> web.StreamResponse:
        server.put(first)  # listed already: changed before the relist
        server.remove(service("s1"))
        server.forget()
        return await status(410, "continue is too old")(request)

    async def page(request: web.Request) -> web.StreamResponse:
        return server._list(Kind.SERVICE, dict(request.query))

    server.faults[Kind.SERVICE].extend([page, expired])
    async with running(server, streamed=False) as run:
        await run.replay.synced()
        await in_step(run, server)
        assert run.counts.lists[Kind.SERVICE] == 1
        assert not run.replay.complete.total() > len(Kind)
    assert "limit" not in server.requests[Kind.SERVICE][2]


@pytest.mark.parametrize("how", ["http", "event"])
async def test_gone_leads_to_a_relist_of_what_differs(server: FakeApiServer, streamed: bool, how: str) -> None:
    for i in range(50):
        server.put(service(f"s{i}"))
    async with running(server, streamed=streamed) as run:
        await run.replay.synced()
        await in_step(run, server)
        await server.watched(Kind.SERVICE, 1 if streamed else 2)
        events = run.replay.events

        async def gone(request: web.Request) -> web.StreamResponse:
            server.remove(service("s3"))
            server.put(service("s4", 99))
            server.put(service("new"))
            server.forget()
            if how == "http":
                return await status(410)(request)
            response = web.StreamResponse()
            await response.prepare(request)
            error = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old", "reason": "Expired"}}
            await response.write(json.dumps(error).encode() + b"\n")
            return response

        server.faults[Kind.SERVICE].append(gone)
        server.cut(Kind.SERVICE)
        await run.replay.until(lambda: key("new") in run.replay.objects and key("s3") not in run.replay.objects)
        await in_step(run, server)
        assert run.replay.events == events + 3
        assert run.counts.lists[Kind.SERVICE] == 2
        assert run.replay.complete[Kind.SERVICE] == 1


async def test_gone_after_an_outage_is_followed_by_a_list_at_once(
    server: FakeApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait for the next attempt has grown with the outage, but a server that says "too old" is there again."""
    waits = 0

    class Counted(wait_base):
        def __call__(self, state: RetryCallState) -> float:
            nonlocal waits
            waits += 1
            return 0.01

    monkeypatch.setattr(reflector, "Patience", Counted)
    monkeypatch.setattr(reflector, "_HEALTHY_SECONDS", 0.0)
    server.put(service("a"))
    async with running(server) as run:
        await run.replay.synced()
        await in_step(run, server)
        server.faults[Kind.SERVICE].extend([status(503), status(503), status(410)])
        server.put(service("b"))
        server.remove(service("a"))  # known to be gone only when the list ends
        server.cut(Kind.SERVICE)
        await in_step(run, server)
        assert run.counts.lists[Kind.SERVICE] == 2
        assert waits == 2


async def test_cut_watch_resumes_where_it_was(server: FakeApiServer) -> None:
    server.put(service("a"))
    async with running(server) as run:
        await run.replay.synced()
        version = server.put(service("b"))
        await in_step(run, server)
        await asyncio.sleep(1.0)
        server.cut(Kind.SERVICE)
        server.put(service("c"))
        await in_step(run, server)
        assert server.requests[Kind.SERVICE][1]["resourceVersion"] == str(version)
        server.bookmark(Kind.SERVICE, 5000)
        server.version = 5000
        server.put(service("d"))
        await in_step(run, server)
        server.bookmark(Kind.SERVICE, 6000)
        server.version = 6000
        await asyncio.sleep(1.0)
        server.cut(Kind.SERVICE)
        await server.watched(Kind.SERVICE, 3)
        assert server.requests[Kind.SERVICE][2]["resourceVersion"] == "6000", "the bookmark's"
        server.put(service("e"))
        await in_step(run, server)
        assert run.counts.lists[Kind.SERVICE] == 1


async def test_cut_in_the_middle_of_a_line_and_of_a_list(server: FakeApiServer) -> None:
    for i in range(20):
        server.put(service(f"s{i}"))
    line = json.dumps({"type": "ADDED", "object": server.objects(Kind.SERVICE)[0]}).encode() + b"\n"

    async def half(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(line + line[: len(line) // 2])
        await asyncio.sleep(0.05)
        assert request.transport is not None
        request.transport.close()
        return response

    server.faults[Kind.SERVICE].extend([half, half])
    async with running(server) as run:
        await run.replay.synced()
        await in_step(run, server)
        assert not run.replay.refused
        assert run.replay.upserts[key("s0")] == 1
        assert run.counts.lists[Kind.SERVICE] == 1


async def test_lines_of_every_size_in_pieces_of_every_size(server: FakeApiServer) -> None:
    for i in range(40):
        server.put(service(f"s{i}", annotations={"x": "y" * (i * 5000)}))
    text = b"".join(json.dumps({"type": "ADDED", "object": obj}).encode() + b"\n" for obj in server.objects(Kind.SERVICE))
    end = {"resourceVersion": str(server.version), "annotations": {"k8s.io/initial-events-end": "true"}}
    text += json.dumps({"type": "BOOKMARK", "object": {"metadata": end}}).encode() + b"\n"

    async def pieces(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        position, size = 0, 1
        while position < len(text):
            await response.write(text[position : position + size])
            position += size
            size = size * 3 % 100_003
        await asyncio.sleep(5)
        return response

    server.faults[Kind.SERVICE].append(pieces)
    async with running(server) as run:
        await run.replay.synced()
        await in_step(run, server)


def _broken(name: str) -> Json:
    return service(name, port="http")


async def test_malformed_objects_are_named_and_the_stream_goes_on(server: FakeApiServer, streamed: bool) -> None:
    server.put(service("a"))
    server.put(_broken("b"))
    server.put(service("c"))
    async with running(server, streamed=streamed) as run:
        replay = run.replay
        await replay.synced()
        assert replay.names() == {"a", "c"}
        (refusal,) = replay.refused
        assert (refusal.key, refusal.reason) == (key("b"), "spec.ports[0].port: Expected `int`, got `str`")
        assert "/api/v1/services" in refusal.origin
        server.put(_broken("c"))  # what was known stays
        server.put({"kind": "Service", "metadata": {"name": "d", "labels": 7}})
        server.put(service("e"))
        await replay.until(lambda: "e" in replay.names())
        assert [r.key for r in replay.refused] == [key("b"), key("c"), ObjectKey(Kind.SERVICE, "default", "d")]
        assert replay.names() == {"a", "c", "e"}
        server.put(service("b"))
        server.remove(service("c"))
        await replay.until(lambda: replay.names() == {"a", "b", "e"})
        assert run.counts.refusals[Kind.SERVICE] == 3
        refused = len(replay.refused)
        server.forget()
        server.cut(Kind.SERVICE)
        server.put(service("f"))
        await replay.until(lambda: "f" in replay.names())
        assert len(replay.refused) == refused, "the same versions are not refused again by a relist"


async def test_lines_that_are_no_objects(server: FakeApiServer) -> None:
    server.put(service("a"))
    version = server.version
    lines = [
        b"not json",
        b'{"type": "ADDED"}',
        b'{"type": "WEIRD", "object": {}}',
        b'{"type": "ADDED", "object": [1]}',
        b'{"type": "DELETED", "object": {"metadata": {"name": 5}}}',
        b'{"type": "ADDED", "object": {"metadata": {"name": "\xff"}}}',
        b'{"type": "ADDED", "object": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"type": "BOOKMARK", "object": {}}',
        json.dumps({"type": "ADDED", "object": service("z", resourceVersion=str(version + 5))}).encode(),
    ]

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"\n".join(lines) + b"\n")
        await asyncio.sleep(5)
        return response

    async with running(server) as run:
        await run.replay.synced()
        server.faults[Kind.SERVICE].append(answer)
        await asyncio.sleep(1.0)
        server.cut(Kind.SERVICE)
        await run.replay.until(lambda: "z" in run.replay.names())
        assert len(run.replay.refused) == len(lines) - 1
        assert all(refusal.key is None and refusal.reason for refusal in run.replay.refused)
        assert run.replay.names() == {"a", "z"}


async def test_retry_after_is_honoured(server: FakeApiServer) -> None:
    server.faults[Kind.SERVICE].append(status(429, "slow down", {"Retry-After": "2"}))
    started = time.monotonic()
    async with running(server) as run:
        await run.replay.synced()
        assert time.monotonic() - started >= 2.0
        assert len(server.requests[Kind.SERVICE]) == 2


async def test_failures_back_off_and_are_logged_once_for_each_change(server: FakeApiServer) -> None:
    server.faults[Kind.SERVICE].extend([status(403, "forbidden: rbac")] * 3 + [status(500, "etcd")] * 2)
    with structlog.testing.capture_logs() as logs:
        async with running(server) as run:
            await run.replay.synced(30)
            assert [error for _, error in run.counts.failed] == ["403: forbidden: rbac"] * 3 + ["500: etcd"] * 2
    warnings = [entry["error"] for entry in logs if entry["log_level"] == "warning"]
    assert warnings == ["403: forbidden: rbac", "500: etcd"]
    assert [entry["event"] for entry in logs if entry["log_level"] == "info"] == ["API server answers again"]


async def test_watch_that_ends_at_once_is_not_asked_for_in_a_tight_loop(server: FakeApiServer) -> None:
    async def nothing(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        return response

    async with running(server) as run:
        await run.replay.synced()
        server.faults[Kind.SERVICE].extend([nothing] * 1000)
        server.cut(Kind.SERVICE)
        await asyncio.sleep(3)
        assert 2 <= len(server.requests[Kind.SERVICE]) <= 25


async def test_new_token_is_read_after_401(server: FakeApiServer, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("old")
    (tmp_path / "config").write_text(kubeconfig(server.url, {"tokenFile": str(tmp_path / "token")}))

    async def unauthorized(request: web.Request) -> web.StreamResponse:
        (tmp_path / "token").write_text("new\n")
        return await status(401, "Unauthorized")(request)

    server.faults[Kind.SERVICE].append(unauthorized)
    async with running(server, credentials=Credentials(tmp_path / "config")) as run:
        await run.replay.synced()
        assert server.tokens[0] == "Bearer old"
        assert server.tokens[-1] == "Bearer new"


@pytest.mark.parametrize("phase", ["before the header", "in the stream", "refused"])
async def test_cancellation_is_prompt(server: FakeApiServer, phase: str) -> None:
    async def silent(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        raise AssertionError

    if phase == "before the header":
        for kind in Kind:
            server.faults[kind].append(silent)
    master = "http://127.0.0.1:1" if phase == "refused" else server.url
    task = asyncio.create_task(ApiServerSource(Credentials(master=master), "here").run(Replay()))
    await asyncio.sleep(1.5)
    started = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - started < 5, "nobody waits for the server, which is silent for 60 s"
    if phase == "in the stream":
        await asyncio.sleep(0.3)
        assert not [thread.name for thread in threading.enumerate() if thread.name.endswith("-watch")]


async def test_objects_equal_those_decoded_at_once(server: FakeApiServer) -> None:
    """Random changes, cuts and compactions: what was delivered adds up to what is there."""
    import random

    rng = random.Random(4)
    async with running(server) as run:
        await run.replay.synced()
        for _ in range(300):
            name = f"s{rng.randrange(20)}"
            match rng.randrange(12):
                case 0:
                    server.cut(Kind.SERVICE)
                case 1:
                    server.forget()
                case 2 | 3 | 4:
                    if any(obj["metadata"]["name"] == name for obj in server.objects(Kind.SERVICE)):
                        server.remove(service(name))
                case _:
                    server.put(service(name, rng.randrange(1, 9)))
            if rng.random() < 0.3:
                await asyncio.sleep(0.005)
        server.put(service("last"))
        await in_step(run, server, 60)
        found = run.replay.objects[key("last")]
        assert isinstance(found, Service)
