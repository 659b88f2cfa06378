"""Owns the agent's HTTP endpoints: /healthz and /livez on one address, /metrics and /proxyMode on another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from nodeproxy.agent.backoff import Backoff
from nodeproxy.agent.config import parse_host_port
from nodeproxy.agent.health import Health
from nodeproxy.agent.metrics import Metrics

_log = structlog.get_logger(__name__)


def health_application(health: Health, metrics: Metrics) -> web.Application:
    """/healthz and /livez."""

    def respond(good: bool) -> web.Response:
        return web.Response(
            status=200 if good else 503,
            body=msgspec.json.encode(health.status()),
            content_type="application/json",
            headers={"X-Content-Type-Options": "nosniff"},
        )

    async def healthz(_request: web.Request) -> web.Response:
        response = respond(health.healthy)
        metrics.healthz.labels(code=str(response.status)).inc()
        return response

    async def livez(_request: web.Request) -> web.Response:
        response = respond(health.alive)
        metrics.livez.labels(code=str(response.status)).inc()
        return response

    application = web.Application()
    application.add_routes([web.get("/healthz", healthz), web.get("/livez", livez)])
    return application


def metrics_application(metrics: Metrics, mode: str) -> web.Application:
    """/metrics and /proxyMode."""

    async def expose(_request: web.Request) -> web.Response:
        return web.Response(body=metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def proxy_mode(_request: web.Request) -> web.Response:
        return web.Response(text=mode)

    application = web.Application()
    application.add_routes([web.get("/metrics", expose), web.get("/proxyMode", proxy_mode)])
    return application


@asynccontextmanager
async def serving(name: str, address: str, application: web.Application) -> AsyncIterator[None]:
    """Serve an application at `address` (`host:port`; empty: not at all). A port in use is retried and holds up nothing."""
    where = parse_host_port(address)
    if where is None:
        yield
        return
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    binding = asyncio.create_task(_bind(name, runner, *where))
    try:
        yield
    finally:
        binding.cancel()
        await runner.cleanup()


async def _bind(name: str, runner: web.AppRunner, host: str, port: int) -> None:
    backoff = Backoff(1.0, 60.0)
    while True:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            delay = backoff.next()
            _log.error(
                "cannot listen", server=name, address=f"{host}:{port}", error=error.strerror, retry_seconds=round(delay, 1)
            )
            await asyncio.sleep(delay)
        else:
            _log.debug("listening", server=name, address=f"{host}:{port}")
            return
