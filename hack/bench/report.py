"""Owns the figures as text: all runs side by side with the project's targets, or, of several sizes, one below the other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from hack.bench.results import Changes, ConnectRun, FirstSync, Idle, IpvsCount, Memory, Report, RuleCount, Run

TARGET_SHAPE = (5000, 10)
CONNECT_TARGET = 1.2

_OURS = "nodeproxy"
_GROWS = 1.5  # so many times as much for the greatest size as for the least is more than some
_SIGNIFICANT = 3.0  # standard errors

_FIRST_SYNC = {"legacy": 3.0, "nft": 5.0}
_CHANGE = {"legacy": 0.2, "nft": 0.05}
_RSS_MB = {"legacy": 150.0, "nft": 150.0}

Figure = Callable[[Run], float | None]


@dataclass(frozen=True)
class _Line:
    """A figure of each run, and the limit in iptables mode that nodeproxy is to keep to, by variant."""

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


def _ipvs(figure: Callable[[IpvsCount], int]) -> Figure:
    return lambda run: figure(run.ipvs) if run.ipvs else None


def _idle(figure: Callable[[Idle], float]) -> Figure:
    return lambda run: figure(run.idle) if run.idle else None


_FIRST = _Line("first sync, s", _sync(lambda sync: sync.seconds), "{:.2f}", _FIRST_SYNC)
_MEDIAN = _Line("one change, median, s", _change(lambda changes: changes.spread.median), "{:.4f}", _CHANGE)
_CPU = _Line("CPU per change, s", _change(lambda changes: changes.cpu_per_change.total), "{:.4f}")
_RESIDENT = _Line("RSS, MB", _memory(lambda memory: memory.rss_kib), "{:.0f}", _RSS_MB)
_P99 = _Line("  99 of 100, s", _change(lambda changes: changes.spread.p99), "{:.4f}")
_COUNTS = (
    _Line("virtual servers", _ipvs(lambda count: count.virtual_servers), "{:,}"),
    _Line("real servers", _ipvs(lambda count: count.real_servers), "{:,}"),
    _Line("set entries", _ipvs(lambda count: count.set_entries), "{:,}"),
    _Line("addresses", _ipvs(lambda count: count.addresses), "{:,}"),
    _Line("IPv4 rules", _rules(lambda count: count.rules), "{:,}"),
)
_IDLE = _Line("idle CPU, ms per min", _idle(lambda idle: idle.cpu_ms_per_minute), "{:.1f}")
_IDLING = (
    _IDLE,
    _Line("  % of a core", _idle(lambda idle: idle.core_percent), "{:.3f}"),
    _Line("  switches per s", _idle(lambda idle: idle.switches_per_second), "{:.2f}"),
    _Line("  RSS before, MB", _idle(lambda idle: idle.rss_before_kib * 1024 / 1e6), "{:.1f}"),
    _Line("  RSS after, MB", _idle(lambda idle: idle.rss_after_kib * 1024 / 1e6), "{:.1f}"),
)

_LINES = (
    _FIRST,
    _Line("  answered, s", _sync(lambda sync: sync.answered_seconds), "{:.2f}"),
    _Line("  own CPU, s", _sync(lambda sync: sync.cpu.own), "{:.2f}"),
    _Line("  children's CPU, s", _sync(lambda sync: sync.cpu.children), "{:.2f}"),
    _Line("  iptables-restore alone, s", _sync(lambda sync: sync.floor_seconds), "{:.2f}"),
    _MEDIAN,
    _P99,
    _Line("  least, s", _change(lambda changes: changes.spread.min), "{:.4f}"),
    _Line("  greatest, s", _change(lambda changes: changes.spread.max), "{:.4f}"),
    _CPU,
    _Line("  own, s", _change(lambda changes: changes.cpu_per_change.own), "{:.4f}"),
    _Line("  children's, s", _change(lambda changes: changes.cpu_per_change.children), "{:.4f}"),
    _RESIDENT,
    _Line("  peak, MB", _memory(lambda memory: memory.peak_kib), "{:.0f}"),
    *_COUNTS,
    _Line("  chains", _rules(lambda count: count.chains), "{:,}"),
    _IDLE,
    _Line("  own, ms per min", _idle(lambda idle: idle.cpu.own / idle.seconds * 60_000), "{:.1f}"),
    *_IDLING[1:],
)
_COMPARED = (_FIRST, _MEDIAN, _CPU, _IDLE)
_COLUMNS = (
    _FIRST,
    _Line("its CPU, s", _sync(lambda sync: sync.cpu.total), "{:.2f}"),
    _MEDIAN,
    _P99,
    _CPU,
    _RESIDENT,
    *_COUNTS,
    *_IDLING,
)


def show(console: Console, report: Report) -> None:
    """Print everything, and what went wrong."""
    if len(report.services) > 1 and report.runs:
        console.print(sizes_table(report))
        for line in dependence(report):
            console.print(line, highlight=False)
    elif report.runs:
        console.print(runs_table(report))
    if report.connect:
        console.print(connect_table(report.connect))
    failed = [(f"{run.title}, {run.services} Services", run.error) for run in report.runs if run.error]
    failed += [(f"{run.agent} {run.variant}, connect", run.error) for run in report.connect if run.error]
    for title, error in failed:
        console.print(f"[red]{title}:[/] {error}", highlight=False)


def runs_table(report: Report) -> Table:
    """A column for each run; green and red are nodeproxy's figures within and beyond the target for 5,000 x 10."""
    [services] = report.services
    has_targets = report.mode == "iptables"
    judged = has_targets and (services, report.endpoints) == TARGET_SHAPE
    table = Table(title=_title(report, f"{services:,}"))
    table.add_column("")
    for run in report.runs:
        table.add_column(f"{run.agent}\n{run.variant}\n{run.source}", justify="right")
    if has_targets:
        target = "target\nlegacy, nft" if judged else f"target at\n{TARGET_SHAPE[0]} x {TARGET_SHAPE[1]}"
        table.add_column(target, justify="right")
    for line in _LINES:
        figures = [line.figure(run) for run in report.runs]
        if any(figure is not None for figure in figures):
            cells = [_cell(line, run, figure, judged) for run, figure in zip(report.runs, figures, strict=True)]
            limits = ", ".join(f"{limit:g}" for limit in dict.fromkeys(line.limits.values()))
            table.add_row(line.title, *cells, *([limits] if has_targets else []))
    return table


