"""Owns the figures as text: all that ran with one state side by side, or, of several sizes, one below the other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console

from hack.bench.figures import CHURN_LINES, CONNECT_TARGET, ROLLING_LINES, RUN_LINES, SIZE_LINES, TARGET_SHAPE, Line
from hack.bench.grid import Cell, Grid
from hack.bench.node import Result
from hack.bench.results import ConnectRun, Report, Run

_OURS = "nodeproxy"
_GROWS = 1.5  # so many times as much for the greatest size as for the least is more than some
_SIGNIFICANT = 3.0  # standard errors
_RATIO_NOTE = "(…x): times the figure of kube-proxy in the same mode and variant, from the same source, in the same run"


def show(console: Console, report: Report) -> None:
    """Print everything, and what went wrong."""
    for grid in grids(report):
        console.print(grid.table())
    for line in dependence(report):
        console.print(line, highlight=False)
    for _, title, error in report.failed:
        console.print(f"{title}: {error}", highlight=False, markup=False, style="red")


def markdown(report: Report) -> str:
    """The same as a markdown file: how it was measured, the tables, and what went wrong."""
    parts = []
    for part in report.parts:
        machine = part.machine
        parts.append(f"`{part.command}`\n")
        parts.append(
            f"{part.started}, Linux {machine.kernel}, {_cores(machine.cores)}, {machine.iptables}, Python {machine.python}, "
            f"load average before {machine.load_average:g}\n"
        )
    parts += [grid.markdown() for grid in grids(report)]
    parts += [f"- {line}" for line in dependence(report)]
    parts += [f"- {title}: {error.splitlines()[0]}" for _, title, error in report.failed]
    return "\n".join(parts).rstrip() + "\n"


def grids(report: Report) -> Iterator[Grid]:
    """All tables that there are figures for."""
    where = "; ".join(dict.fromkeys(_machine(report, part.modes) for part in report.parts))
    if len(report.shapes) > 1:
        yield sizes_grid(report, where)
    elif report.runs:
        yield side_by_side(_state(report.runs[0].shape, where), report.runs, RUN_LINES)
    for shape in sorted({one.shape for one in report.rolling}):
        rolled = [one for one in report.rolling if one.shape == shape]
        how = f"Rolling update of {rolled[0].replicas} pods that end {rolled[0].grace_seconds:g} s after they terminate"
        yield side_by_side(f"{how}: {_state(shape, where)}", rolled, ROLLING_LINES)
    for shape in sorted({one.shape for one in report.churn}):
        churned = [one for one in report.churn if one.shape == shape]
        how = f"Churn, {churned[0].rate:g} endpoints moved a second for {max(one.seconds for one in churned):.0f} s"
        yield side_by_side(f"{how}: {_state(shape, where)}", churned, CHURN_LINES)
    if report.connect:
        yield connect_grid(report.connect)


def side_by_side(title: str, results: Sequence[Result], lines: Sequence[Line[Result]]) -> Grid:
    """A column for each; green and red are nodeproxy's figures within and beyond the target for 5,000 x 10."""
    judged = results[0].shape == TARGET_SHAPE and any(line.target() for line in lines)
    heads = [f"{one.agent}\n{one.way}\n{one.source}" for one in results]
    grid = Grid(title, ["", *heads, *(["target"] if judged else [])])
    for line in lines:
        figures = [line.figure(one) for one in results]
        if any(figure is not None for figure in figures):
            cells = [_cell(line, one, figure, results) for one, figure in zip(results, figures, strict=True)]
            grid.add(line.title, *cells, *([line.target()] if judged else []))
    if not grid.rows:
        grid.add("", *(_lack(one) for one in results))
    if any("x)" in cell.text for row in grid.rows for cell in row):
        grid.notes.append(_RATIO_NOTE)
    return grid


def _cell(line: Line[Result], result: Result, figure: float | None, results: Sequence[Result]) -> Cell:
    if figure is None:
        return Cell(_lack(result))
    text = line.text(figure)
    if result.agent != _OURS:
        return Cell(text)
    ratio = None
    if line.compared and (theirs := _peers_figure(results, result, line.figure)):
        ratio = figure / theirs
        text += f" ({ratio:.{2 if ratio >= 0.1 else 3}f}x)"
    good: list[bool] = []
    if result.shape == TARGET_SHAPE and result.mode == "iptables":
        if (limit := line.limits.get(result.variant)) is not None:
            good.append(figure <= limit)
        if (share := line.shares.get(result.variant)) is not None and ratio is not None:
            good.append(ratio <= share)
    return Cell(text, all(good) if good else None)


def _lack(result: Result) -> str:
    """Why a figure is missing, in short."""
    if not result.timed_out:
        return "failed" if result.error else "-"
    return "not run" if (result.error or "").startswith("not run") else "timed out"


