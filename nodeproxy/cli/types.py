"""Owns the forms in which kube-proxy's flags are written: Go durations, comma-separated lists, booleans, empty values."""

from __future__ import annotations

from typing import Any

import click

from nodeproxy.configuration.durations import parse_duration


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


class ChoiceOrEmpty(click.Choice[str]):
    """One of some words, or empty text, which kube-proxy takes for «not given»."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return "" if value == "" else super().convert(value, param, ctx)


def split_lists(_ctx: click.Context, _param: click.Parameter, values: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """Callback of a repeated StringList option: all values in one tuple."""
    return tuple(part for value in values for part in value)


def normalise(arguments: list[str]) -> list[str]:
    """Accept what Go's pflag accepts and click does not: `-v=2`, `--v=2`, `-v2`, `--v 2`, and `_` for `-` in names."""
    result: list[str] = []
    for argument in arguments:
        name, separator, value = argument.partition("=")
        if name in ("-v", "--v"):
            result += ["-v", value] if separator else ["-v"]
        elif name.startswith("--"):
            result.append(f"{name.replace('_', '-')}{separator}{value}")
        else:
            result.append(argument)
    return result
