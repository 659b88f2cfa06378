"""Owns when an agent reads its configuration again: on SIGHUP, and when its file changes. One that is refused is said."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from nodeproxy.configuration.agent_config import AgentConfig, ConfigError

_log = structlog.get_logger(__name__)


async def follow(
    read: Callable[[], AgentConfig],
    asked: asyncio.Event,
    apply: Callable[[AgentConfig], Awaitable[bool]],
    note: Callable[[bool], None],
) -> None:
    """Until cancelled: each time that it is `asked`, read the configuration and apply it. `note` hears whether it worked."""
    while True:
        await asked.wait()
        asked.clear()
        try:
            config = await asyncio.to_thread(read)
        except ConfigError as error:
            for complaint in error.complaints:
                _log.error("configuration refused; the one in force stays", reason=complaint)
            note(False)
        else:
            note(await apply(config))
