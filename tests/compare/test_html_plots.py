"""Plots: every value is there, also for who does not see them; nothing of what pygal adds for its scripts."""

import math
from xml.etree import ElementTree

import pytest

from nodeproxy.compare.plots import Plot, bars, cumulative, groups, lines, standalone
from nodeproxy.compare.wording import number

_NAME = "<script>&\"'"


def _texts(plot: Plot | None) -> list[str]:
    assert plot
    return [node.text or "" for node in plot.tree.iter("{http://www.w3.org/2000/svg}text")]


def _widths(plot: Plot | None, colour: str) -> list[float]:
    assert plot
    return [float(node.get("width", "nan")) for node in plot.tree.iter() if node.get("class") == colour]


def test_bars_are_as_long_as_their_values() -> None:
    plot = bars("First sync", "s", {"a": 1.0, "b": 4.0, "zero": 0.0}, palette=["x", "b", "a"])
    ((a,), (b,)) = _widths(plot, "fill-2"), _widths(plot, "fill-1")
    assert b == pytest.approx(4 * a, rel=0.01)
    assert plot
    assert plot.text == "a: 1\xa0s; b: 4\xa0s; zero: 0\xa0s"
    assert plot.tree.get("aria-label") == f"First sync: {plot.text}"


def test_labels_stand_beside_their_own_bars() -> None:
    plot = bars("", "", {"less": 1.0, "more": 2.0})
    assert plot
    heights = {node.text: float(node.get("y", "nan")) for node in plot.tree.iter("{http://www.w3.org/2000/svg}text")}
    assert heights["less"] == pytest.approx(heights["1"], abs=3)
    assert heights["more"] == pytest.approx(heights["2"], abs=3)
    assert heights["less"] < heights["more"]


def test_groups_name_every_bar_and_share_a_colour() -> None:
    plot = groups("connect()", "µs", {"iptables": {"p50": 2.0, "p99": 8.0}, "ipvs": {"p50": 1.0, "p99": math.nan}})
    assert {"iptables p50", "iptables p99", "ipvs p50", "2\xa0µs", "8\xa0µs"} <= set(_texts(plot))
    assert "ipvs p99" not in _texts(plot)
    assert len(_widths(plot, "fill-0")) == 2


def test_lines_have_round_figures_along_their_axes() -> None:
    plot = lines("connect()", "µs", {"a": [(100, 20), (10_000, 1_800)]}, x_title="Services", log_x=True)
    assert {"100", "1\N{THIN SPACE}000", "10\N{THIN SPACE}000", "500", "2\N{THIN SPACE}000", "Services", "µs"} <= set(
        _texts(plot)
    )
    assert plot
    assert plot.text == "a: 20 µs at 100 to 1\N{THIN SPACE}800 µs at 10\N{THIN SPACE}000"


def test_logarithmic_lines_leave_out_what_has_no_logarithm() -> None:
    assert lines("", "s", {"a": [(0, 1)]}, log_x=True) is None
    assert lines("", "s", {"a": [(1, 0), (1, -1)], "b": []}, log_y=True) is None
    plot = lines("", "s", {"a": [(0, 1), (1, 1), (10, 0), (10, 5)]}, log_x=True, log_y=True)
    assert plot
    assert plot.text == "a: 1 s at 1 to 5 s at 10"


@pytest.mark.parametrize("values", [[5.0], [3.0, 3.0], [0.0], [1e-9, 1e9], [1.0, 2.0, 40.0]])
def test_cumulative_tells_least_median_and_greatest(values: list[float]) -> None:
    plot = cumulative("Change", "ms", {"a": values})
    assert plot
    assert plot.text.startswith(f"a: from {number(values[0])} to {number(values[-1])} ms, median ")
    assert plot.text in (plot.tree.get("aria-label") or "")
    assert "nan" not in plot.svg


def test_nothing_to_draw_is_no_plot() -> None:
    assert bars("", "", {}) is bars("", "", {"a": math.inf}) is cumulative("", "", {"a": []}) is lines("", "", {}) is None


def test_names_are_text_and_pygal_brings_no_scripts() -> None:
    plots = [
        bars(_NAME, _NAME, {_NAME: 1.0}),
        lines(_NAME, _NAME, {_NAME: [(1, 1), (2, 2)], "b": [(1, 1)]}, x_title=_NAME),
        cumulative(_NAME, _NAME, {_NAME: [1.0, 2.0]}),
    ]
    file = ElementTree.fromstring(standalone([*plots, None], columns=2))
    tags = {str(node.tag).rpartition("}")[2] for node in file.iter()}
    assert tags == {"svg", "style", "g", "rect", "path", "text", "circle"}
    assert _NAME in [node.text for node in file.iter()]
    assert not [node for node in file.iter() if any(name.rpartition("}")[2] == "href" for name in node.attrib)]


def test_same_figures_give_the_same_bytes() -> None:
    assert standalone([bars("a", "s", {"b": 1.0})]) == standalone([bars("a", "s", {"b": 1.0})])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234567, "1\N{THIN SPACE}234\N{THIN SPACE}567"),
        (0.00123456, "0.00123"),
        (15.0, "15"),
        (99.96, "100"),
        (-2.5, "-2.5"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text
