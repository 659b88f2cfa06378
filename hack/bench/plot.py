"""Owns the plot: an SVG file with a group of bars for each figure, one bar for each run, on scales of their own."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from hack.bench.results import Report

_COLOURS = ("#2b6cb0", "#63b3ed", "#c05621", "#f6ad55", "#2f855a", "#68d391", "#6b46c1", "#b794f4")
_LABEL_WIDTH, _BAR_WIDTH, _BAR_HEIGHT, _GAP = 260, 420, 18, 34

Bars = list[tuple[str, float]]


def write(file: Path, report: Report) -> None:
    """Write the SVG file."""
    file.write_text(render(_groups(report)))


def _groups(report: Report) -> list[tuple[str, Bars]]:
    groups: list[tuple[str, Bars]] = []
    for size in report.services:
        shape = f"{size} Services x {report.endpoints} endpoints"
        runs = [run for run in report.runs if run.services == size]
        groups += [
            (f"First sync, s: {shape}", [(run.title, run.first_sync.seconds) for run in runs if run.first_sync]),
            (
                f"One endpoint change, median, ms: {shape}",
                [(run.title, run.changes.spread.median * 1e3) for run in runs if run.changes],
            ),
            (
                f"CPU per change, ms: {shape}",
                [(run.title, run.changes.cpu_per_change.total * 1e3) for run in runs if run.changes],
            ),
            (f"Resident memory, MB: {shape}", [(run.title, run.memory.rss_kib * 1024 / 1e6) for run in runs if run.memory]),
            (f"Idle CPU, ms per minute: {shape}", [(run.title, run.idle.cpu_ms_per_minute) for run in runs if run.idle]),
            (f"IPv4 rules, thousands: {shape}", [(run.title, run.rules["ipv4"].rules / 1e3) for run in runs if run.rules]),
        ]
    groups.append(
        (
            "connect(), median, µs",
            [
                (f"{run.agent} {run.variant}, last of {target.services}", target.spread.median)
                for run in report.connect
                for target in run.targets
                if target.position == "last"
            ],
        )
    )
    return [(title, bars) for title, bars in groups if bars]


def render(groups: Sequence[tuple[str, Bars]]) -> str:
    """The SVG text."""
    parts: list[str] = []
    y = _GAP
    for title, bars in groups:
        parts.append(f'<text x="10" y="{y}" font-weight="bold">{escape(title)}</text>')
        y += 10
        scale = _BAR_WIDTH / (max(value for _, value in bars) or 1.0)
        for number, (label, value) in enumerate(bars):
            width = max(1.0, value * scale)
            colour = _COLOURS[number % len(_COLOURS)]
            middle = y + _BAR_HEIGHT * 0.75
            parts.append(f'<text x="{_LABEL_WIDTH}" y="{middle:.1f}" text-anchor="end">{escape(label)}</text>')
            parts.append(
                f'<rect x="{_LABEL_WIDTH + 8}" y="{y}" width="{width:.1f}" height="{_BAR_HEIGHT - 4}" fill="{colour}"/>'
            )
            parts.append(f'<text x="{_LABEL_WIDTH + 14 + width:.1f}" y="{middle:.1f}">{value:.3g}</text>')
            y += _BAR_HEIGHT
        y += _GAP
    size = f'width="{_LABEL_WIDTH + _BAR_WIDTH + 80}" height="{y}"'
    style = 'font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}><rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, *parts, "</svg>", ""])
