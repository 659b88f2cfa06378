"""Owns which figures of a result are shown, how, and what the project wants of them (issue 8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic

from hack.bench.node import Result
from hack.bench.results import Changes, Churn, FirstSync, Idle, IpvsCount, Memory, RollingUpdate, RuleCount, Run, Spread

TARGET_SHAPE: Final = (5000, 10)
CONNECT_TARGET: Final = 1.2
YES_OR_NO: Final = "yes or no"


@dataclass(frozen=True)
class Line(Generic[Result]):
    """A figure. `limits` are nodeproxy's targets by variant of iptables mode; `shares` those as a share of kube-proxy's.

    `compared`: the ratio to kube-proxy's is of interest.
    """

    title: str
    figure: Callable[[Result], float | None]
    form: str
    compared: bool = False
    limits: Mapping[str, float] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)

    def text(self, figure: float) -> str:
        """The figure as it is shown."""
        return ("yes" if figure else "no") if self.form == YES_OR_NO else self.form.format(figure)

    def target(self) -> str:
        """In words."""
        shares = [f"{way} {share:g}x" for way, share in self.shares.items()]
        return ", ".join(shares + [f"{way} {limit:g}" for way, limit in self.limits.items()])


def _sync(figure: Callable[[FirstSync], float | None]) -> Callable[[Run], float | None]:
    return lambda run: figure(run.first_sync) if run.first_sync else None


def _change(figure: Callable[[Changes], float]) -> Callable[[Run], float | None]:
    return lambda run: figure(run.changes) if run.changes else None


def _memory(figure: Callable[[Memory], int]) -> Callable[[Run], float | None]:
    return lambda run: _megabytes(figure(run.memory)) if run.memory else None


def _rules(figure: Callable[[RuleCount], int]) -> Callable[[Run], float | None]:
    return lambda run: figure(run.rules["ipv4"]) if run.rules else None


def _ipvs(figure: Callable[[IpvsCount], int]) -> Callable[[Run], float | None]:
    return lambda run: figure(run.ipvs) if run.ipvs else None


def _idle(figure: Callable[[Idle], float]) -> Callable[[Run], float | None]:
    return lambda run: figure(run.idle) if run.idle else None


def _megabytes(kib: int) -> float:
    return kib * 1024 / 1e6


_FIRST = Line(
    "first sync, s", _sync(lambda sync: sync.seconds), "{:.2f}", compared=True, limits={"nft": 5.0}, shares={"legacy": 0.5}
)
_MEDIAN = Line(
    "one change, median, s",
    _change(lambda changes: changes.spread.median),
    "{:.4f}",
    compared=True,
    limits={"nft": 0.05},
    shares={"legacy": 0.2},
)
_CPU = Line(
    "CPU per change, s",
    _change(lambda changes: changes.cpu_per_change.total),
    "{:.4f}",
    compared=True,
    shares={"legacy": 0.15},
)
_RESIDENT = Line("RSS, MB", _memory(lambda memory: memory.rss_kib), "{:.0f}", compared=True, shares={"legacy": 0.75})
_PEAK = Line("  peak, MB", _memory(lambda memory: memory.peak_kib), "{:.0f}")
_P99 = Line("  99 of 100, s", _change(lambda changes: changes.spread.p99), "{:.4f}")
_COUNTS: tuple[Line[Run], ...] = (
    Line("virtual servers", _ipvs(lambda count: count.virtual_servers), "{:,}"),
    Line("real servers", _ipvs(lambda count: count.real_servers), "{:,}"),
    Line("set entries", _ipvs(lambda count: count.set_entries), "{:,}"),
    Line("addresses", _ipvs(lambda count: count.addresses), "{:,}"),
    Line("IPv4 rules", _rules(lambda count: count.rules), "{:,}"),
)
_IDLE: tuple[Line[Run], ...] = (
    Line("idle CPU, ms per min", _idle(lambda idle: idle.cpu_ms_per_minute), "{:.1f}", compared=True),
    Line("  % of a core", _idle(lambda idle: idle.core_percent), "{:.3f}"),
    Line("  switches per s", _idle(lambda idle: idle.switches_per_second), "{:.2f}"),
    Line("  RSS before, MB", _idle(lambda idle: _megabytes(idle.rss_before_kib)), "{:.1f}"),
    Line("  RSS after, MB", _idle(lambda idle: _megabytes(idle.rss_after_kib)), "{:.1f}"),
)

RUN_LINES: Final[Sequence[Line[Run]]] = (
    _FIRST,
    Line("  answered, s", _sync(lambda sync: sync.answered_seconds), "{:.2f}"),
    Line("  own CPU, s", _sync(lambda sync: sync.cpu.own), "{:.2f}"),
    Line("  children's CPU, s", _sync(lambda sync: sync.cpu.children), "{:.2f}"),
    Line("  iptables-restore alone, s", _sync(lambda sync: sync.floor_seconds), "{:.2f}"),
    _MEDIAN,
    _P99,
    Line("  least, s", _change(lambda changes: changes.spread.min), "{:.4f}"),
    Line("  greatest, s", _change(lambda changes: changes.spread.max), "{:.4f}"),
    _CPU,
    Line("  own, s", _change(lambda changes: changes.cpu_per_change.own), "{:.4f}"),
    Line("  children's, s", _change(lambda changes: changes.cpu_per_change.children), "{:.4f}"),
    _RESIDENT,
    _PEAK,
    *_COUNTS,
    Line("  chains", _rules(lambda count: count.chains), "{:,}"),
    *_IDLE,
)
SIZE_LINES: Final[Sequence[Line[Run]]] = (
    _FIRST,
    Line("its CPU, s", _sync(lambda sync: sync.cpu.total), "{:.2f}"),
    _MEDIAN,
    _P99,
    _CPU,
    _RESIDENT,
    _PEAK,
    *_COUNTS,
    *_IDLE,
)


def _joined(figure: Callable[[Spread], float]) -> Callable[[RollingUpdate], float | None]:
    return lambda one: figure(one.joined) * 1e3 if one.joined else None


def _left(figure: Callable[[Spread], float]) -> Callable[[RollingUpdate], float | None]:
    return lambda one: figure(one.left) * 1e3 if one.left else None


def _of_load(figure: Callable[[RollingUpdate], float]) -> Callable[[RollingUpdate], float | None]:
    return lambda one: figure(one) if one.connections else None


ROLLING_LINES: Final[Sequence[Line[RollingUpdate]]] = (
    Line("new pod ready, until it gets connections, median, ms", _joined(lambda one: one.median), "{:.0f}", compared=True),
    Line("  99 of 100, ms", _joined(lambda one: one.p99), "{:.0f}"),
    Line("old pod terminating, until it gets no more, median, ms", _left(lambda one: one.median), "{:.0f}", compared=True),
    Line("  99 of 100, ms", _left(lambda one: one.p99), "{:.0f}"),
    Line("  one pod gets a connection every, ms", _of_load(lambda one: one.resolution_seconds * 1e3), "{:.1f}"),
    Line("connections", _of_load(lambda one: one.connections), "{:,}"),
    Line("  failed", _of_load(lambda one: one.failed), "{:,}"),
    Line("CPU per write, s", lambda one: one.cpu_per_write if one.cpu else None, "{:.4f}", compared=True),
    Line("CPU, % of a core", lambda one: one.core_percent if one.cpu else None, "{:.1f}"),
    Line("writes of the slice", lambda one: one.writes or None, "{:,}"),
    Line("the whole update, s", lambda one: one.seconds or None, "{:.1f}"),
)


def _latency(figure: Callable[[Spread], float]) -> Callable[[Churn], float | None]:
    return lambda one: figure(one.latency) * 1e3 if one.latency else None


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


CHURN_LINES: Final[Sequence[Line[Churn]]] = (
    Line("keeps up", lambda one: None if one.keeps_up is None else float(one.keeps_up), YES_OR_NO),
    Line("latency of a change, median, ms", _latency(lambda one: one.median), "{:.0f}", compared=True),
    Line("  99 of 100, ms", _latency(lambda one: one.p99), "{:.0f}", compared=True),
    Line("  first half, median, ms", lambda one: _milliseconds(one.first_half), "{:.0f}"),
    Line("  second half, median, ms", lambda one: _milliseconds(one.second_half), "{:.0f}"),
    Line("samples", lambda one: len(one.latency_seconds) or None, "{:,}"),
    Line("rests after the last change, s", lambda one: one.drain_seconds, "{:.1f}"),
    Line("endpoints missing in the kernel", lambda one: one.missing, "{:,}"),
    Line("changes a second", lambda one: one.achieved_rate or None, "{:.1f}"),
    Line("CPU, % of a core", lambda one: one.core_percent if one.cpu else None, "{:.1f}", compared=True),
    Line("  own, %", lambda one: one.cpu.own / one.seconds * 100 if one.cpu else None, "{:.1f}"),
    Line("RSS before, MB", lambda one: _megabytes(one.rss_before_kib) or None, "{:.0f}"),
    Line("  after, MB", lambda one: _megabytes(one.rss_after_kib) or None, "{:.0f}", compared=True),
    Line("  peak, MB", lambda one: _megabytes(one.peak_kib) or None, "{:.0f}"),
)
