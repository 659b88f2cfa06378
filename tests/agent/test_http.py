"""What the agent says over HTTP, and that no client can keep it from saying so. Sockets are real."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing

import pytest

from nodeproxy.agent import http_server
from nodeproxy.agent.health import Health
from nodeproxy.agent.http import Routes, health_routes, metrics_routes, serving
from nodeproxy.agent.http_server import Answer, Connections, Respond, bound
from nodeproxy.agent.metrics import Metrics
from tests.agent.http_client import Reply, free_port, get, send


def hello(path: str) -> Answer:
    return Answer(200, "text/plain", f"hello {path}".encode(), {"X-Test": "yes"})


@asynccontextmanager
async def listening(respond: Respond = hello, limit: int = 512) -> AsyncIterator[int]:
    """A server; gives its port."""
    with closing(Connections(limit)) as connections, connections.listener(respond) as listener:
        sock = bound("127.0.0.1", 0)
        port: int = sock.getsockname()[1]
        await listener.open(sock)
        yield port


async def eventually(port: int, path: str, host: str = "127.0.0.1") -> Reply:
    """Ask until somebody answers."""
    async with asyncio.timeout(10):
        while True:
            try:
                return await get(port, path, host)
            except ConnectionRefusedError:
                await asyncio.sleep(0.02)


@asynccontextmanager
async def routes_at(host: str, routes: Routes) -> AsyncIterator[int]:
    port = free_port()
    async with serving("test", f"{host}:{port}", routes):
        await eventually(port, "/")
        yield port


async def test_a_request_is_answered_and_the_connection_closed() -> None:
    async with listening() as port:
        reply = await get(port, "/a/b?c=d")
        assert (reply.status, reply.body) == (200, b"hello /a/b")
        assert reply.headers["content-type"] == "text/plain"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["x-test"] == "yes"
        assert reply.headers["content-length"] == "10"
        assert reply.headers["connection"] == "close"


async def test_head_has_no_body_and_other_methods_are_as_get() -> None:
    async with listening() as port:
        head = await get(port, "/x", method="HEAD")
        assert (head.status, head.headers["content-length"], head.body) == (200, "8", b"")
        assert (await get(port, "/x", method="OPTIONS")).body == b"hello /x"
        posted = b"POST /x HTTP/1.1\r\nContent-Length: 9000\r\n\r\n" + b"x" * 9000
        assert (await send(posted, port)).body == b"hello /x"


async def test_old_and_hand_made_requests_are_answered() -> None:
    async with listening() as port:
        assert (await send(b"GET / HTTP/1.0\r\n\r\n", port)).status == 200
        assert (await send(b"GET / HTTP/1.1\n\n", port)).status == 200


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\n",
        b"GET /\r\n\r\n",
        b"get / HTTP/1.1\r\n\r\n",
        b"GET  / HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"\r\n\r\n",
    ],
)
async def test_garbage_is_refused(request_: bytes) -> None:
    async with listening() as port:
        assert (await send(request_, port)).status == 400
        assert (await get(port)).status == 200


async def test_huge_headers_are_refused() -> None:
    async with listening() as port:
        assert (await send(b"GET / HTTP/1.1\r\nX: " + b"x" * 20_000, port)).status == 431
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n" + b"x" * 1_000_000)  # endless, after the request
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await writer.drain()
            await asyncio.wait_for(reader.readexactly(1_000_000), 5)
        writer.close()


async def test_a_silent_client_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_REQUEST_SECONDS", 0.2)
    async with listening() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HT")
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()


async def test_a_client_that_does_not_read_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_ANSWER_SECONDS", 0.2)
    connections = Connections()
    with connections.listener(lambda _: Answer(200, "text/plain", b"x" * 20_000_000)) as listener:
        sock = bound("127.0.0.1", 0)
        await listener.open(sock)
        with socket.create_connection(sock.getsockname()) as client:
            async with asyncio.timeout(5):
                while len(connections) == 0:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                client.send(b"GET / HTTP/1.1\r\n\r\n")
                while len(connections) > 0:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)


async def test_silent_clients_keep_nobody_out() -> None:
    async with listening(limit=20) as port, AsyncExitStack() as stack:
        for _ in range(100):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            stack.callback(writer.close)
        assert (await get(port)).status == 200


async def test_a_fault_of_ours_is_an_answer_too() -> None:
    def fail(_: str) -> Answer:
        raise RuntimeError("fault")

    async with listening(fail) as port:
        assert (await get(port)).status == 500
        assert (await get(port)).status == 500


async def test_healthz_and_livez() -> None:
    now = 1000.0
    health, metrics = Health(30, lambda: now), Metrics()
    async with routes_at("127.0.0.1", health_routes(health, metrics)) as port:
        starting = await get(port, "/healthz")
        assert (starting.status, starting.json["lastUpdated"], starting.json["healthy"]) == (503, "", False)
        assert (await get(port, "/livez")).status == 200
        health.programmed()
        now += 100
        good = await get(port, "/healthz")
        assert good.status == 200
        assert good.json == {
            "lastUpdated": "1970-01-01T00:18:20Z",
            "currentTime": "1970-01-01T00:18:20Z",
            "healthy": True,
            "nodeEligible": True,
        }
        health.node_eligible = False
        going = await get(port, "/healthz")
        assert (going.status, going.json["healthy"], going.json["nodeEligible"]) == (503, True, False)
        assert going.json["lastUpdated"] == "1970-01-01T00:16:40Z"
        alive = await get(port, "/livez")
        assert (alive.status, "nodeEligible" in alive.json) == (200, False)
        health.queued()
        now += 60
        late = await get(port, "/livez")
        assert (late.status, late.json["healthy"]) == (503, False)
        health.change_sync_period(60)
        assert (await get(port, "/livez")).status == 200
        assert (await get(port, "/other")).status == 404
    text = metrics.text().decode()
    assert 'kubeproxy_proxy_healthz_total{code="503"} 2.0' in text
    assert 'kubeproxy_proxy_livez_total{code="200"} 3.0' in text


async def test_metrics_mode_and_configuration() -> None:
    mode = "iptables"
    routes = metrics_routes(Metrics(), lambda: mode, lambda: json.dumps({"mode": mode}).encode())
    async with routes_at("127.0.0.1", routes) as port:
        assert b"kubeproxy_sync_proxy_rules_duration_seconds_bucket" in (await get(port, "/metrics")).body
        assert (await get(port, "/healthz")).body == b"ok"
        for mode in ("iptables", "ipvs"):
            assert (await get(port, "/proxyMode")).body == mode.encode()
            reply = await get(port, "/configz")
            assert (reply.headers["content-type"], reply.json) == (
                "application/json",
                {"kubeproxy.config.k8s.io": {"mode": mode}},
            )


async def test_any_host_is_that_of_both_families() -> None:
    for host in ("0.0.0.0", "[::]"):
        async with routes_at(host, metrics_routes(Metrics(), "ipvs")) as port:
            assert (await get(port, "/proxyMode", "127.0.0.1")).body == b"ipvs"
            assert (await get(port, "/proxyMode", "::1")).body == b"ipvs"


async def test_a_port_in_use_is_said_once_and_tried_again() -> None:
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        async with serving("test", f"127.0.0.1:{port}", metrics_routes(Metrics(), "ipvs"), failed=said.append):
            async with asyncio.timeout(5):
                while not said:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            other.close()
            assert (await eventually(port, "/proxyMode")).body == b"ipvs"
    assert len(said) == 1
    assert f"port {port}: Address already in use" in said[0]


async def test_a_server_can_move_and_come_back() -> None:
    port, routes = free_port(), metrics_routes(Metrics(), "ipvs")
    for _ in range(3):
        async with serving("test", f"127.0.0.1:{port}", routes):
            assert (await eventually(port, "/healthz")).status == 200
        with pytest.raises(ConnectionRefusedError):
            await get(port)
