"""Owns the command line of the benchmark as a struct, the types of its values, and what `--quick` makes of its defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import click

from nodeproxy.sandbox.agent import Variant

MODES: Final = ("iptables", "ipvs")
SCENARIOS: Final = ("startup", "change", "idle", "rolling", "churn", "scale", "connect")
TIMEOUTS: Final = {"iptables": 300.0, "ipvs": 900.0}
QUICK: Final[dict[str, Any]] = {
    "scenarios": ",".join(SCENARIOS),
    "services": "20",
    "endpoints": 2,
    "changes": 2,
    "shapes": "40x1",
    "replicas": 3,
    "grace": 0.3,
    "churn_rate": 20.0,
    "churn_seconds": 2.0,
    "connect_services": "3,30",
    "connections": 100,
    "idle": 1.0,
}

Shapes = list[tuple[int, int]]


class Words(click.ParamType[list[str]]):
    """Some of a few words, separated by commas, each once; `all` is all of them."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = allowed
        self.name = ",".join(allowed)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        words = list(dict.fromkeys(word.strip() for word in str(value).split(",") if word.strip()))
        if words == ["all"]:
            return list(self._allowed)
        if not words or not set(words) <= set(self._allowed):
            self.fail(f"{value}: choose from {', '.join(self._allowed)}", param, ctx)
        return words


class Sizes(click.ParamType[list[int]]):
    """Some numbers from 1 on, separated by commas: each once, the least first."""

    name = "number,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        try:
            numbers = sorted({int(part) for part in str(value).split(",")})
        except ValueError:
            numbers = []
        if not numbers or numbers[0] < 1:
            self.fail(f"{value}: numbers from 1 on, separated by commas", param, ctx)
        return numbers


class ShapesType(click.ParamType[Shapes]):
    """Some of `SERVICESxENDPOINTS`, separated by commas, each once."""

    name = "SERVICESxENDPOINTS,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Shapes:
        try:
            parts = [part.strip().lower().split("x") for part in str(value).split(",")]
            shapes = list(dict.fromkeys((int(services), int(endpoints)) for services, endpoints in parts))
        except ValueError:
            shapes = []
        if not shapes or min(min(shape) for shape in shapes) < 1:
            self.fail(f"{value}: as 1000x10,5000x50", param, ctx)
        return shapes


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    modes: list[str]
    scenarios: list[str]
    services: list[int]
    endpoints: int
    changes: int
    shapes: Shapes
    variants: list[Variant] | None
    sources: list[str]
    peers: tuple[str, ...]
    replicas: int
    grace: float
    churn_rate: float
    churn_seconds: float
    connect_services: list[int]
    connections: int
    idle: float
    rounds: int
    timeout: float | None
    floor: bool
    profile: bool
    quick: bool

    def variants_of(self, mode: str) -> list[Variant]:
        """Which iptables a mode is measured with."""
        return self.variants or (["nft"] if mode == "ipvs" else ["legacy", "nft"])

    def timeout_of(self, mode: str) -> float:
        """Seconds that a first sync may take on a machine of usual speed."""
        return self.timeout or TIMEOUTS[mode]

    @property
    def periodic(self) -> bool:
        """Whether agents sync every now and then, as by default: while idling, that is what they do."""
        return "idle" in self.scenarios


def use_quick(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    """Callback of the eager flag `--quick`: other defaults, which every other option still goes before."""
    if value:
        ctx.default_map = QUICK
    return value
