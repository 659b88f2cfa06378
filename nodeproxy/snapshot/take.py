"""Owns taking a snapshot from the source that a configuration names; `load` and `save` come with it."""

from __future__ import annotations

import asyncio

import structlog

from nodeproxy.agent.node import available_families, own_addresses
from nodeproxy.agent.outside import StartError, make_source, origin_of
from nodeproxy.configuration.agent_config import AgentConfig
from nodeproxy.snapshot.directory import load, save
from nodeproxy.snapshot.gathering import Gathering
from nodeproxy.snapshot.model import Snapshot, SnapshotError
from nodeproxy.source.events import SourceError

__all__ = ["load", "save", "take"]

_NODE_SECONDS = 2.0  # a Node that may not be read holds nothing up

_log = structlog.get_logger(__name__)


async def take(config: AgentConfig, *, timeout: float = 30.0) -> Snapshot:  # noqa: ASYNC109 - as a caller sees it
    """The cluster state that an agent of this configuration sees: its source is run until the lists are complete.

    The addresses and IP families of this machine count where it is the node: where the Node object has one of its addresses,
    or tells none. Raises `SnapshotError` where the state cannot be read, or not within `timeout` seconds.
    """
    origin = origin_of(config)
    gathering = Gathering(config.node_name)
    try:
        source = await asyncio.to_thread(make_source, config, gathering)
        running = asyncio.create_task(source.run(gathering.deliver))
        try:
            await _complete(running, gathering, timeout, origin)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    except (StartError, SourceError, OSError) as error:
        raise SnapshotError(f"{origin}: {error}") from error
    here = own_addresses()
    if gathering.node_addresses and set(gathering.node_addresses).isdisjoint(here):
        return gathering.snapshot(config, origin)
    return gathering.snapshot(config, origin, node_addresses=here, families=available_families())


async def _complete(running: asyncio.Task[None], gathering: Gathering, seconds: float, origin: str) -> None:
    """Wait for the lists. Raises what the source raises, or `SnapshotError`."""
    waiting = asyncio.create_task(gathering.lists.wait())
    try:
        await asyncio.wait((running, waiting), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
    if not gathering.lists.is_set():
        if running.done():
            running.result()
        reason = f" ({gathering.last_error})" if gathering.last_error else ""
        raise SnapshotError(f"{origin}: no complete list of Services and EndpointSlices within {seconds:g} s{reason}")
    try:
        await asyncio.wait_for(gathering.node.wait(), _NODE_SECONDS)
    except TimeoutError:
        _log.warning("no answer about the Node; the snapshot goes without it", source=origin)
