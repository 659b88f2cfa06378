"""Owns plots: pygal computes where everything goes; the look is ours, by style sheet, so that one plot is light and dark.

A plot is a piece of SVG without scripts, without addresses and without a style of its own: a page brings `STYLE`, a file
of its own is made by `standalone`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any, Final
from xml.etree import ElementTree

import pygal  # type: ignore[import-untyped]
from pygal.style import Style  # type: ignore[import-untyped]

from nodeproxy.compare.wording import number

COLOURS: Final = 8  # that STYLE has; further series begin again
_WIDTH: Final = 380  # of a plot, in units of its text: about the width of a phone
_FONT: Final = 12
_ROW, _ROW_GAP = 22, 10
_GAP: Final = 20  # between plots, in a file of their own
_LINE_HEIGHT: Final = 240
_SVG: Final = "http://www.w3.org/2000/svg"
_LETTERS: Final = 15  # units of width for each letter of a label; longer labels are cut, but not in the text alternative

ElementTree.register_namespace("", _SVG)  # no prefix, as HTML wants it

_LIGHT: Final = (
    "--plot-ink:#1d2430;--plot-quiet:#667085;--plot-line:#d9dee6;"
    "--c0:#2f6db5;--c1:#c8641b;--c2:#2c8160;--c3:#7b57b2;--c4:#b23b62;--c5:#7a6a16;--c6:#3a8fa3;--c7:#6b7280"
)
_DARK: Final = (
    "--plot-ink:#e4e8ee;--plot-quiet:#98a2b3;--plot-line:#333c4a;"
    "--c0:#78aee8;--c1:#f0a163;--c2:#6cc4a0;--c3:#b79bea;--c4:#ec8bab;--c5:#cdb84f;--c6:#7fcbdc;--c7:#aab2bf"
)
_SERIES: Final = "".join(
    f".plot .fill-{number},.plot .legend rect.fill-{number}{{fill:var(--c{number})}}"
    f".plot .stroke-{number}{{stroke:var(--c{number})}}"
    for number in range(COLOURS)
)
STYLE: Final = (
    f":root{{{_LIGHT}}}@media(prefers-color-scheme:dark){{:root{{{_DARK}}}}}@media print{{:root{{{_LIGHT}}}}}"
    ".plot{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;font-size:12px;overflow:visible}"
    ".plot text{fill:var(--plot-ink);stroke:none}.plot .axis text{fill:var(--plot-quiet)}"
    ".plot .horizontal .axis.y text{fill:var(--plot-ink)}.plot .axis.y text{text-anchor:end}"
    ".plot .axis.x text,.plot .title{text-anchor:middle}.plot .title{fill:var(--plot-quiet)}"
    ".plot rect.background{fill:none}.plot path{fill:none;stroke:var(--plot-line);stroke-width:1}"
    ".plot .series path{stroke-width:2;stroke-linejoin:round}.plot .series .dots circle{stroke:none}"
    f"{_SERIES}"
)


@dataclass(frozen=True)
class Plot:
    """One plot. `text` is what a reader hears who does not see it: every value of bars, the ends of lines."""

    title: str
    text: str
    width: int
    height: int
    tree: ElementTree.Element

    @property
    def svg(self) -> str:
        """To stand in a page."""
        return ElementTree.tostring(self.tree, encoding="unicode")


def bars(
    title: str, unit: str, values: Mapping[str, float], *, palette: Sequence[str] = (), width: int = _WIDTH
) -> Plot | None:
    """A bar for each label; None where there is no value. `palette` are labels that have their colours by their place."""
    return groups(title, unit, {label: {"": value} for label, value in values.items()}, palette=palette, width=width)


def groups(
    title: str, unit: str, values: Mapping[str, Mapping[str, float]], *, palette: Sequence[str] = (), width: int = _WIDTH
) -> Plot | None:
    """Bars by label, and by name within: say p50 and p99 of each mode."""
    rows = [
        (f"{label} {name}".strip(), label, name, value)
        for label, named in values.items()
        for name, value in named.items()
        if math.isfinite(value)
    ]
    if not rows:
        return None
    longest = max((value for *_, value in rows), default=0.0) or 1.0
    texts = [f"{number(value)}\N{NO-BREAK SPACE}{unit}".strip() for *_, value in rows]
    room = 1.0 + max(len(text) for text in texts) * 0.6 * _FONT / (width * 0.5)  # for the figure behind the longest bar
    height = len(rows) * _ROW + _ROW_GAP
    chart = pygal.HorizontalBar(
        **_common(title, width),
        height=height,
        show_x_labels=False,
        show_x_guides=False,
        show_y_guides=False,
        show_legend=False,
        print_values=True,
        print_values_position="top",
        range=(0, longest * room),
        margin=4,
    )
    rows.reverse()  # pygal counts from below
    texts.reverse()
    letters = width // _LETTERS
    chart.x_labels = [f"{_cut(label, letters - len(name))} {name}".strip() for _, label, name, _ in rows]
    chart.add(
        "", [{"value": value, "formatter": lambda _, text=text: text} for (*_, value), text in zip(rows, texts, strict=True)]
    )
    tree = _tree(chart)
    places = _places([*palette, *values])
    for rectangle, (_, label, name, _) in zip(tree.iterfind(".//{*}g[@class='bar']/{*}rect"), rows, strict=True):
        rectangle.set("class", f"fill-{places[label]}")
        if name != next(iter(values[label])):
            rectangle.set("opacity", "0.6")  # p99 beside p50: the same mode, and another figure
    for text in tree.iterfind(".//{*}text[@class='value']"):
        text.set("text-anchor", "start")
    spoken = "; ".join(f"{row}: {text}" for (row, *_), text in zip(reversed(rows), reversed(texts), strict=True))
    return _plot(title, tree, spoken, width, height)


def lines(
    title: str,
    unit: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    dots: bool = True,
    top: float | None = None,
    palette: Sequence[str] = (),
    width: int = _WIDTH,
) -> Plot | None:
    """A line of (x, y) for each label. `unit` is that of y; `top` is where y ends. Logarithmic axes leave out what is not
    above 0."""
    kept = {label: _drawable(points, log_x, log_y) for label, points in series.items()}
    kept = {label: points for label, points in kept.items() if points}
    if not kept:
        return None
    xs = _Axis([x for points in kept.values() for x, _ in points], log_x)
    heights = [y for points in kept.values() for _, y in points]
    ys = _Axis(heights if log_y else [0.0, *heights, *([top] if top else [])], log_y)
    height = _LINE_HEIGHT + 20 * len(kept)
    chart = pygal.XY(
        **_common(title, width),
        height=height,
        show_x_guides=False,
        show_legend=len(kept) > 1,
        legend_at_bottom=True,
        legend_at_bottom_columns=1,
        truncate_legend=-1,
        truncate_label=-1,
        x_title=x_title or None,
        y_title=unit or None,
        show_dots=dots,
        dots_size=2.5,
        xrange=(xs.low, xs.high),
        range=(ys.low, ys.high),
        margin=8,
        margin_right=28,
    )
    chart.x_labels = [{"label": number(tick), "value": xs.place(tick)} for tick in xs.ticks]
    chart.y_labels = [{"label": number(tick), "value": ys.place(tick)} for tick in ys.ticks]
    for label, points in kept.items():
        chart.add(_cut(label, width // _FONT), [(xs.place(x), ys.place(y)) for x, y in points])
    tree = _tree(chart)
    places = _places([*palette, *kept])
    for index, label in enumerate(kept):
        colour = places[label]
        for node in tree.iter():
            if f"serie-{index}" in node.get("class", "").split():
                for path in node.iterfind(".//{*}path"):
                    path.set("class", f"stroke-{colour}")
                for dot in node.iterfind(".//{*}circle"):
                    dot.set("class", f"fill-{colour}")
        for legend in tree.iterfind(f".//{{*}}rect[@class='color-{index} reactive']"):
            legend.set("class", f"fill-{colour}")
    spoken = "; ".join(f"{label}: {_ends(points, unit)}" for label, points in kept.items())
    return _plot(title, tree, spoken, width, height)


def cumulative(
    title: str, unit: str, samples: Mapping[str, Sequence[float]], *, palette: Sequence[str] = (), width: int = _WIDTH
) -> Plot | None:
    """How many of 100 samples are within a value: all of them shown, none averaged away. Logarithmic where they differ by
    more than 30 times."""
    kept = {label: sorted(values) for label, values in samples.items() if values}
    if not kept:
        return None
    least = min(values[0] for values in kept.values())
    greatest = max(values[-1] for values in kept.values())
    drawn = lines(
        title,
        "% of samples",
        {label: _steps(values) for label, values in kept.items()},
        x_title=unit,
        log_x=least > 0 and greatest > 30 * least,
        dots=False,
        top=100.0,
        palette=palette,
        width=width,
    )
    if drawn is None:
        return None
    spoken = "; ".join(f"{label}: {_extent(values, unit)}" for label, values in kept.items())
    drawn.tree.set("aria-label", f"{title}: {spoken}")
    return replace(drawn, text=spoken)


def standalone(plots: Iterable[Plot | None], columns: int = 1) -> str:
    """An SVG file of plots, each under its title, in rows of so many."""
    drawn = [plot for plot in plots if plot is not None]
    step = max((plot.width for plot in drawn), default=_WIDTH) + _GAP
    parts: list[str] = []
    y = _GAP
    for start in range(0, len(drawn), columns):
        row = drawn[start : start + columns]
        for column, plot in enumerate(row):
            x = _GAP + column * step
            parts.append(f'<text x="{x}" y="{y + _FONT}" class="heading">{escape(plot.title)}</text>')
            plot.tree.attrib.update(x=str(x), y=str(y + _GAP), width=str(plot.width), height=str(plot.height))
            parts.append(plot.svg)
        y += max(plot.height for plot in row) + 2 * _GAP
    width = _GAP + step * max(1, min(columns, len(drawn)))
    head = f'<svg xmlns="{_SVG}" width="{width}" height="{y}" viewBox="0 0 {width} {y}">'
    paper = "svg:root{background:#fff}@media(prefers-color-scheme:dark){svg:root{background:#151a21}}"
    heading = ".heading{font:600 13px system-ui,'DejaVu Sans',sans-serif;fill:var(--plot-ink)}"
    return "\n".join([head, f"<style>{STYLE}{paper}{heading}</style>", *parts, "</svg>", ""])


class _Axis:
    """From where to where an axis goes, and which round figures it names; `place` is where pygal is told a value to be."""

    def __init__(self, values: Sequence[float], logarithmic: bool) -> None:
        self._logarithmic = logarithmic
        least, greatest = min(values), max(values)
        if logarithmic:
            self.ticks = _decades(least, greatest)
        else:
            self.ticks = _round_steps(least, greatest)
        self.low = min(self.place(least), self.place(self.ticks[0]))
        self.high = max(self.place(greatest), self.place(self.ticks[-1]))

    def place(self, value: float) -> float:
        return math.log10(value) if self._logarithmic else value


def _decades(least: float, greatest: float) -> list[float]:
    """Powers of ten within the values, or around them where there are not two; with 2 and 5 where values are close."""
    factors = (1, 2, 5) if greatest <= 20 * least else (1,)
    powers = range(math.floor(math.log10(least)), math.ceil(math.log10(greatest)) + 2)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    inside = [tick for tick in ticks if least <= tick <= greatest]
    if len(inside) > 1:
        return inside
    below = max((tick for tick in ticks if tick <= least), default=ticks[0])
    return sorted({below, *inside, min(tick for tick in ticks if tick > max(greatest, below))})


def _round_steps(least: float, greatest: float) -> list[float]:
    """About five steps of 1, 2 or 5 times a power of ten."""
    span = (greatest - least) or abs(greatest) or 1.0
    rough = span / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.floor(least / step + 1e-9)
    last = max(math.ceil(greatest / step - 1e-9), first + 1)
    return [step * index for index in range(first, last + 1)]


def _common(title: str, width: int) -> dict[str, Any]:
    """Without scripts, style sheets and the date, so that the same figures give the same bytes."""
    style = Style(label_font_size=_FONT, value_font_size=_FONT, legend_font_size=_FONT, title_font_size=_FONT)
    return {"style": style, "css": [], "js": [], "title": None, "width": width, "spacing": 8, "no_prefix": True}


def _tree(chart: Any) -> ElementTree.Element:
    """What pygal draws, without what is for its scripts."""
    root = ElementTree.fromstring(chart.render(disable_xml_declaration=True))
    _strip(root)
    return root


def _strip(node: ElementTree.Element) -> None:
    for child in list(node):
        tag = child.tag if isinstance(child.tag, str) else ""
        name = tag.rpartition("}")[2]
        classes = child.get("class", "").split()
        if name in ("", "defs", "title", "desc", "script", "style") or "tooltip" in classes or "tooltip-overlay" in classes:
            node.remove(child)
        else:
            child.attrib.pop("id", None)
            _strip(child)


def _plot(title: str, tree: ElementTree.Element, spoken: str, width: int, height: int) -> Plot:
    for name in ("id", "class"):
        tree.attrib.pop(name, None)
    tree.set("class", "plot")
    tree.set("role", "img")
    tree.set("aria-label", f"{title}: {spoken}")
    return Plot(title, spoken, width, height, tree)


def _places(labels: Iterable[str]) -> dict[str, int]:
    return {label: place % COLOURS for place, label in enumerate(dict.fromkeys(labels))}


def _cut(label: str, length: int) -> str:
    return label if len(label) <= length else f"{label[: length - 1]}…"


def _drawable(points: Sequence[tuple[float, float]], log_x: bool, log_y: bool) -> list[tuple[float, float]]:
    return [
        (x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x) and (y > 0 or not log_y)
    ]


def _extent(values: Sequence[float], unit: str) -> str:
    """Of sorted values."""
    return f"from {number(values[0])} to {number(values[-1])} {unit}, median {number(values[(len(values) - 1) // 2])} {unit}"


def _ends(points: Sequence[tuple[float, float]], unit: str) -> str:
    (x0, y0), (x1, y1) = points[0], points[-1]
    return f"{number(y0)} {unit} at {number(x0)} to {number(y1)} {unit} at {number(x1)}"


def _steps(values: Sequence[float]) -> list[tuple[float, float]]:
    """A step up at each value; of thousands only a hundred or so are drawn, the least and the greatest among them."""
    every = max(1, len(values) // 200)
    corners: list[tuple[float, float]] = [(values[0], 0.0)]
    for index, value in enumerate(values):
        if index % every == 0 or index == len(values) - 1:
            corners += [(value, corners[-1][1]), (value, 100.0 * (index + 1) / len(values))]
    return corners
