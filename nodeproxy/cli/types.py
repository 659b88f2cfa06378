"""Owns the forms in which kube-proxy's flags are written: Go durations, comma-separated lists, booleans."""

from __future__ import annotations

import re
from typing import Any

import click

_DURATION_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(text: str) -> float:
    """Seconds in a Go duration such as `1s`, `500ms` or `1h30m`; `0` needs no unit. Raises ValueError."""
    if text in ("0", "+0", "-0"):
        return 0.0
    parts = _DURATION_PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is not a duration such as 1s, 500ms or 1h30m")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


class Duration(click.ParamType[float]):
    """A Go duration, in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, int | float):
            return float(value)
        try:
            return parse_duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class StringList(click.ParamType[tuple[str, ...]]):
    """Comma-separated text, as a tuple."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(part.strip() for part in value.split(",") if part.strip())


def split_lists(_ctx: click.Context, _param: click.Parameter, values: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """Callback of a repeated StringList option: all values in one tuple."""
    return tuple(part for value in values for part in value)


def normalise(arguments: list[str]) -> list[str]:
    """Accept what Go's pflag accepts and click does not: `-v=2`, `--v=2`, `-v2` and `--v 2`."""
    result: list[str] = []
    for argument in arguments:
        if argument.startswith("-v=") or argument.startswith("--v="):
            result += ["-v", argument.split("=", 1)[1]]
        elif argument == "--v":
            result.append("-v")
        else:
            result.append(argument)
    return result
