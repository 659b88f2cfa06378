"""Owns what is told while something is made: a line for each step, with its time in seconds, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


def say(text: str) -> None:
    """A line of its own."""
    print(f"kind: {text}", file=sys.stderr, flush=True)


@contextmanager
def step(what: str, *, interesting: float = 0.5) -> Iterator[None]:
    """A step; the line comes at its end and only if it took longer than `interesting` seconds, or failed."""
    begin = time.monotonic()
    live = sys.stderr.isatty()
    if live:
        print(f"\r\x1b[Kkind: {what} …", end="", file=sys.stderr, flush=True)
    verdict = " FAILED"
    try:
        yield
        verdict = ""
    finally:
        took = time.monotonic() - begin
        if live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        if verdict or took >= interesting:
            say(f"{what}:{verdict} {took:.1f} s")
