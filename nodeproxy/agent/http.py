"""Owns the agent's HTTP endpoints: /healthz and /livez on one address, /metrics and /proxyMode on another.

The standard library's server serves them, each in a thread: they are asked a few times a minute, and a web framework would
cost every node 15 MB and a third of the time to the first sync.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar, NamedTuple

import msgspec
import structlog
from prometheus_client import CONTENT_TYPE_LATEST, Counter

from nodeproxy.agent.backoff import Backoff
from nodeproxy.agent.config import parse_host_port
from nodeproxy.agent.health import Health
from nodeproxy.agent.metrics import Metrics

_log = structlog.get_logger(__name__)


class Answer(NamedTuple):
    """What a path answers to GET."""

    status: int
    content_type: str
    body: bytes


Routes = Mapping[str, Callable[[], Answer]]


def health_routes(health: Health, metrics: Metrics) -> Routes:
    """/healthz and /livez."""

    def answer(good: Callable[[], bool], counter: Counter) -> Callable[[], Answer]:
        def respond() -> Answer:
            status = 200 if good() else 503
            counter.labels(code=str(status)).inc()
            return Answer(status, "application/json", msgspec.json.encode(health.status()))

        return respond

    return {
        "/healthz": answer(lambda: health.healthy, metrics.healthz),
        "/livez": answer(lambda: health.alive, metrics.livez),
    }


def metrics_routes(metrics: Metrics, mode: str) -> Routes:
    """/metrics and /proxyMode."""
    return {
        "/metrics": lambda: Answer(200, CONTENT_TYPE_LATEST, metrics.text()),
        "/proxyMode": lambda: Answer(200, "text/plain; charset=utf-8", mode.encode()),
    }


@asynccontextmanager
async def serving(name: str, address: str, routes: Routes) -> AsyncIterator[None]:
    """Serve routes at `address` (`host:port`; empty: not at all). A port in use is retried and holds up nothing."""
    where = parse_host_port(address)
    if where is None:
        yield
        return
    task = asyncio.create_task(_serve(name, where, routes))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _serve(name: str, where: tuple[str, int], routes: Routes) -> None:
    backoff = Backoff(1.0, 60.0)
    while True:
        try:
            server = _server(where, routes)
        except OSError as error:
            delay = backoff.next()
            _log.error("cannot listen", server=name, address=where, error=error.strerror, retry_seconds=round(delay, 1))
            await asyncio.sleep(delay)
            continue
        _log.debug("listening", server=name, address=where)
        thread = threading.Thread(target=server.serve_forever, name=name, daemon=True)
        thread.start()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.to_thread(server.shutdown)
            server.server_close()


def _server(where: tuple[str, int], routes: Routes) -> ThreadingHTTPServer:
    class Handler(_Handler):
        paths = routes

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in where[0] else socket.AF_INET

    return Server(where, Handler)


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD by path; a client that is silent for five seconds is let go."""

    paths: ClassVar[Routes] = {}
    timeout = 5.0
    server_version = "nodeproxy"
    sys_version = ""

    def do_GET(self) -> None:
        route = self.paths.get(self.path.partition("?")[0])
        answer = route() if route else Answer(404, "text/plain; charset=utf-8", b"not found\n")
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a probe every few seconds is no news."""
