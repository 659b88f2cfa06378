"""Owns the HTML report: one file that needs no script and no network; what comes from the cluster is escaped.

Beside jinja2's escaping, a content security policy in the page allows no script but the page's own, by its hash, and no
request at all: a name that got through would still do nothing.
"""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import jinja2
from markupsafe import Markup

from nodeproxy.compare import page, plots, wording
from nodeproxy.compare.plots import Plot
from nodeproxy.compare.results import Comparison, ModeResult

_COUNTS_DRAWN: Final = 6


def make_room(path: Path) -> None:
    """Make the file and its directory where they are not there yet. Raises OSError where they could not be written to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.open("a").close()


def write(comparison: Comparison, path: Path) -> None:
    """Write the report. Raises OSError."""
    path.write_text(render(comparison), encoding="utf-8")


def render(comparison: Comparison) -> str:
    """The text of the report."""
    environment = _environment()
    script = _source(environment, "report.js")
    return environment.get_template("report.html").render(
        comparison=comparison,
        modes=comparison.modes,
        verdict=page.verdict(comparison),
        disagreements=page.differences(comparison.disagreements),
        by_design=page.differences(comparison.by_design, unfolded=0),
        figures=page.figures(comparison.modes),
        plots=[plot for plot in _plots(comparison.modes) if plot],
        balance=page.balance(comparison.modes),
        affinity=page.affinity(comparison.modes),
        frontends=page.frontends(comparison.modes),
        style=Markup(plots.STYLE + _source(environment, "report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nodeproxy.compare", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(plain=plain, counted=wording.counted, seconds=wording.seconds, svg=_svg)
    return environment


def _source(environment: jinja2.Environment, name: str) -> str:
    """A file beside the template, as it is."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def plain(value: object) -> str:
    """Text from the cluster, with control characters and marks that change the direction of writing shown as \\u202e."""
    return "".join(_visible(letter) for letter in str(value))


def _visible(letter: str) -> str:
    if letter == " " or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return letter
    return f"\\u{ord(letter):04x}" if ord(letter) <= 0xFFFF else f"\\U{ord(letter):08x}"


def _svg(plot: Plot) -> Markup:
    """Made by us, text in it escaped by ElementTree."""
    return Markup(plot.svg)


def _plots(modes: Sequence[ModeResult]) -> list[Plot | None]:
    palette = [mode.name for mode in modes]

    def bars(title: str, unit: str, values: Sequence[float | None]) -> Plot | None:
        named = {name: value for name, value in zip(palette, values, strict=True) if value is not None}
        return plots.bars(title, unit, named, palette=palette)

    found = [
        bars("First sync", "s", [mode.figures.first_sync for mode in modes]),
        bars(
            "CPU until first sync",
            "s",
            [page.cpu_total(mode.figures.cpu_own, mode.figures.cpu_children) for mode in modes],
        ),
        bars("CPU per change", "ms", [_times(1e3, page.cpu_per_change(mode)) for mode in modes]),
        bars("Resident memory", "MB", [mode.figures.rss / 1e6 if mode.figures.rss else None for mode in modes]),
    ]
    for what in page.count_names(modes)[:_COUNTS_DRAWN]:
        numbers = [next((one.number for one in mode.figures.counts if one.what == what), None) for mode in modes]
        found.append(bars(wording.capital(what), "", numbers))
    found.append(
        plots.cumulative(
            "Latency of one change", "ms", {m.name: [s * 1e3 for s in m.figures.changes] for m in modes}, palette=palette
        )
    )
    for position in page.positions(modes):
        samples = {mode.name: page.connect_samples(mode, position) for mode in modes}
        found.append(plots.cumulative(f"connect() to {page.place_in_words(position)}", "µs", samples, palette=palette))
    if position := _hardest(modes):
        spreads = {mode.name: page.connect_spread(mode, position) for mode in modes}
        shares = {name: {"p50": spread.p50, "p99": spread.p99} for name, spread in spreads.items() if spread}
        title = f"connect() to {page.place_in_words(position)}, p50 and p99"
        found.insert(len(found) - len(page.positions(modes)), plots.groups(title, "µs", shares, palette=palette))
    return found


def _hardest(modes: Sequence[ModeResult]) -> str:
    """The position of which p50 and p99 are drawn: the last, where there is one."""
    there = page.positions(modes)
    return there[-1] if there else ""


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else value * factor
