"""Owns the plots of a benchmark: one SVG file of bars by agent, of lines by number of Services, and of all samples."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from hack.bench.results import Contest, Report, Run
from nodeproxy.compare.plots import Plot, bars, cumulative, groups, lines, standalone

_WIDTH: Final = 580

ContestT = TypeVar("ContestT", bound=Contest)


def write(file: Path, report: Report) -> None:
    """Write the SVG file; its directory is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(standalone(plots(report), columns=2), encoding="utf-8")


def plots(report: Report) -> list[Plot | None]:
    """A plot of everything that there are figures for, None for the rest."""
    found: list[Plot | None] = []
    for shape in report.shapes:
        found += _startup(_shape(shape), _named(run for run in report.runs if run.shape == shape))
    found += _scale(report.runs) + _rolling(report) + _churn(report) + _connect(report)
    return found


def _startup(shape: str, runs: dict[str, Run]) -> list[Plot | None]:
    palette = list(runs)

    def bar(title: str, unit: str, values: dict[str, float]) -> Plot | None:
        return bars(f"{title}: {shape}", unit, values, palette=palette, width=_WIDTH)

    changes = {name: [second * 1e3 for second in run.changes.seconds] for name, run in runs.items() if run.changes}
    return [
        bar("First sync, s", "s", {name: run.first_sync.seconds for name, run in runs.items() if run.first_sync}),
        bar(
            "CPU until first sync, s", "s", {name: run.first_sync.cpu.total for name, run in runs.items() if run.first_sync}
        ),
        bar(
            "One endpoint change, median, ms",
            "ms",
            {name: run.changes.spread.median * 1e3 for name, run in runs.items() if run.changes},
        ),
        cumulative(f"One endpoint change, all samples: {shape}", "ms", changes, palette=palette, width=_WIDTH),
        bar(
            "CPU per change, ms",
            "ms",
            {name: run.changes.cpu_per_change.total * 1e3 for name, run in runs.items() if run.changes},
        ),
        bar(
            "Resident memory, MB", "MB", {name: run.memory.rss_kib * 1024 / 1e6 for name, run in runs.items() if run.memory}
        ),
        bar("Idle CPU, ms per minute", "ms", {name: run.idle.cpu_ms_per_minute for name, run in runs.items() if run.idle}),
        bar("IPv4 rules", "", {name: float(run.rules["ipv4"].rules) for name, run in runs.items() if "ipv4" in run.rules}),
        bar("Virtual servers", "", {name: float(run.ipvs.virtual_servers) for name, run in runs.items() if run.ipvs}),
    ]


def _scale(runs: Sequence[Run]) -> list[Plot | None]:
    """How figures grow with the number of Services, of so many endpoints each; where there are three numbers at least."""
    found: list[Plot | None] = []
    for endpoints in sorted({run.endpoints for run in runs}):
        of_these = [run for run in runs if run.endpoints == endpoints]
        if len({run.services for run in of_these}) < 3:
            continue
        palette = list(dict.fromkeys(run.title for run in of_these))

        def line(title: str, unit: str, values: Iterable[tuple[Run, float]], palette: list[str] = palette) -> Plot | None:
            series = _by_services((run.title, run.services, value) for run, value in values)
            return lines(title, unit, series, x_title="Services", log_x=True, log_y=True, palette=palette, width=_WIDTH)

        of_each = f"against Services of {endpoints} endpoints"
        found += [
            line(f"First sync {of_each}", "s", [(run, run.first_sync.seconds) for run in of_these if run.first_sync]),
            line(
                f"One change {of_each}, median",
                "ms",
                [(run, run.changes.spread.median * 1e3) for run in of_these if run.changes],
            ),
            line(
                f"CPU per change {of_each}",
                "ms",
                [(run, run.changes.cpu_per_change.total * 1e3) for run in of_these if run.changes],
            ),
            line(
                f"Resident memory {of_each}",
                "MB",
                [(run, run.memory.rss_kib * 1024 / 1e6) for run in of_these if run.memory],
            ),
        ]
    return found


