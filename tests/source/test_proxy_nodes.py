"""An agent and the ProxyNode of its node, against a server that does what real ones do only rarely."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress

import pytest
from aiohttp import web

from nodeproxy.api.proxy_node import PROXY_NODES, ProxyNode
from nodeproxy.source.apiserver import Credentials, proxy_nodes
from nodeproxy.source.apiserver.proxy_nodes import ProxyNodes
from tests.source.fake_apiserver import Fault, status

_OBJECT = {"metadata": {"name": "here", "resourceVersion": "7"}, "spec": {"mode": "ipvs"}}


async def _list_or_watch(request: web.Request) -> web.StreamResponse:
    if "watch" not in request.query:
        return web.json_response({"metadata": {"resourceVersion": "7"}, "items": [_OBJECT]})
    response = web.StreamResponse()
    await response.prepare(request)
    await asyncio.sleep(60)
    return response


async def _first_object(faults: list[Fault]) -> tuple[ProxyNode | None, float]:
    """What is delivered first by a server that answers the first requests with `faults`, and the seconds until then."""
    left = deque(faults)

    async def answer(request: web.Request) -> web.StreamResponse:
        return await (left.popleft() if left else _list_or_watch)(request)

    app = web.Application()
    app.router.add_get(PROXY_NODES, answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0]
        delivered: asyncio.Queue[ProxyNode | None] = asyncio.Queue()
        nodes = ProxyNodes(Credentials(master=f"http://{host}:{port}"), "here")
        started = time.monotonic()
        task = asyncio.create_task(nodes.follow(delivered.put_nowait))
        first = await asyncio.wait_for(delivered.get(), 60)
        took = time.monotonic() - started
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        assert not left
        return first, took
    finally:
        await runner.cleanup()


async def test_retry_after_is_honoured() -> None:
    first, took = await _first_object([status(429, "slow down", {"Retry-After": "2"})])
    assert first is not None
    assert first.spec.mode == "ipvs"
    assert took >= 2.0


@pytest.mark.parametrize("code", [403, 404])
async def test_a_server_without_the_resource_is_asked_again_later(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(proxy_nodes, "_SOON", 0)
    monkeypatch.setattr(proxy_nodes, "_ABSENT_SECONDS", (2.0, 2.5))
    first, took = await _first_object([status(code, headers={"Retry-After": "0"})])
    assert first is not None
    assert took >= 2.0


async def test_a_server_that_starts_and_does_not_know_all_yet_is_asked_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """That it did not answer at all before does not make it a server without the resource."""
    monkeypatch.setattr(proxy_nodes, "_SOON_SECONDS", (0.1, 0.2))
    monkeypatch.setattr(proxy_nodes, "_ABSENT_SECONDS", (600.0, 600.0))
    starting = [status(503, headers={"Retry-After": "0"})] * 4
    first, _ = await _first_object([*starting, status(403), status(404), status(403)])
    assert first is not None
