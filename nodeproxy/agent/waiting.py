"""Owns waiting for an event for a limited time."""

from __future__ import annotations

import asyncio
import contextlib


async def wait_at_most(event: asyncio.Event, seconds: float | None) -> None:
    """Return when the event is set, or after so many seconds (None: no limit).

    Not by `asyncio.wait_for`, which in Python 3.11 swallows a cancellation that comes just as the event is set.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
