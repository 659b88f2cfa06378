"""Owns how a roll-out looks in a terminal: a live table with progress, or a line for each change where it is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nodeproxy.cluster.findings import printable
from nodeproxy.operator.api import IN_FLIGHT, NodeLine, NodePhase, NodeState, Phase, ProxyRollout, seconds

_STYLES: Final = {
    NodePhase.UPDATED: "green",
    NodePhase.ROLLED_BACK: "yellow",
    NodePhase.ROLLING_BACK: "yellow",
    NodePhase.FAILED: "bold red",
    NodePhase.GONE: "dim",
    NodePhase.WAITING: "dim",
}
_PHASE_STYLES: Final = {Phase.COMPLETED: "bold green", Phase.FAILED: "bold red", Phase.ABORTED: "bold yellow"}
_POLL_SECONDS: Final = 0.5
_SPARE_LINES: Final = 9
"""Of the terminal's lines: what stands around the table of nodes."""


def listing(rollouts: Iterable[ProxyRollout]) -> Table:
    """All roll-outs, a line each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("NAME", "TARGET", "PHASE", "STEP", "NODES", "AGE", "MESSAGE"):
        table.add_column(title, overflow="fold" if title == "MESSAGE" else "ellipsis")
    for one in rollouts:
        status = one.status
        table.add_row(
            _text(one.metadata.name),
            _text(status.target or str(one.spec.target)),
            _phase(status.phase),
            _text(status.step_text),
            _text(status.progress),
            _since(one.metadata.creation_timestamp),
            _text(status.message),
        )
    return table


def picture(rollout: ProxyRollout, *, lines: int | None = None) -> RenderableType:
    """One roll-out: where it stands, a bar, and its nodes, the interesting ones first where there is no room for all."""
    status, counts = rollout.status, rollout.status.counts
    head = Table.grid(padding=(0, 2))
    head.add_row(
        _text(rollout.metadata.name, "bold"), _text(status.target or str(rollout.spec.target)), _phase(status.phase)
    )
    parts: list[RenderableType] = [head]
    if counts is not None and counts.total:
        bar = Table.grid(padding=(0, 2))
        text = f"{counts.updated}/{counts.total} nodes"
        for word, number in (("rolled back", counts.rolled_back), ("failed", counts.failed), ("gone", counts.gone)):
            text += f", {number} {word}" if number else ""
        bar.add_row(
            ProgressBar(total=counts.total, completed=counts.updated, width=40),
            _text(text),
            _text(f"step {status.step_text}" if status.step_text else None),
        )
        parts.append(bar)
    if status.message:
        parts.append(_text(status.message, "red" if status.phase is Phase.FAILED or status.outcome is Phase.FAILED else ""))
    if status.nodes:
        parts += [Text(), _nodes(status.nodes, lines)]
    return Group(*parts)


def _nodes(all_lines: list[NodeLine], room: int | None) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("NODE", "PHASE", "BEFORE", "AFTER", "TOOK", "REASON"):
        table.add_column(title, overflow="fold" if title == "REASON" else "ellipsis")
    shown = all_lines
    if room is not None and len(all_lines) > room:
        ranked = sorted(all_lines, key=_rank)[: max(room - 1, 1)]
        shown = [line for line in all_lines if line in ranked]
    for line in shown:
        table.add_row(
            _text(line.name),
            _text(line.phase.value, _STYLES.get(line.phase, "cyan")),
            _text(_state(line.before)),
            _text(_state(line.after)),
            _took(line),
            _text(line.reason),
        )
    hidden = len(all_lines) - len(shown)
    return Group(table, Text(f"and {hidden} more nodes", style="dim")) if hidden else table


def _rank(line: NodeLine) -> tuple[int, float]:
    """What is under way and what failed is seen first, then what ended last, then what waits."""
    if line.phase in IN_FLIGHT:
        return 0, 0.0
    if line.phase in (NodePhase.FAILED, NodePhase.ROLLED_BACK):
        return 1, 0.0
    return (2, -seconds(line.finished_at)) if line.finished_at else (3, 0.0)


def follow(
    console: Console,
    read: Callable[[], ProxyRollout],
    enough: Callable[[ProxyRollout], bool],
    *,
    poll: float = _POLL_SECONDS,
) -> ProxyRollout:
    """Show it until it is enough. On a terminal a picture that changes; else a line for each thing that happens."""
    rollout = read()
    if not console.is_terminal:
        return _follow_plainly(console, rollout, read, enough, poll)
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            live.update(picture(rollout, lines=max(console.size.height - _SPARE_LINES, 3)), refresh=True)
            if enough(rollout):
                return rollout
            time.sleep(poll)
            rollout = read()


def _follow_plainly(
    console: Console,
    rollout: ProxyRollout,
    read: Callable[[], ProxyRollout],
    enough: Callable[[ProxyRollout], bool],
    poll: float,
) -> ProxyRollout:
    said: dict[str, str] = {}
    while True:
        status = rollout.status
        told = {f"node {line.name}": line.phase.value for line in status.nodes if line.phase is not NodePhase.WAITING}
        if status.phase is not None:
            told[rollout.metadata.name] = f"{status.phase.value} {status.step_text or ''}".strip()
        reasons = {f"node {line.name}": line.reason for line in status.nodes} | {rollout.metadata.name: status.message}
        for name, what in told.items():
            if said.get(name) != what:
                why = reasons.get(name)
                now = datetime.now(UTC).strftime("%H:%M:%S")
                console.print(_text(f"{now} {name}: {what}{f': {why}' if why else ''}"), soft_wrap=True)
        said = told
        if enough(rollout):
            return rollout
        time.sleep(poll)
        rollout = read()


def _text(value: str | None, style: str = "") -> Text:
    """Text of the cluster: no markup is read in it, and nothing that a terminal would obey is left."""
    return Text(printable(value or ""), style=style)


def _phase(phase: Phase | None) -> Text:
    return Text("Pending", style="dim") if phase is None else Text(phase.value, style=_PHASE_STYLES.get(phase, "bold cyan"))


def _state(state: NodeState | None) -> str:
    if state is None:
        return ""
    image = (state.image or "").rpartition("/")[2]
    return " ".join(word for word in (state.proxy if state.proxy != "nodeproxy" else "", state.mode, image) if word)


def _since(time_text: str | None) -> Text:
    return Text(_duration(time.time() - seconds(time_text)) if time_text else "")


def _took(line: NodeLine) -> Text:
    if line.started_at is None:
        return Text("")
    end = seconds(line.finished_at) if line.finished_at else time.time()
    return Text(_duration(end - seconds(line.started_at)))


def _duration(value: float) -> str:
    whole = max(int(value), 0)
    if whole < 120:
        return f"{whole}s"
    return f"{whole // 60}m" if whole < 7200 else f"{whole // 3600}h"
