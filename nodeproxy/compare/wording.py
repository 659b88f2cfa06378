"""Owns how figures and lists are written for people, in the terminal and in HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable


def number(value: float) -> str:
    """A figure as people read it: three digits that count, thousands apart (by a thin space), no exponent."""
    if not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    rounded = f"{value:,.{digits}f}".replace(",", "\N{THIN SPACE}")
    return rounded.rstrip("0").rstrip(".") if "." in rounded else rounded


def seconds(value: float | None) -> str:
    """In the unit in which it reads best; nothing for None."""
    if value is None:
        return ""
    if value >= 1:
        return f"{number(value)} s"
    return f"{number(value * 1e3)} ms" if value >= 1e-3 else f"{number(value * 1e6)} µs"


def megabytes(value: int | None) -> str:
    """In MB (10^6 bytes); nothing for None."""
    return "" if value is None else f"{number(value / 1e6)} MB"


def probability(value: float) -> str:
    """A chance: two digits, and `< 0.0001` below."""
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def whole(value: int) -> str:
    """All digits, thousands apart by a thin space."""
    return f"{value:,}".replace(",", "\N{THIN SPACE}")


def counted(many: int, noun: str) -> str:
    """`1 disagreement`, `2 disagreements`."""
    return f"{whole(many)} {noun}{'' if many == 1 else 's'}"


def words_of(names: Iterable[str]) -> str:
    """`a, b and c`."""
    listed = list(names)
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}" if listed else ""


def capital(text: str) -> str:
    """With a capital letter in front, the rest as it is."""
    return text[:1].upper() + text[1:]
