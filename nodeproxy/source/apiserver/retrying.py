"""Owns doing one thing at the API server again and again, with time in between where it failed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential
from tenacity.wait import wait_base

from nodeproxy.source.apiserver.connection import RequestError
from nodeproxy.source.apiserver.credentials import CredentialsError

_MAX_RETRY_AFTER: Final = 300.0


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


class Patience(wait_base):
    """The seconds that the server asked for, else exponential with full jitter up to 30 s."""

    def __init__(self) -> None:
        self._backoff = wait_random_exponential(multiplier=0.5, max=30, min=0.05)

    def __call__(self, retry_state: RetryCallState) -> float:
        asked = asked_seconds(retry_state)
        if asked is None:
            return self._backoff(retry_state)
        return min(asked, _MAX_RETRY_AFTER) * random.uniform(1.0, 1.2)  # so that not all clients come back at once


def asked_seconds(retry_state: RetryCallState) -> float | None:
    """How long the server wants to be left alone after the last attempt, if it said so."""
    error = failure(retry_state)
    return error.retry_after if isinstance(error, RequestError) else None


def failure(retry_state: RetryCallState) -> BaseException | None:
    """What the last attempt raised, if it did."""
    return retry_state.outcome.exception() if retry_state.outcome else None
