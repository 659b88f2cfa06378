"""Owns how slow this machine is, and times that are scaled by it: under emulation everything takes many times as long."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Final

_NOMINAL_SECONDS: Final = 0.010  # what the work below takes natively on the machine this was written on
_ALLOWANCE: Final = 2.0  # starting processes suffers more from emulation than what is measured here


@lru_cache(maxsize=1)
def factor() -> float:
    """How many times slower than natively this machine is, by measurement; at least 1."""
    took = min(_work() for _ in range(3))
    slower = took / _NOMINAL_SECONDS
    return 1.0 if slower < 2.5 else slower * _ALLOWANCE


def scaled(seconds: float) -> float:
    """A time limit, adapted to this machine."""
    return seconds * factor()


def _work() -> float:
    start = time.perf_counter()
    values = {str(number): (number, number * 2) for number in range(20_000)}
    sorted(values.values())
    return time.perf_counter() - start
