"""Owns what the agent says over HTTP: /healthz and /livez on one address, /metrics, /proxyMode and /configz on another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, closing
from typing import Final

import msgspec
import structlog
from prometheus_client import CONTENT_TYPE_LATEST, Counter

from nodeproxy.agent.backoff import Backoff
from nodeproxy.agent.health import Health, HealthStatus
from nodeproxy.agent.http_server import TEXT, Answer, Connections, Respond, bound
from nodeproxy.agent.metrics import Metrics
from nodeproxy.configuration.addresses import parse_host_port

_log = structlog.get_logger(__name__)

_JSON: Final = "application/json"
_WILDCARDS: Final = ("0.0.0.0", "::")

Routes = Mapping[str, Callable[[], Answer | Callable[[], Answer]]]
"""What answers, by path; see `Respond`."""


def health_routes(health: Health, metrics: Metrics) -> Routes:
    """/healthz and /livez."""

    def answer(good: Callable[[], bool], status: Callable[[], HealthStatus], counter: Counter) -> Callable[[], Answer]:
        def respond() -> Answer:
            code = 200 if good() else 503
            counter.labels(code=str(code)).inc()
            return Answer(code, _JSON, msgspec.json.encode(status()))

        return respond

    return {
        "/healthz": answer(lambda: health.healthy, health.status, metrics.healthz),
        "/livez": answer(lambda: health.alive, lambda: health.status(of_node=False), metrics.livez),
    }


def metrics_routes(metrics: Metrics, mode: str | Callable[[], str], configz: Callable[[], bytes] | None = None) -> Routes:
    """/metrics, /proxyMode, /configz, and the /healthz that only says that the agent answers, as kube-proxy has it there.

    `mode` is a function where the mode may change; `configz` gives the KubeProxyConfiguration in force as a JSON object.
    """
    present = mode if callable(mode) else lambda: mode
    routes: dict[str, Callable[[], Answer | Callable[[], Answer]]] = {
        # With thousands of Services this takes a quarter of a second.
        "/metrics": lambda: lambda: Answer(200, CONTENT_TYPE_LATEST, metrics.text()),
        "/proxyMode": lambda: Answer(200, TEXT, present().encode()),
        "/healthz": lambda: Answer(200, TEXT, b"ok"),
    }
    if configz is not None:
        routes["/configz"] = lambda: Answer(200, _JSON, _configz(configz()))
    return routes


def _configz(configuration: bytes) -> bytes:
    return msgspec.json.encode({"kubeproxy.config.k8s.io": msgspec.Raw(configuration)})


def by_path(routes: Routes) -> Respond:
    """Answers by exact path, and 404 for others."""

    def respond(path: str) -> Answer | Callable[[], Answer]:
        route = routes.get(path)
        return route() if route else Answer(404, TEXT, b"not found\n")

    return respond


@asynccontextmanager
async def serving(
    name: str, address: str, routes: Routes, *, failed: Callable[[str], None] = lambda _: None
) -> AsyncIterator[None]:
    """Serve routes at `address` (`host:port`; empty: not at all). Any host (0.0.0.0 or ::) means that of both IP families.

    A port in use is said once, to `failed` too, and tried again until it is free; it holds up nothing.
    """
    where = parse_host_port(address)
    if where is None:
        yield
        return
    task = asyncio.create_task(_serve(name, where, routes, failed), name=f"http-{name}")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _serve(name: str, where: tuple[str, int], routes: Routes, failed: Callable[[str], None]) -> None:
    with closing(Connections()) as connections, connections.listener(by_path(routes)) as listener:
        backoff = Backoff(1.0, 60.0)
        complained = False
        while True:
            try:
                await listener.open(bound(*where, both_families=where[0] in _WILDCARDS))
                break
            except OSError as error:
                if not complained:
                    complained = True
                    _log.error("cannot listen; trying again", server=name, address=where, error=error.strerror)
                    failed(f"cannot listen on {where[0]} port {where[1]}: {error.strerror}")
                await asyncio.sleep(backoff.next())
        (_log.info if complained else _log.debug)("listening", server=name, address=where)
        await asyncio.Event().wait()
