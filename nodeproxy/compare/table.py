"""Owns what a comparison looks like in a terminal: the answer, figures side by side, each disagreement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from nodeproxy.cluster.findings import printable, printable_lines
from nodeproxy.compare import page
from nodeproxy.compare.results import Comparison, Difference, ModeResult

SHOWN: Final = 20
"""So many disagreements are shown; JSON and HTML have all."""


def show(comparison: Comparison, console: Console) -> None:
    """Print everything."""
    console.print(Group(*_parts(comparison)))


def _parts(comparison: Comparison) -> Iterator[RenderableType]:
    scope = comparison.scope
    yield Text(printable(f"{comparison.origin}, node {comparison.node}"))
    yield Text(
        f"{scope.services} Services, {scope.service_ports} Service ports with {scope.frontends} frontends and "
        f"{scope.endpoints} endpoints (by family); {scope.words}"
    )
    for one in comparison.adapted:
        yield Text(f"in the throw-away node: {printable(one)}", style="dim")
    yield _modes(comparison.modes)
    for mode in comparison.modes:
        yield from (Text(f"{mode.name}: {note}", style="dim") for note in mode.notes)
        if mode.error:
            yield Text(f"{mode.name} failed: {printable(mode.error)}", style="bold red")
    for name, reason in comparison.not_run.items():
        yield Text(f"{name} was not compared: {reason}", style="yellow")
    if comparison.left_out:
        yield Text(f"{comparison.left_out} objects or files cannot be read, and are left out", style="yellow")
    if parts := comparison.refused[comparison.left_out :]:
        yield Text(f"{len(parts)} parts of objects cannot be programmed, such as: {printable(parts[0])}")
    yield from _by_design(comparison.by_design)
    if comparison.disagreements:
        yield _disagreements(comparison.disagreements)
    yield Text(page.verdict(comparison), style="bold red" if comparison.failed else "bold green")


def _modes(modes: Sequence[ModeResult]) -> Table:
    table = Table(pad_edge=False, box=None, header_style="bold")
    table.add_column("")
    for mode in modes:
        table.add_column(mode.name, justify="right", overflow="fold")
    for row in (*page.figures(modes), *_agreement(modes)):
        table.add_row(row.name, *row.cells)
    return table


def _agreement(modes: Sequence[ModeResult]) -> Iterator[page.FigureRow]:
    """How many probes were sent, how many senders of a frontend met what they should, balance, affinity."""

    def row(name: str, cells: Iterator[str]) -> page.FigureRow:
        return page.FigureRow(name, tuple(cells))

    yield row("Ran on", (mode.where for mode in modes))
    yield row("Took", (f"{mode.seconds:.0f} s" for mode in modes))
    yield row("Frontends probed", (str(len(mode.frontends)) for mode in modes))
    yield row("Probes", (str(mode.probes) for mode in modes))
    yield row("Senders that met what they should", (_met(mode) for mode in modes))
    yield row("Frontends with even balance", (_balance(mode) for mode in modes))
    yield row("Balance, least p of chi-square", (_least(mode) for mode in modes))
    yield row("Clients that kept their endpoint (affinity)", (_affinity(mode) for mode in modes))


def _met(mode: ModeResult) -> str:
    probes = [probe for frontend in mode.frontends for probe in frontend.probes]
    return f"{sum(probe.agrees for probe in probes)} of {len(probes)}"


def _balance(mode: ModeResult) -> str:
    found = [frontend.balance for frontend in mode.frontends if frontend.balance is not None]
    if not found:
        return "-"
    exact = ", to one connection" if all(one.exact for one in found) else ""
    return f"{sum(one.even for one in found)} of {len(found)}{exact}"


def _least(mode: ModeResult) -> str:
    found = [one.balance.p_value for one in mode.frontends if one.balance is not None and not one.balance.exact]
    return f"{min(found):.2g}" if found else "-"


def _affinity(mode: ModeResult) -> str:
    found = [frontend.affinity for frontend in mode.frontends if frontend.affinity is not None]
    return f"{sum(one.kept for one in found)} of {sum(one.clients for one in found)}" if found else "-"


def _by_design(found: Sequence[Difference]) -> Iterator[Text]:
    groups: dict[tuple[str, str], list[Difference]] = {}
    for one in found:
        groups.setdefault((one.mode, one.reason), []).append(one)
    for (mode, reason), members in groups.items():
        yield Text(f"{mode} differs by design, {len(members)} times: {reason}", style="dim")


def _disagreements(found: Sequence[Difference]) -> Table:
    left = len(found) - SHOWN
    title = f"{len(found)} disagreements" + (f", {SHOWN} of them shown (--output json has all)" if left > 0 else "")
    table = Table(title=title, title_justify="left", title_style="bold red", show_lines=True)
    for name in ("mode", "Service port, frontend, sender", "what is wrong", "expected / seen / other modes"):
        table.add_column(name, overflow="fold")
    for one in found[:SHOWN]:
        others = "".join(f"\n{mode}: {text}" for mode, text in one.other_modes.items())
        what = f"{one.service_port}\n{one.frontend}\n{one.sender}"
        told = f"expected: {one.expected}\nseen: {one.seen}{others}"
        table.add_row(one.mode, *(escape(printable_lines(text)) for text in (what, one.reason, told)))
    return table
