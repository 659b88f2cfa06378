"""Owns how an agent reaches out of its node: where it hears of Services, and where it tells Events."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, NamedTuple

from nodeproxy.agent.events import EventRecorder, NoEvents
from nodeproxy.agent.metrics import Metrics
from nodeproxy.configuration.agent_config import AgentConfig
from nodeproxy.source.events import Source, SourceError

if TYPE_CHECKING:
    from nodeproxy.source.apiserver.credentials import Credentials
    from nodeproxy.source.apiserver.observer import Observer
    from nodeproxy.source.apiserver.proxy_nodes import ProxyNodes


class StartError(Exception):
    """The agent cannot start; the message is one line that says what is missing and what to do."""


class Outside(NamedTuple):
    """Where the agent hears of Services, where it tells Events, and where the roll-out operator is heard."""

    source: Source
    events: EventRecorder
    write_events: Callable[[], Coroutine[None, None, None]]
    proxy_nodes: ProxyNodes | None = None  # without an API server there is no operator either


def reach_outside(config: AgentConfig, metrics: Metrics, observer: Observer | None = None) -> Outside:
    """What the configuration names. `observer` is told how watching an API server goes. Raises `StartError`."""
    source = make_source(config, observer)
    if config.manifests is not None:
        return Outside(source, NoEvents(), _nothing)
    from nodeproxy.source.apiserver.proxy_nodes import ProxyNodes  # noqa: PLC0415

    proxy_nodes = ProxyNodes(_credentials(config), config.node_name)
    if not config.events:
        return Outside(source, NoEvents(), _nothing, proxy_nodes)
    from nodeproxy.agent.api_server_events import ApiServerEvents  # noqa: PLC0415
    from nodeproxy.source.apiserver.connection import Connection  # noqa: PLC0415
    from nodeproxy.source.apiserver.event_writer import EventWriter  # noqa: PLC0415

    events = ApiServerEvents(EventWriter(Connection(_credentials(config))), config.node_name, metrics)
    return Outside(source, events, events.run, proxy_nodes)


def make_source(config: AgentConfig, observer: Observer | None = None) -> Source:
    """The source that the configuration names. Raises `StartError`. Imports only what that source needs."""
    if config.manifests is not None:
        from nodeproxy.source.manifests import ManifestSource  # noqa: PLC0415

        return ManifestSource(config.manifests, config.node_name, config.service_proxy_name)
    from nodeproxy.source.apiserver.source import ApiServerSource  # noqa: PLC0415

    credentials = _credentials(config)
    try:
        credentials.load()
    except SourceError as error:
        raise StartError(str(error)) from error
    return ApiServerSource(credentials, config.node_name, config.service_proxy_name, observer=observer)


def origin_of(config: AgentConfig) -> str:
    """The source that the configuration names, in words."""
    if config.manifests is not None:
        return f"manifests {config.manifests}"
    return f"API server ({_credentials(config)})"


def _credentials(config: AgentConfig) -> Credentials:
    from nodeproxy.source.apiserver.credentials import Credentials  # noqa: PLC0415

    return Credentials(config.kubeconfig, config.master)


async def _nothing() -> None:
    """There is nobody to write Events to."""
