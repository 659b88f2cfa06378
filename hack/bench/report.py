"""Owns the figures as text: a table with all runs side by side and the targets of the project beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from hack.bench.results import Changes, ConnectRun, FirstSync, Memory, Report, RuleCount, Run

TARGET_SHAPE = (5000, 10)
CONNECT_TARGET = 1.2

_FIRST_SYNC = {"legacy": 3.0, "nft": 5.0}
_CHANGE = {"legacy": 0.2, "nft": 0.05}
_RSS_MB = {"legacy": 150.0, "nft": 150.0}

Figure = Callable[[Run], float | None]


@dataclass(frozen=True)
class _Line:
    """One line of the table: a figure of each run, and the limit that nodeproxy is to keep to, by variant."""

    title: str
    figure: Figure
    form: str
    limits: Mapping[str, float] = field(default_factory=dict)


def _sync(figure: Callable[[FirstSync], float | None]) -> Figure:
    return lambda run: figure(run.first_sync) if run.first_sync else None


def _change(figure: Callable[[Changes], float]) -> Figure:
    return lambda run: figure(run.changes) if run.changes else None


def _memory(figure: Callable[[Memory], int]) -> Figure:
    return lambda run: figure(run.memory) * 1024 / 1e6 if run.memory else None


def _rules(figure: Callable[[RuleCount], int]) -> Figure:
    return lambda run: figure(run.rules["ipv4"]) if run.rules else None


_LINES = (
    _Line("first sync, s", _sync(lambda sync: sync.seconds), "{:.2f}", _FIRST_SYNC),
    _Line("  first answer, s", _sync(lambda sync: sync.answered_seconds), "{:.2f}"),
    _Line("  own CPU, s", _sync(lambda sync: sync.cpu.own), "{:.2f}"),
    _Line("  children's CPU, s", _sync(lambda sync: sync.cpu.children), "{:.2f}"),
    _Line("  iptables-restore alone, s", _sync(lambda sync: sync.floor_seconds), "{:.2f}"),
    _Line("one change, median, s", _change(lambda changes: changes.spread.median), "{:.4f}", _CHANGE),
    _Line("  least, s", _change(lambda changes: changes.spread.min), "{:.4f}"),
    _Line("  greatest, s", _change(lambda changes: changes.spread.max), "{:.4f}"),
    _Line("  own CPU, s", _change(lambda changes: changes.cpu_per_change.own), "{:.4f}"),
    _Line("  children's CPU, s", _change(lambda changes: changes.cpu_per_change.children), "{:.4f}"),
    _Line("RSS, MB", _memory(lambda memory: memory.rss_kib), "{:.0f}", _RSS_MB),
    _Line("  peak, MB", _memory(lambda memory: memory.peak_kib), "{:.0f}"),
    _Line("IPv4 rules", _rules(lambda count: count.rules), "{:.0f}"),
    _Line("  chains", _rules(lambda count: count.chains), "{:.0f}"),
    _Line("idle CPU, ms/s", lambda run: run.idle.cpu.total / run.idle.seconds * 1000 if run.idle else None, "{:.2f}"),
)


def show(console: Console, report: Report) -> None:
    """Print everything, and what went wrong."""
    if report.runs:
        console.print(runs_table(report))
    if report.connect:
        console.print(connect_table(report.connect))
    failed = [(run.title, run.error) for run in report.runs if run.error]
    failed += [(f"{run.agent} {run.variant}, connect", run.error) for run in report.connect if run.error]
    for title, error in failed:
        console.print(f"[red]{title}:[/] {error}", highlight=False)


def runs_table(report: Report) -> Table:
    """A column for each run; green and red are nodeproxy's figures within and beyond the target for 5,000 x 10."""
    judged = (report.services, report.endpoints) == TARGET_SHAPE
    table = Table(title=f"{report.services} Services x {report.endpoints} endpoints, {report.machine.cores} cores")
    table.add_column("")
    for run in report.runs:
        table.add_column(f"{run.agent}\n{run.variant}\n{run.source}", justify="right")
    table.add_column(
        "target\nlegacy, nft" if judged else f"target at\n{TARGET_SHAPE[0]} x {TARGET_SHAPE[1]}", justify="right"
    )
    for line in _LINES:
        figures = [line.figure(run) for run in report.runs]
        if any(figure is not None for figure in figures):
            cells = [_cell(line, run, figure, judged) for run, figure in zip(report.runs, figures, strict=True)]
            table.add_row(line.title, *cells, ", ".join(f"{limit:g}" for limit in dict.fromkeys(line.limits.values())))
    return table


def _cell(line: _Line, run: Run, figure: float | None, judged: bool) -> str:
    if figure is None:
        return "-"
    text = line.form.format(figure)
    limit = line.limits.get(run.variant)
    if not judged or limit is None or run.agent != "nodeproxy":
        return text
    return f"[{'green' if figure < limit else 'red'}]{text}[/]"


def connect_table(runs: Sequence[ConnectRun]) -> Table:
    """Medians of connect(), in microseconds."""
    table = Table(title=f"connect(), median in µs (target: last of many within {CONNECT_TARGET} of last of few)")
    places = [(target.services, target.position) for target in next((run.targets for run in runs if run.targets), [])]
    table.add_column("")
    for services, position in places:
        table.add_column(f"{position} of\n{services}", justify="right")
    table.add_column("last/last", justify="right")
    for run in runs:
        medians = {(target.services, target.position): f"{target.spread.median:.1f}" for target in run.targets}
        ratio = f"{run.ratio:.2f}" if run.ratio else "-"
        table.add_row(f"{run.agent} {run.variant}", *(medians.get(place, "-") for place in places), ratio)
    return table