def sizes_table(report: Report) -> Table:
    """A line for each run, by size, and in the lines of others the ratio of nodeproxy's figure to theirs."""
    table = Table(title=_title(report, ", ".join(f"{services:,}" for services in report.services)))
    names = _names(report.runs)
    table.add_column("Services", justify="right")
    table.add_column("")
    columns = [line for line in _COLUMNS if any(line.figure(run) is not None for run in report.runs)]
    compared = [line for line in columns if line in _COMPARED and any(run.agent != _OURS for run in report.runs)]
    for line in columns:
        table.add_column(line.title.strip().replace(", ", ",\n"), justify="right")
        if line in compared:
            table.add_column("ours /\ntheirs", justify="right")
    for size in report.services:
        for run in (run for run in report.runs if run.services == size):
            cells: list[str] = []
            for line in columns:
                cells.append(_cell(line, run, line.figure(run), judged=False))
                if line in compared:
                    ratio = _ratio(report, run, line.figure)
                    cells.append(f"{ratio:.3f}" if ratio is not None else "")
            table.add_row(f"{size:,}", names[run.title], *cells)
        table.add_section()
    return table


def _title(report: Report, services: str) -> str:
    mode = "" if report.mode == "iptables" else f"{report.mode.upper()} mode, "
    cores = f"{report.machine.cores} core{'s' if report.machine.cores > 1 else ''}"
    return f"{mode}{services} Services x {report.endpoints} endpoints, {cores}"


def _names(runs: Sequence[Run]) -> dict[str, str]:
    """A name for each title: of variant and source only what differs."""
    variants, sources = len({run.variant for run in runs}) > 1, len({run.source for run in runs}) > 1
    return {
        run.title: " ".join([run.agent, *([run.variant] if variants else []), *([f"({run.source})"] if sources else [])])
        for run in runs
    }


def _ratio(report: Report, peer: Run, figure: Figure) -> float | None:
    """nodeproxy's figure over that of another run, of the same size, variant and source; of several rounds the median."""
    key = (peer.services, peer.variant, peer.source)
    ours = [
        value
        for run in report.runs
        if run.agent == _OURS and (run.services, run.variant, run.source) == key and (value := figure(run)) is not None
    ]
    theirs = figure(peer)
    return statistics.median(ours) / theirs if peer.agent != _OURS and ours and theirs else None


def dependence(report: Report) -> Iterator[str]:
    """For each agent, whether the CPU time of a change depends on the number of Services; all with standard errors."""
    for title, name in _names(report.runs).items():
        samples: dict[int, list[float]] = {}
        for run in report.runs:
            if run.title == title and run.changes:
                samples.setdefault(run.services, []).extend(seconds * 1000 for seconds in run.changes.cpu_seconds)
        sizes = sorted(size for size, of_size in samples.items() if len(of_size) > 1)
        if len(sizes) > 1:
            means = [statistics.fmean(samples[size]) for size in sizes]
            errors = [statistics.stdev(samples[size]) / math.sqrt(len(samples[size])) for size in sizes]
            slope, error = _slope([size / 1000 for size in sizes], means, errors)
            depends = slope > _SIGNIFICANT * error and means[-1] > _GROWS * means[0]
            figures = ", ".join(
                f"{mean:.1f} ± {error:.1f} ms at {size:,}" for size, mean, error in zip(sizes, means, errors, strict=True)
            )
            verdict = "grows with" if depends else "does not depend on"
            yield f"{name}: CPU per change {verdict} the Services: {figures}; {slope:+.2f} ± {error:.2f} ms per 1,000"


def _slope(places: Sequence[float], values: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """Of the straight line through values with these standard errors, and its own standard error."""
    middle = statistics.fmean(places)
    square = sum((place - middle) ** 2 for place in places)
    error = math.sqrt(sum(((place - middle) * error) ** 2 for place, error in zip(places, errors, strict=True))) / square
    return statistics.linear_regression(places, values).slope, error


def _cell(line: _Line, run: Run, figure: float | None, judged: bool) -> str:
    if figure is None:
        return "-"
    text = line.form.format(figure)
    limit = line.limits.get(run.variant)
    if not judged or limit is None or run.agent != _OURS:
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
