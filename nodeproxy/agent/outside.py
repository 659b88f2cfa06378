"""Owns how an agent reaches out of its node: where it hears of Services, and where it tells Events."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import NamedTuple

from nodeproxy.agent.events import EventRecorder, NoEvents
from nodeproxy.agent.metrics import Metrics
from nodeproxy.configuration.agent_config import AgentConfig
from nodeproxy.source.events import Source, SourceError


class StartError(Exception):
    """The agent cannot start; the message is one line that says what is missing and what to do."""


class Outside(NamedTuple):
    """Where the agent hears of Services, and where it tells Events."""

    source: Source
    events: EventRecorder
    write_events: Callable[[], Coroutine[None, None, None]]


def reach_outside(config: AgentConfig, metrics: Metrics) -> Outside:
    """The source that the configuration names. Raises `StartError`. Imports only what that source needs."""
    if config.manifests is not None:
        from nodeproxy.source.manifests import ManifestSource  # noqa: PLC0415

        source: Source = ManifestSource(config.manifests, config.node_name, config.service_proxy_name)
        return Outside(source, NoEvents(), _nothing)
    from nodeproxy.source.apiserver.credentials import Credentials  # noqa: PLC0415
    from nodeproxy.source.apiserver.source import ApiServerSource  # noqa: PLC0415

    credentials = Credentials(config.kubeconfig, config.master)
    try:
        credentials.load()
    except SourceError as error:
        raise StartError(str(error)) from error
    source = ApiServerSource(credentials, config.node_name, config.service_proxy_name)
    if not config.events:
        return Outside(source, NoEvents(), _nothing)
    from nodeproxy.agent.api_server_events import ApiServerEvents  # noqa: PLC0415
    from nodeproxy.source.apiserver.connection import Connection  # noqa: PLC0415
    from nodeproxy.source.apiserver.event_writer import EventWriter  # noqa: PLC0415

    events = ApiServerEvents(EventWriter(Connection(credentials)), config.node_name, metrics)
    return Outside(source, events, events.run)


async def _nothing() -> None:
    """There is nobody to write Events to."""