def _rolling(report: Report) -> list[Plot | None]:
    found: list[Plot | None] = []
    for shape, named in _shapes(report.rolling):
        palette = list(named)
        joined = {name: [second * 1e3 for second in one.joined_seconds] for name, one in named.items()}
        left = {name: [second * 1e3 for second in one.left_seconds] for name, one in named.items()}
        cpu = {name: one.cpu_per_write * 1e3 for name, one in named.items() if one.cpu}
        found += [
            cumulative(f"Rolling update, new pod gets connections: {shape}", "ms", joined, palette=palette, width=_WIDTH),
            cumulative(f"Rolling update, old pod gets no more: {shape}", "ms", left, palette=palette, width=_WIDTH),
            bars(f"Rolling update, CPU per write, ms: {shape}", "ms", cpu, palette=palette, width=_WIDTH),
        ]
    return found


def _churn(report: Report) -> list[Plot | None]:
    found: list[Plot | None] = []
    for shape, named in _shapes(report.churn):
        palette = list(named)
        rate = "/".join(f"{rate:g}" for rate in sorted({one.rate for one in named.values()}))
        title = f"Churn at {rate} changes/s"
        latency = {name: [second * 1e3 for second in one.latency_seconds] for name, one in named.items()}
        core = {name: one.core_percent for name, one in named.items() if one.cpu}
        memory = {
            name: {"before": one.rss_before_kib * 1024 / 1e6, "after": one.rss_after_kib * 1024 / 1e6}
            for name, one in named.items()
            if one.rss_after_kib
        }
        found += [
            cumulative(f"{title}, latency of a change: {shape}", "ms", latency, palette=palette, width=_WIDTH),
            bars(f"{title}, CPU, % of a core: {shape}", "%", core, palette=palette, width=_WIDTH),
            groups(f"{title}, resident memory, MB: {shape}", "MB", memory, palette=palette, width=_WIDTH),
        ]
    return found


def _connect(report: Report) -> list[Plot | None]:
    """connect() to the Service that is last in the kernel: bars, or lines where there are three numbers of Services."""
    last = [
        (run.title, target.services, target.spread.median)
        for run in report.connect
        for target in run.targets
        if target.position == "last"
    ]
    series = _by_services(last)
    if len({services for _, services, _ in last}) < 3:
        values = {title: {f"last of {x:.0f}": y for x, y in points} for title, points in series.items()}
        return [groups("connect(), median, µs", "µs", values, width=_WIDTH)]
    title = "connect() to the last Service, median"
    return [lines(title, "µs", series, x_title="Services", log_x=True, log_y=True, width=_WIDTH)]


def _shape(shape: tuple[int, int]) -> str:
    services, endpoints = shape
    return f"{services} Services x {endpoints} endpoints"


def _shapes(contests: Sequence[ContestT]) -> list[tuple[str, dict[str, ContestT]]]:
    shapes = sorted({one.shape for one in contests})
    return [(_shape(shape), _named(one for one in contests if one.shape == shape)) for shape in shapes]


def _named(contests: Iterable[ContestT]) -> dict[str, ContestT]:
    """By title, with the number of the round where there are several of one title."""
    named: dict[str, ContestT] = {}
    rounds: defaultdict[str, int] = defaultdict(int)
    for one in contests:
        rounds[one.title] += 1
        number = rounds[one.title]
        named[one.title if number == 1 else f"{one.title} #{number}"] = one
    return named


def _by_services(values: Iterable[tuple[str, int, float]]) -> dict[str, list[tuple[float, float]]]:
    """Series by title; of several values for one number of Services the median."""
    samples: defaultdict[str, defaultdict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for title, services, value in values:
        samples[title][services].append(value)
    return {
        title: [(float(services), statistics.median(found)) for services, found in sorted(by_services.items())]
        for title, by_services in samples.items()
    }
