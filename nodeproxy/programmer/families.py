"""Owns what every mode does with its two IP families: neither holds up the other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from typing import TypeVar

import structlog

from nodeproxy.forwarding.table import ServicePortKey
from nodeproxy.programmer.base import ProgrammingError

_log = structlog.get_logger(__name__)

_Opened = TypeVar("_Opened")

Refused = dict[ServicePortKey, str]
"""ServicePorts that the kernel refuses, with the reason."""


async def open_each(opening: Iterable[Awaitable[_Opened]]) -> list[_Opened]:
    """The families that can be had, one after the other; the others are logged. Raises `ProgrammingError` if none can."""
    opened: list[_Opened] = []
    errors: list[str] = []
    for one in opening:
        try:
            opened.append(await one)
        except ProgrammingError as error:
            errors.append(str(error))
    if not opened:
        raise ProgrammingError("; ".join(errors))
    for reason in errors:
        _log.error("an IP family is not programmed", reason=reason)
    return opened


async def apply_each(applying: Iterable[Awaitable[Refused]]) -> tuple[Refused, list[str]]:
    """Program all families side by side: what is refused, and the `ProgrammingError`s as text. Other errors are raised."""
    refused: Refused = {}
    errors: list[str] = []
    for outcome in await asyncio.gather(*applying, return_exceptions=True):
        if isinstance(outcome, ProgrammingError):
            errors.append(str(outcome))
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            refused |= outcome
    return refused, errors
