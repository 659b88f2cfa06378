"""Owns Go's durations, as flags and configuration files write them."""

from __future__ import annotations

import re

_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)", re.ASCII)  # both signs for micro
_SECOND = 1_000_000_000
_NANOSECONDS = {
    "ns": 1, "us": 1_000, "µs": 1_000, "μs": 1_000, "ms": 1_000_000, "s": _SECOND, "m": 60 * _SECOND, "h": 3600 * _SECOND
}  # fmt: skip
_LONGEST = 2**63  # Go counts nanoseconds in 64 bits


def parse_duration(text: str) -> float:
    """Seconds in a Go duration such as `1s`, `500ms` or `1h30m`; `0` needs no unit. Raises ValueError, also if negative."""
    if text in ("0", "+0", "-0"):
        return 0.0
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text.removeprefix("+"):
        raise ValueError(f"{text!r} is not a duration such as 1s, 500ms or 1h30m")
    nanoseconds = sum(float(number) * _NANOSECONDS[unit] for number, unit in parts)
    if nanoseconds >= _LONGEST:
        raise ValueError(f"{text!r} is longer than a duration can be (292 years)")
    return nanoseconds / _SECOND


def format_duration(seconds: float) -> str:
    """Write seconds as Go writes a duration: `0s`, `500ms`, `15m0s`, `24h0m0s`."""
    nanoseconds = round(seconds * _SECOND)
    for unit, size in (("ns", 1), ("µs", 1_000), ("ms", 1_000_000)):
        if 0 < nanoseconds < 1_000_000_000 and nanoseconds < size * 1000:
            return f"{_decimal(nanoseconds, size)}{unit}"
    minutes, rest = divmod(nanoseconds, 60_000_000_000)
    text = f"{_decimal(rest, 1_000_000_000)}s"
    if minutes:
        hours, minutes = divmod(minutes, 60)
        text = f"{hours}h{minutes}m{text}" if hours else f"{minutes}m{text}"
    return text


def _decimal(count: int, size: int) -> str:
    whole, rest = divmod(count, size)
    digits = f"{rest:0{len(str(size)) - 1}d}".rstrip("0") if rest else ""
    return f"{whole}.{digits}" if digits else str(whole)