def _peers_figure(results: Sequence[Result], ours: Result, figure: Callable[[Result], float | None]) -> float | None:
    """That of the first peer of the same shape, mode, variant and source; of several rounds the median."""
    alike = [one for one in results if one.agent != _OURS and _key(one) == _key(ours)]
    names = list(dict.fromkeys(one.agent for one in alike))
    values = [value for one in alike if one.agent == names[0] and (value := figure(one)) is not None]
    return statistics.median(values) if values else None


def _key(result: Result) -> tuple[tuple[int, int], str, str]:
    return result.shape, result.way, result.source


def sizes_grid(report: Report, where: str) -> Grid:
    """A line for each run, by size, and in the lines of others the ratio of nodeproxy's figure to theirs."""
    runs = report.runs
    lines = [line for line in SIZE_LINES if any(line.figure(run) is not None for run in runs)]
    with_peers = any(run.agent != _OURS for run in runs)
    heads = []
    for line in lines:
        heads.append(line.title.strip().replace(", ", ",\n"))
        heads += ["ours /\ntheirs"] if line.compared and with_peers else []
    endpoints = {endpoints for _, endpoints in report.shapes}
    names = _names(runs)
    each = f" x {next(iter(endpoints))} endpoints" if len(endpoints) == 1 else " x endpoints"
    sizes = ", ".join(_size(shape, len(endpoints)) for shape in report.shapes)
    grid = Grid(f"{sizes} Services{each}, {where}", ["Services", "", *heads], labels=2)
    for shape in report.shapes:
        for run in (run for run in runs if run.shape == shape):
            cells: list[str] = []
            for line in lines:
                figure = line.figure(run)
                cells.append(_lack(run) if figure is None else line.text(figure))
                if line.compared and with_peers:
                    ratio = _ratio(runs, run, line.figure)
                    cells.append(f"{ratio:.3f}" if ratio is not None else "")
            grid.add(_size(shape, len(endpoints)), names[run.title], *cells)
        grid.sections.add(len(grid.rows) - 1)
    return grid


def _size(shape: tuple[int, int], kinds: int) -> str:
    return f"{shape[0]:,}" if kinds == 1 else f"{shape[0]:,} x {shape[1]}"


def _ratio(runs: Sequence[Run], peer: Run, figure: Callable[[Run], float | None]) -> float | None:
    """nodeproxy's figure over that of another run; of several rounds the median."""
    ours = [value for run in runs if run.agent == _OURS and _key(run) == _key(peer) and (value := figure(run)) is not None]
    theirs = figure(peer)
    return statistics.median(ours) / theirs if peer.agent != _OURS and ours and theirs else None


def _state(shape: tuple[int, int], where: str) -> str:
    return f"{shape[0]:,} Services x {shape[1]} endpoints, {where}"


def _machine(report: Report, modes: Sequence[str]) -> str:
    """What a part ran on; with its mode where parts ran on different machines."""
    machine = next(part.machine for part in report.parts if part.modes == modes)
    text = _cores(machine.cores)
    machines = {(part.machine.cores, part.machine.kernel) for part in report.parts}
    return text if len(machines) == 1 else f"{', '.join(modes)}: {text}, Linux {machine.kernel}"


def _cores(cores: int) -> str:
    return f"{cores} core{'s' if cores > 1 else ''}"


def _names(runs: Sequence[Run]) -> dict[str, str]:
    """A name for each title: of mode, variant and source only what differs."""
    ways, sources = len({run.way for run in runs}) > 1, len({run.source for run in runs}) > 1
    return {
        run.title: " ".join([run.agent, *([run.way] if ways else []), *([f"({run.source})"] if sources else [])])
        for run in runs
    }


def dependence(report: Report) -> Iterator[str]:
    """For each agent, whether the CPU time of a change depends on the number of Services; all with standard errors.

    Of several numbers of endpoints, that with most sizes.
    """
    each = statistics.multimode([endpoints for _, endpoints in report.shapes])
    runs = [run for run in report.runs if run.endpoints == each[0]] if each else []
    for title, name in _names(runs).items():
        samples: dict[int, list[float]] = {}
        for run in runs:
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


def connect_grid(runs: Sequence[ConnectRun]) -> Grid:
    """Medians of connect(), in microseconds."""
    places = sorted({(target.services, target.position) for run in runs for target in run.targets})
    heads = [f"{position} of\n{services:,}" for services, position in places]
    title = f"connect(), median in µs (target: last of most within {CONNECT_TARGET} of last of fewest)"
    grid = Grid(title, ["", *heads, "last/last"])
    for run in runs:
        medians = {(target.services, target.position): f"{target.spread.median:.1f}" for target in run.targets}
        ratio = Cell(f"{run.ratio:.2f}", run.ratio <= CONNECT_TARGET if run.agent == _OURS else None) if run.ratio else "-"
        grid.add(run.title, *(medians.get(place, "-") for place in places), ratio)
    return grid
