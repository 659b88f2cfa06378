"""Owns a table as plain text cells, and showing it: in a terminal, or as markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True)
class Cell:
    """`good`: within a target or not; None where there is none."""

    text: str
    good: bool | None = None


@dataclass
class Grid:
    """A table whose first columns, `labels` of them, are text, the others figures. `sections`: rows with a line below."""

    title: str
    columns: Sequence[str]
    labels: int = 1
    rows: list[list[Cell]] = field(default_factory=list)
    sections: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: str | Cell) -> None:
        """A row."""
        self.rows.append([cell if isinstance(cell, Cell) else Cell(cell) for cell in cells])

    def table(self) -> Table:
        """For a terminal: green and red are within and beyond a target."""
        table = Table(title=escape(self.title), caption=escape("\n".join(self.notes)) or None)
        for number, column in enumerate(self.columns):
            table.add_column(escape(column), justify="left" if number < self.labels else "right")
        for number, row in enumerate(self.rows):
            table.add_row(*map(_styled, row), end_section=number in self.sections)
        return table

    def markdown(self) -> str:
        """As GitHub shows it; what is beyond a target is bold."""
        heads = [_plain(column.replace("\n", " ")) for column in self.columns]
        lines = [f"### {_plain(self.title)}", "", _row(heads)]
        lines.append(_row("---" if number < self.labels else "---:" for number in range(len(heads))))
        lines += [_row(map(_marked, row)) for row in self.rows]
        for note in self.notes:
            lines += ["", _plain(note)]
        return "\n".join([*lines, ""])


def _styled(cell: Cell) -> str:
    text = escape(cell.text)
    return text if cell.good is None else f"[{'green' if cell.good else 'red'}]{text}[/]"


def _marked(cell: Cell) -> str:
    text = _plain(cell.text)
    return f"**{text}**" if cell.good is False else text


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Nothing in it means anything in markdown tables; an indented label has a dash instead."""
    dash = "- " if text.startswith("  ") else ""
    return dash + text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").strip()
