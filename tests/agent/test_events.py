"""Kubernetes Events: what is written, that it stays bounded, and that a server that fails holds up nobody.

The server here is a stub that fails on demand; tests/controlplane writes to a real API server.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from structlog.testing import capture_logs

from nodeproxy.agent import api_server_events, events
from nodeproxy.agent.api_server_events import ApiServerEvents, TokenBuckets
from nodeproxy.agent.events import EventRecorder, NoEvents
from nodeproxy.agent.metrics import Metrics
from nodeproxy.forwarding.table import ServiceName
from nodeproxy.source.apiserver.connection import Connection
from nodeproxy.source.apiserver.credentials import Credentials
from nodeproxy.source.apiserver.event_writer import EventWriter, ObjectReference

Json = dict[str, Any]
Fault = Callable[["Server", web.Request, Json], web.StreamResponse | None]
WEB = ServiceName("shop", "web")


def status(code: int, **headers: str) -> Fault:
    return lambda server, request, body: web.json_response({"message": "no"}, status=code, headers=headers)


def answer_lost(server: Server, request: web.Request, body: Json) -> web.StreamResponse | None:
    """The Event is written, but the client does not get to know."""
    server.events[body["metadata"]["name"]] = body
    assert request.transport is not None
    request.transport.close()
    return None


def answer_garbage(server: Server, request: web.Request, body: Json) -> web.StreamResponse:
    return web.Response(text="[")


class Server:
    """As much of an API server as Events need. `faults` answer its next writes."""

    def __init__(self) -> None:
        self.events: dict[str, Json] = {}
        self.writes: list[str] = []
        self.faults: deque[Fault] = deque()
        self.list_faults: deque[Fault] = deque()
        self.token: str | None = None
        self.hangs = False
        self.url = ""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_get("/api/v1/namespaces/{namespace}/services", self._list)
        app.router.add_get("/api/v1/nodes", self._list)
        app.router.add_post("/apis/events.k8s.io/v1/namespaces/{namespace}/events", self._write)
        app.router.add_patch("/apis/events.k8s.io/v1/namespaces/{namespace}/events/{name}", self._write)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield
        finally:
            await runner.cleanup()

    async def _list(self, request: web.Request) -> web.StreamResponse:
        if self.list_faults:
            return self.list_faults.popleft()(self, request, {}) or web.Response()
        name = request.query["fieldSelector"].removeprefix("metadata.name=")
        items = [{"metadata": {"name": name, "uid": f"uid-of-{name}"}}] if name != "absent" else []
        return web.json_response({"items": items})

    async def _write(self, request: web.Request) -> web.StreamResponse:
        if self.hangs:
            await asyncio.sleep(60)
        body = await request.json()
        self.writes.append(request.method)
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"message": "who?"}, status=401)
        if self.faults:
            return self.faults.popleft()(self, request, body) or web.Response()
        name = request.match_info.get("name")
        if name is None:
            name = body["metadata"]["name"]
            if name in self.events:
                return web.json_response({"message": "exists"}, status=409)
            assert body["metadata"]["namespace"] == request.match_info["namespace"]
            self.events[name] = body
            return web.json_response(body, status=201)
        if name not in self.events:
            return web.json_response({"message": "gone"}, status=404)
        self.events[name] |= body
        return web.json_response(self.events[name])


class Recording:
    """A recorder that runs against a server, at a time that stands still."""

    def __init__(self, server: Server, credentials: Credentials | None = None) -> None:
        self.server = server
        self.now = 1_700_000_000.0
        self.metrics = Metrics()
        writer = EventWriter(Connection(credentials or Credentials(master=server.url)))
        self.recorder = ApiServerEvents(writer, "node-1", self.metrics, lambda: self.now)

    @property
    def dropped(self) -> float:
        return self.metrics.registry.get_sample_value("nodeproxy_events_dropped_total") or 0

    async def written(self, count: int) -> list[Json]:
        """Wait until so many writes were asked for and nothing is under way; returns the Events."""
        await until(lambda: len(self.server.writes) >= count)
        await asyncio.sleep(0.05)
        assert len(self.server.writes) == count, self.server.writes
        return list(self.server.events.values())


@asynccontextmanager
async def recording(credentials: Credentials | None = None, server: Server | None = None) -> AsyncIterator[Recording]:
    server = server or Server()
    async with server.serving():
        made = Recording(server, credentials)
        task = asyncio.create_task(made.recorder.run())
        try:
            yield made
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_server_events, "_RETRY_SECONDS", (0.01, 0.02))
    monkeypatch.setattr(api_server_events, "_LOOK_SECONDS", 0.02)


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not done():  # noqa: ASYNC110 - what is waited for knows nothing of events
            await asyncio.sleep(0.005)


async def test_an_event_has_all_that_the_api_asks_for() -> None:
    async with recording() as made:
        made.recorder.service(WEB, events.REFUSED_FIELD, "spec.ports[0].port: 0 is not in 1-65535")
        made.recorder.node(events.STARTING, "")
        of_service, of_node = await made.written(2)
    name = of_service["metadata"].pop("name")
    assert name.startswith("web.") and name != of_node["metadata"]["name"]
    assert of_service == {
        "metadata": {"namespace": "shop"},
        "eventTime": "2023-11-14T22:13:20.000000Z",
        "reportingController": "nodeproxy",
        "reportingInstance": "node-1",
        "action": "Validate",
        "reason": "FieldRefused",
        "regarding": {
            "apiVersion": "v1",
            "kind": "Service",
            "name": "web",
            "namespace": "shop",
            "uid": "uid-of-web",
        },
        "note": "spec.ports[0].port: 0 is not in 1-65535",
        "type": "Warning",
    }
    assert of_node["metadata"]["namespace"] == "default"
    assert of_node["regarding"] == {"apiVersion": "v1", "kind": "Node", "name": "node-1", "uid": "uid-of-node-1"}
    assert (of_node["type"], of_node["reason"]) == ("Normal", "Starting")


async def test_an_object_that_is_gone_has_no_uid() -> None:
    async with recording() as made:
        made.recorder.service(ServiceName("shop", "absent"), events.REFUSED_FIELD, "x")
        (event,) = await made.written(1)
    assert "uid" not in event["regarding"]


async def test_the_uid_is_asked_for_again_while_roles_are_not_known_yet() -> None:
    async with recording() as made:
        made.server.list_faults.extend([status(403), status(500), answer_garbage])
        made.recorder.service(WEB, events.REFUSED_FIELD, "x")
        made.recorder.service(ServiceName("shop", "other"), events.REFUSED_FIELD, "x")
        first, second = await made.written(2)
    assert "uid" not in first["regarding"], "garbage is taken for nothing"
    assert second["regarding"]["uid"] == "uid-of-other"


async def test_what_happens_again_is_a_series() -> None:
    async with recording() as made:
        made.recorder.service(WEB, events.REFUSED_BY_KERNEL, "why")
        (event,) = await made.written(1)
        assert "series" not in event
        made.now += 10
        made.recorder.service(WEB, events.REFUSED_BY_KERNEL, "why")
        (event,) = await made.written(2)
        assert event["series"] == {"count": 2, "lastObservedTime": "2023-11-14T22:13:30.000000Z"}
        for _ in range(18):  # every 100 s for half an hour
            made.now += 100
            made.recorder.service(WEB, events.REFUSED_BY_KERNEL, "why")
            await asyncio.sleep(0)
        (event,) = await made.written(3)
        assert event["series"]["count"] == 20
        made.now += 1
        made.recorder.service(WEB, events.REFUSED_BY_KERNEL, "why")
        await made.written(3)
        made.now += 360  # it is over
        (event,) = await made.written(4)
        assert event["series"]["count"] == 21
        made.recorder.service(WEB, events.REFUSED_BY_KERNEL, "why")
        assert len(await made.written(5)) == 2
        assert made.dropped == 0


async def test_a_series_whose_event_is_no_longer_kept_begins_anew() -> None:
    async with recording() as made:
        made.recorder.node(events.MODE_SWITCHED, "to ipvs")
        await made.written(1)
        made.server.events.clear()
        made.recorder.node(events.MODE_SWITCHED, "to ipvs")
        (event,) = await made.written(3)
        assert event["series"]["count"] == 2
        assert made.server.writes == ["POST", "PATCH", "POST"]


async def test_one_object_cannot_flood_the_server() -> None:
    async with recording() as made:
        for number in range(100):
            made.recorder.service(WEB, events.REFUSED_FIELD, f"note {number}")
        made.recorder.service(ServiceName("shop", "other"), events.REFUSED_FIELD, "note")
        assert len(await made.written(26)) == 26
        assert made.dropped == 75
        made.now += 300
        made.recorder.service(WEB, events.REFUSED_FIELD, "later")
        made.recorder.service(WEB, events.REFUSED_FIELD, "one too many")
        assert len(await made.written(27)) == 27


async def test_nobody_waits_for_a_server_that_hangs() -> None:
    async with recording() as made:
        made.server.hangs = True
        for number in range(3000):
            made.recorder.service(ServiceName("shop", f"s{number}"), events.REFUSED_FIELD, "note")
        assert made.dropped == 2000
        await asyncio.sleep(0.3)
        start = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - start < 5  # ended, although a request is under way


async def test_a_failure_that_passes_is_tried_again() -> None:
    async with recording() as made:
        made.server.faults.extend([status(503), status(429, **{"Retry-After": "0"}), status(403), status(500)])
        made.recorder.node(events.STARTING, "")
        assert len(await made.written(5)) == 1
        assert made.dropped == 0


async def test_an_outage_is_said_once_and_costs_events() -> None:
    async with recording() as made:
        with capture_logs() as logs:
            made.server.faults.extend([status(503)] * 12)
            made.recorder.node(events.STARTING, "")
            made.recorder.node(events.MODE_SWITCHED, "")
            made.recorder.node(events.FELL_BACK, "")
            assert len(await made.written(13)) == 1
        assert made.dropped == 2
        assert [(log["log_level"], log["event"]) for log in logs if log["log_level"] != "debug"] == [
            ("warning", "cannot write Kubernetes Events; dropping them"),
            ("info", "Kubernetes Events can be written again"),
        ]


async def test_a_refusal_is_not_argued_with() -> None:
    async with recording() as made:
        made.server.faults.extend([status(404), status(422)])
        made.recorder.node(events.STARTING, "")
        made.recorder.node(events.FELL_BACK, "")
        assert await made.written(2) == []
        assert made.dropped == 2


async def test_a_name_that_another_node_took_is_not_used_again() -> None:
    async with recording() as made:
        made.server.faults.append(status(409))
        made.recorder.node(events.STARTING, "")
        assert len(await made.written(2)) == 1
        assert made.dropped == 0


async def test_an_event_whose_answer_was_lost_is_written_once() -> None:
    async with recording() as made:
        made.server.faults.append(answer_lost)
        made.recorder.node(events.STARTING, "")
        assert len(await made.written(2)) == 1
        made.recorder.node(events.STARTING, "")
        (event,) = await made.written(3)
        assert event["series"]["count"] == 2
        assert made.dropped == 0


async def test_refused_credentials_are_read_anew(tmp_path: Path) -> None:
    path, server = tmp_path / "kubeconfig", Server()
    server.token = "new"

    def write(token: str) -> None:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "x",
            "clusters": [{"name": "x", "cluster": {"server": server.url}}],
            "users": [{"name": "x", "user": {"token": token}}],
            "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
        }
        path.write_text(yaml.safe_dump(config))

    def refuse(server: Server, request: web.Request, body: Json) -> web.StreamResponse:
        write("new")
        return web.json_response({"message": "who?"}, status=401)

    async with recording(Credentials(path), server) as made:
        write("old")
        server.token, server.faults = None, deque([refuse])
        made.recorder.node(events.STARTING, "")
        await until(lambda: len(server.writes) == 1)
        server.token = "new"
        assert len(await made.written(2)) == 1
        assert made.dropped == 0


async def test_long_and_odd_notes_are_cut_to_what_the_api_takes() -> None:
    async with recording() as made:
        made.recorder.node(events.STARTING, "ä" * 600)
        made.recorder.node(events.STARTING, "\udc80")
        long, odd = await made.written(2)
    assert len(long["note"].encode()) <= 1024
    assert long["note"] == "ä" * 510 + "..."
    assert odd["note"] == "?"


async def test_names_of_nodes_may_be_long() -> None:
    name = "n" * 229 + "-" + "x" * 23
    server = Server()
    async with server.serving():
        recorder = ApiServerEvents(EventWriter(Connection(Credentials(master=server.url))), name, Metrics())
        recorder.node(events.STARTING, "")
        task = asyncio.create_task(recorder.run())
        await until(lambda: bool(server.events))
        task.cancel()
    (event,) = server.events.values()
    assert event["metadata"]["name"].startswith("n" * 229 + ".")
    assert len(event["metadata"]["name"]) <= 253
    assert len(event["reportingInstance"]) == 128
    assert event["regarding"]["name"] == name


def test_tokens_of_an_object_come_back_one_by_one() -> None:
    now = 0.0
    buckets = TokenBuckets(2, 10, 2, lambda: now)
    one, two, three = (ObjectReference("v1", "Service", name, "ns") for name in ("a", "b", "c"))
    assert [buckets.take(one) for _ in range(3)] == [True, True, False]
    now = 9.9
    assert not buckets.take(one)
    now = 10
    assert [buckets.take(one), buckets.take(one)] == [True, False]
    now = 1000
    assert [buckets.take(one) for _ in range(3)] == [True, True, False]
    assert buckets.take(two) and buckets.take(three)
    assert buckets.take(one), "the one used longest ago is forgotten"


def test_without_an_api_server_events_go_to_the_log() -> None:
    recorder: EventRecorder = NoEvents()
    with capture_logs() as logs:
        recorder.service(WEB, events.HEALTH_CHECK_FAILED, "port 1 in use")
        recorder.node(events.STARTING, "")
    assert [(log["log_level"], log["reason"]) for log in logs] == [
        ("debug", "FailedToStartServiceHealthcheck"),
        ("debug", "Starting"),
    ]
    assert "port 1 in use" in json.dumps(logs)
