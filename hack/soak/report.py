"""Owns showing what clients noticed, as a table, and as JSON together with where it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from hack.soak.events import EVENTS
from hack.soak.runs import Row

_COLUMNS = (
    "mode",
    "event",
    "times",
    "conn/s",
    "attempts",
    "failed",
    "reset",
    "wrong",
    "longest stall",
    "slowest request",
    "slowest line of a stream",
    "",
)


class Trouble(Struct, frozen=True):
    """An event that could not be carried out."""

    event: str
    way: str
    error: str


class Soak(Struct):
    """All rows of one machine."""

    command: str
    machine: str
    started: str
    rows: list[Row] = []
    troubles: list[Trouble] = []


def way_of(row: Row) -> str:
    """Mode and variant in a word: legacy, nft, ipvs (nft), ipvs-legacy."""
    if row.mode == "iptables":
        return row.variant
    return row.mode if row.variant == "nft" else f"{row.mode}-{row.variant}"


def _cells(row: Row) -> list[str]:
    borne = f" ({row.borne} in {row.gap:.2f} s)" if row.borne else ""
    verdict = "NOT AS IT MUST BE" if row.bad else "ok" if row.planned else "healed"
    return [
        way_of(row),
        EVENTS[row.event].title,
        str(row.times),
        f"{row.rate:.0f}",
        str(row.attempts),
        f"{row.failed}{borne}",
        str(row.reset),
        str(row.wrong),
        f"{row.stall * 1000:.0f} ms",
        f"{row.slowest * 1000:.0f} ms",
        f"{row.stream_stall * 1000:.0f} ms",
        verdict,
    ]


def show(console: Console, rows: Sequence[Row]) -> None:
    """Print a table, and below it all that failed and must not have."""
    table = Table(*_COLUMNS, title="What clients noticed")
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)
    for row in rows:
        explain(console, row)


def explain(console: Console, row: Row) -> None:
    """What failed in a row and must not have, and what happened when."""
    if not row.bad:
        return
    console.print(f"{EVENTS[row.event].title}, {way_of(row)}; a generator was held up for {row.late * 1000:.0f} ms at most;")
    console.print(f"conntrack: {row.conntrack}")
    for line in (*row.timeline, *row.wanting, *row.slow, *row.traces):
        console.print(f"    {line}", highlight=False, markup=False)


def read(file: Path) -> Soak:
    """A report that was written with `write`."""
    return msgspec.json.decode(file.read_bytes(), type=Soak)


def write(file: Path, soak: Soak) -> None:
    """As JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(msgspec.json.format(msgspec.json.encode(soak), indent=1))
