"""Owns what probe pods run: a server that answers with its name, and a client that connects many times, bounded in time."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from contextlib import suppress
from typing import Final

import msgspec
from msgspec import Struct

NAME: Final = "nodeproxy-probe"
"""Name of the probes' Service and Deployment; what its servers answer begins with it."""
MAX_MESSAGE_BYTES: Final = 4096
"""A container's termination message is cut there by the kubelet."""
_AT_ONCE: Final = 10
_REASON: Final = 60
_REASONS: Final = 10


class Destination(Struct, frozen=True):
    """Where to connect. `named`: the server must answer with a name of ours."""

    target: str
    host: str
    port: int
    named: bool = False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.target}={host}:{self.port}"


def destination(text: str, *, named: bool) -> Destination:
    """Read `NAME=HOST:PORT`. Raises ValueError."""
    target, _, where = text.rpartition("=")
    host, _, port = where.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not target or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not NAME=HOST:PORT")
    return Destination(target, host, int(port), named)


class Result(Struct, frozen=True, array_like=True):
    """What became of the connections to one destination. `p50`: milliseconds, of those that succeeded."""

    sent: int
    failed: int
    p50: float | None = None
    reason: str | None = None


async def probe(destinations: list[Destination], count: int, seconds: float) -> list[Result]:
    """Connect `count` times to each, ten at a time; each connection may take so many `seconds`."""
    return [await _probe_one(one, count, seconds) for one in destinations]


async def _probe_one(where: Destination, count: int, seconds: float) -> Result:
    gate = asyncio.Semaphore(_AT_ONCE)

    async def once() -> float | str:
        async with gate:
            began = time.perf_counter()
            try:
                async with asyncio.timeout(seconds):
                    await _connect(where)
            except TimeoutError:
                return f"no answer within {seconds:g} s"
            except (OSError, ValueError) as error:
                number = getattr(error, "errno", None)
                return os.strerror(number).lower() if number else str(error)
            return time.perf_counter() - began

    answers = await asyncio.gather(*(once() for _ in range(count)))
    took = [answer for answer in answers if isinstance(answer, float)]
    reasons = [answer for answer in answers if isinstance(answer, str)]
    p50 = round(statistics.median(took) * 1000, 3) if took else None
    return Result(count, len(reasons), p50, max(set(reasons), key=reasons.count) if reasons else None)


async def _connect(where: Destination) -> None:
    reader, writer = await asyncio.open_connection(where.host, where.port)
    try:
        if where.named:
            answer = (await reader.readline()).decode(errors="replace").strip()
            if not answer.startswith(NAME):
                raise ValueError(f"answered {answer[:20]!r}" if answer else "closed without an answer")
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def message(results: list[Result]) -> bytes:
    """Results as a termination message: in the order of the destinations, and short enough for the kubelet."""
    reasons = 0
    short = []
    for result in results:
        keep = result.reason is not None and reasons < _REASONS
        reasons += keep
        reason = result.reason[:_REASON] if keep and result.reason else None
        short.append(msgspec.structs.replace(result, reason=reason))
    encoded = msgspec.json.encode(short)
    assert len(encoded) <= MAX_MESSAGE_BYTES
    return encoded


def results(text: str) -> list[Result] | None:
    """Read a termination message; None where it is none."""
    try:
        return msgspec.json.decode(text, type=list[Result])
    except msgspec.DecodeError:
        return None


async def serve(host: str | None, port: int, name: str, stop: asyncio.Event) -> None:
    """Answer each connection with our name and a line feed, until told to stop. Raises OSError."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            writer.write(f"{name}\n".encode())
            await writer.drain()
            writer.close()
            await writer.wait_closed()

    server = await asyncio.start_server(answer, host, port)
    async with server:
        await stop.wait()
