"""Owns what the HTML page says and in which order: a comparison as rows and groups that the template only has to lay out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from nodeproxy.compare.results import Balance, Comparison, Difference, FrontendResult, ModeResult, Spread, spread_of
from nodeproxy.compare.statistics import p_value
from nodeproxy.compare.wording import capital, counted, megabytes, number, probability, seconds, whole, words_of

FRONTENDS: Final = 2000  # rows of the table of frontends
DIFFERENCES: Final = 300  # each of disagreements and of what differs by design
OPEN_GROUP: Final = 5  # larger groups of differences are folded, after the first
WORST: Final = 8  # frontends by balance, of each mode
_CONNECT_ORDER: Final = ("first", "random", "last")


@dataclass(frozen=True)
class DifferenceGroup:
    """Differences of one mode for one reason. `reason` is that of all, with `…` for what is not the same in all."""

    mode: str
    reason: str
    items: tuple[Difference, ...]
    folded: bool
    same_reason: bool

    @property
    def others(self) -> bool:
        """Whether anything is told of other modes."""
        return any(one.other_modes for one in self.items)


@dataclass(frozen=True)
class Differences:
    """Groups, the largest first, and how many differences there are and how many are shown."""

    groups: tuple[DifferenceGroup, ...]
    total: int
    shown: int


@dataclass(frozen=True)
class FigureRow:
    """One measure, with a text for each mode."""

    name: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class BalanceRow:
    """One frontend in one mode: counts per backend from the busiest to the idlest, in words."""

    mode: str
    service_port: str
    frontend: str
    sender: str
    connections: int
    backends: int
    range: str
    statistic: str
    degrees: int
    p_value: str
    even: bool
    exact: bool


@dataclass(frozen=True)
class BalanceSummary:
    """All of one mode: how many frontends were measured, and how many of them are uneven.

    `together` is in words what chi-square says of all of them at once, which shows what is too little in each to be seen.
    """

    mode: str
    measured: int
    uneven: int
    together: str
    rows: tuple[BalanceRow, ...]


@dataclass(frozen=True)
class AffinityRow:
    """One frontend with session affinity in one mode."""

    mode: str
    service_port: str
    frontend: str
    clients: int
    kept: int
    endpoints: int


@dataclass(frozen=True)
class Cell:
    """What a mode made of a frontend: `state` is one of agrees, differs, design, absent; `word` is it in words."""

    state: str
    word: str
    text: str


@dataclass(frozen=True)
class FrontendRow:
    """A frontend, with a cell for each mode."""

    service_port: str
    frontend: str
    policy: str
    endpoints: int
    cells: tuple[Cell, ...]
    state: str


@dataclass
class Frontends:
    """The table of frontends: those that disagree first, cut at FRONTENDS."""

    rows: list[FrontendRow] = field(default_factory=list)
    total: int = 0


def verdict(comparison: Comparison) -> str:
    """The answer in one sentence."""
    return _verdict(comparison).replace(" (", "\N{NO-BREAK SPACE}(")


def _verdict(comparison: Comparison) -> str:
    broken = [mode.name for mode in comparison.modes if mode.error]
    if comparison.disagreements:
        modes = words_of(dict.fromkeys(one.mode for one in comparison.disagreements))
        said = f"{counted(len(comparison.disagreements), 'disagreement')} in {modes}"
        return f"{said}; {words_of(broken)} could not be run to the end." if broken else f"{said}."
    if broken:
        return f"{words_of(broken)} could not be run to the end."
    if not any(mode.probes for mode in comparison.modes):
        return "Nothing was probed: there is no frontend to compare."
    if len(comparison.modes) == 1:
        return f"{comparison.modes[0].name} does what the forwarding table says."
    return f"{words_of(mode.name for mode in comparison.modes)} agree with the forwarding table and with each other."


def differences(found: Sequence[Difference], *, unfolded: int = 1) -> Differences:
    """By mode and reason, the largest group first. Of large groups so many are not folded."""
    by_kind: dict[tuple[str, str], list[Difference]] = {}
    for one in found:
        by_kind.setdefault((one.mode, _pattern(one.reason)), []).append(one)
    groups: list[DifferenceGroup] = []
    room = DIFFERENCES
    for (mode, pattern), items in sorted(by_kind.items(), key=lambda entry: -len(entry[1])):
        if room <= 0:
            break
        same = len({one.reason for one in items}) == 1
        folded = len(items) > OPEN_GROUP and len(groups) >= unfolded
        reason = items[0].reason if same else pattern
        groups.append(DifferenceGroup(mode, reason, tuple(items[:room]), folded, same))
        room -= len(items)
    return Differences(tuple(groups), len(found), sum(len(group.items) for group in groups))


def figures(modes: Sequence[ModeResult]) -> tuple[FigureRow, ...]:
    """Every measure that at least one mode has."""
    rows = [
        _row("First sync", modes, [seconds(mode.figures.first_sync) for mode in modes]),
        _row("CPU until first sync", modes, [seconds(cpu_total(m.figures.cpu_own, m.figures.cpu_children)) for m in modes]),
        _row("of it by the agent itself", modes, [seconds(mode.figures.cpu_own) for mode in modes]),
        _row("One change, median", modes, [_of(m.figures.change, "p50") for m in modes]),
        _row("One change, p99", modes, [_p99(mode.figures.change) for mode in modes]),
        _row("One change, slowest", modes, [_of(m.figures.change, "most") for m in modes]),
        _row("Changes measured", modes, [number(len(m.figures.changes)) if m.figures.changes else "" for m in modes]),
        _row("CPU per change", modes, [seconds(cpu_per_change(mode)) for mode in modes]),
        _row("Resident memory", modes, [megabytes(mode.figures.rss) for mode in modes]),
        _row("Resident memory, greatest", modes, [megabytes(mode.figures.rss_peak) for mode in modes]),
    ]
    for what in count_names(modes):
        rows.append(_row(capital(what), modes, [_count(mode, what) for mode in modes]))
    for position in positions(modes):
        spreads = [connect_spread(mode, position) for mode in modes]
        for share in ("p50", "p99"):
            cells = [f"{number(getattr(spread, share))} µs" if spread else "" for spread in spreads]
            rows.append(_row(f"connect() to {place_in_words(position)}, {share}", modes, cells))
    return tuple(row for row in rows if any(row.cells))


def balance(modes: Sequence[ModeResult]) -> tuple[BalanceSummary, ...]:
    """Of each mode that was measured: the frontends least likely to be even."""
    found: list[BalanceSummary] = []
    for mode in modes:
        measured = [frontend for frontend in mode.frontends if frontend.balance]
        if not measured:
            continue
        uneven = sum(not frontend.balance.even for frontend in measured if frontend.balance)
        worst = sorted(measured, key=_by_balance)[:WORST]
        rows = tuple(_balance_row(mode.name, one) for one in worst)
        together = _together([frontend.balance for frontend in measured if frontend.balance])
        found.append(BalanceSummary(mode.name, len(measured), uneven, together, rows))
    return tuple(found)


def affinity(modes: Sequence[ModeResult]) -> tuple[AffinityRow, ...]:
    """Every frontend with session affinity, those that lost clients first."""
    rows = [
        AffinityRow(
            mode.name,
            one.service_port,
            one.name,
            one.affinity.clients,
            one.affinity.kept,
            one.affinity.endpoints,
        )
        for mode in modes
        for one in mode.frontends
        if one.affinity
    ]
    return tuple(sorted(rows, key=lambda row: row.kept - row.clients)[:FRONTENDS])


def frontends(modes: Sequence[ModeResult]) -> Frontends:
    """One row for each frontend that any mode was probed at."""
    by_identity: dict[tuple[str, int, str], dict[int, FrontendResult]] = {}
    for column, mode in enumerate(modes):
        for frontend in mode.frontends:
            by_identity.setdefault(frontend.identity, {})[column] = frontend
    rows = [_frontend_row(found, len(modes)) for found in by_identity.values()]
    rows.sort(key=lambda row: _STATES.index(row.state))
    return Frontends(rows[:FRONTENDS], len(rows))


def count_names(modes: Sequence[ModeResult]) -> list[str]:
    """What is counted in the kernel, in the order of the modes."""
    return list(dict.fromkeys(count.what for mode in modes for count in mode.figures.counts))


def positions(modes: Sequence[ModeResult]) -> list[str]:
    """Where in the kernel the ServicePorts are to which connections were timed."""
    there = list(dict.fromkeys(connect.position for mode in modes for connect in mode.figures.connects))
    return sorted(there, key=lambda one: _CONNECT_ORDER.index(one) if one in _CONNECT_ORDER else len(_CONNECT_ORDER))


def connect_samples(mode: ModeResult, position: str) -> list[float]:
    """Microseconds of all connections to ServicePorts at this position."""
    return [one for connect in mode.figures.connects if connect.position == position for one in connect.microseconds]


def connect_spread(mode: ModeResult, position: str) -> Spread | None:
    """Of all connections to ServicePorts at this position."""
    matching = [connect for connect in mode.figures.connects if connect.position == position]
    return spread_of(connect_samples(mode, position)) or (matching[0].spread if matching else None)


def place_in_words(position: str) -> str:
    """`the first Service by name`: what is first by name may be anywhere in the kernel."""
    return {"random": "a Service at random"}.get(position, f"the {position} Service by name")


def cpu_total(own: float | None, children: float | None) -> float | None:
    """Both together, of what there is."""
    return None if own is None and children is None else (own or 0.0) + (children or 0.0)


def cpu_per_change(mode: ModeResult) -> float | None:
    """The mean, of the agent and of the programs that it ran."""
    total = cpu_total(mode.figures.cpu_own_changes, mode.figures.cpu_children_changes)
    return total / len(mode.figures.changes) if total is not None and mode.figures.changes else None


_STATES: Final = ("differs", "design", "absent", "agrees")


def _frontend_row(found: dict[int, FrontendResult], columns: int) -> FrontendRow:
    cells = tuple(_cell(found.get(column)) for column in range(columns))
    any_one = next(iter(found.values()))
    state = min((cell.state for cell in cells), key=_STATES.index)
    return FrontendRow(any_one.service_port, any_one.name, any_one.policy, any_one.endpoints, cells, state)


def _cell(frontend: FrontendResult | None) -> Cell:
    if frontend is None:
        return Cell("absent", "not probed", "")
    probes = frontend.probes
    wrong = sum(not probe.agrees for probe in probes)
    if wrong:
        return Cell("differs", "differs", f"for {wrong} of {counted(len(probes), 'sender')}")
    sent = counted(sum(probe.sent for probe in probes), "probe")
    if any(probe.by_design for probe in probes):
        return Cell("design", "by design", sent)
    return Cell("agrees", "agrees", sent)


def _balance_row(mode: str, frontend: FrontendResult) -> BalanceRow:
    found = frontend.balance
    assert found is not None
    counts = sorted(found.counts.values(), reverse=True)
    busiest, idlest = (counts[0], counts[-1]) if counts else (0, 0)
    return BalanceRow(
        mode=mode,
        service_port=frontend.service_port,
        frontend=frontend.name,
        sender=str(found.sender),
        connections=sum(counts),
        backends=len(counts),
        range=f"{idlest} to {busiest}",
        statistic=number(found.statistic),
        degrees=found.degrees,
        p_value="takes turns" if found.exact else probability(found.p_value),
        even=found.even,
        exact=found.exact,
    )


def _together(balances: Sequence[Balance]) -> str:
    """A sum of independent chi-squares is one with the sum of their degrees of freedom. Not of those that take turns."""
    if any(one.exact for one in balances) or not balances:
        return ""
    statistic, degrees = sum(one.statistic for one in balances), sum(one.degrees for one in balances)
    chance = probability(p_value(statistic, degrees))
    return f"All together: chi-square {number(statistic)} with {counted(degrees, 'degree')} of freedom, p {_equals(chance)}."


def _equals(chance: str) -> str:
    return chance if chance.startswith("<") else f"= {chance}"


def _by_balance(frontend: FrontendResult) -> tuple[bool, float]:
    assert frontend.balance is not None
    return (frontend.balance.even, frontend.balance.p_value)


def _pattern(reason: str) -> str:
    """A reason without its addresses and numbers."""
    return re.sub(r"[0-9A-Fa-f:.\[\]]*\d[0-9A-Fa-f:.\[\]/]*", "…", reason)


def _row(name: str, modes: Sequence[ModeResult], cells: Sequence[str]) -> FigureRow:
    assert len(cells) == len(modes)
    return FigureRow(name, tuple(cells))


def _p99(spread: Spread | None) -> str:
    """Nothing for so few samples that it is the greatest."""
    return _of(spread, "p99") if spread and spread.count >= 100 else ""


def _of(spread: Spread | None, name: str) -> str:
    return seconds(getattr(spread, name)) if spread else ""


def _count(mode: ModeResult, what: str) -> str:
    found = Counter({count.what: count.number for count in mode.figures.counts})
    return whole(found[what]) if what in found else ""
