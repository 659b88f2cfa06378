"""Owns how much longer than usual is waited on this machine: as measured once, and bounded.

The measurement may fall into a moment when the machine is busy with something else; a time-out that is an hour long then
would only hide what is wrong.
"""

from __future__ import annotations

from typing import Final

from nodeproxy.sandbox.pace import factor

_MOST: Final = 8.0


def scaled(seconds: float) -> float:
    """A time limit, adapted to this machine."""
    return seconds * min(factor(), _MOST)
