"""Owns waiting for what will become true, with a limit that fits the machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from e2e.harness.pace import scaled

T = TypeVar("T")

WITHIN = 30.0  # what a cluster may take for a change: kubelet, controllers and the agent, on a busy machine
_POLL = 0.2


def eventually(look: Callable[[], T], what: str, *, within: float = WITHIN, poll: float = _POLL) -> T:
    """Call `look` until what it returns is true, and return that. Raises AssertionError after `within` seconds (scaled).

    An AssertionError of `look` itself counts as not yet; its text is in the last word.
    """
    limit = scaled(within)
    deadline = time.monotonic() + limit
    seen = ""
    while True:
        try:
            found = look()
            if found:
                return found
            seen = f"last seen: {found!r}"
        except AssertionError as error:
            seen = str(error)
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {limit:g} s: {what}\n{seen}")
        time.sleep(poll)
