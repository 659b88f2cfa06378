"""Owns doing one thing at the API server again and again, with time in between where it failed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn

from tenacity import AsyncRetrying, retry_if_exception_type
from tenacity.wait import wait_base

from nodeproxy.source.apiserver.connection import RequestError
from nodeproxy.source.apiserver.credentials import CredentialsError


async def again_and_again(once: Callable[[], Awaitable[None]], wait: Callable[[], wait_base]) -> NoReturn:
    """Until cancelled: `once` at once after it returned, and after `wait` where it raised RequestError or CredentialsError.

    A new `wait` begins after each success.
    """
    while True:
        retrying = AsyncRetrying(
            wait=wait(),
            sleep=asyncio.sleep,
            retry=retry_if_exception_type((RequestError, CredentialsError)),
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                await once()
