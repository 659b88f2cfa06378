"""What the HTML report says, in which order and how often; and that it is one file."""

import re
from pathlib import Path

import msgspec
import pytest

from nodeproxy.compare import html, page
from nodeproxy.compare.results import Balance, Comparison, Difference, Figures, Sender, SenderKind
from tests.compare.comparisons import HOSTILE, comparison


def test_verdict_says_who_disagrees_how_often() -> None:
    assert _verdict(comparison(10, 1, by_design=0)) == "1 disagreement in ipvs (nft)."
    assert _verdict(comparison(10, 0, by_design=3)) == (
        "iptables (legacy), iptables (nft) and ipvs (nft) agree with the forwarding table and with each other."
    )
    broken = comparison(10, 2, by_design=0, error="no IPVS")
    assert _verdict(broken) == "2 disagreements in ipvs (nft); ipvs (nft) could not be run to the end."
    assert _verdict(msgspec.structs.replace(broken, disagreements=())) == "ipvs (nft) could not be run to the end."


def test_verdict_of_one_mode_and_of_nothing_probed() -> None:
    all_modes = comparison(10, 0, by_design=0)
    one = msgspec.structs.replace(all_modes, modes=all_modes.modes[:1])
    assert _verdict(one) == "iptables (legacy) does what the forwarding table says."
    nothing = msgspec.structs.replace(one, modes=(msgspec.structs.replace(one.modes[0], frontends=()),))
    assert _verdict(nothing).startswith("Nothing was probed")


def _verdict(found: Comparison) -> str:
    return page.verdict(found).replace("\N{NO-BREAK SPACE}", " ")


def test_differences_are_grouped_by_mode_and_reason_without_its_addresses() -> None:
    found = page.differences(comparison(30, 9).disagreements)
    assert [(group.reason, len(group.items), group.same_reason) for group in found.groups] == [
        ("answered by …, which is no backend", 6, False),
        ("dropped, where the forwarding table forwards", 3, True),
    ]
    assert (found.total, found.shown) == (9, 9)


def test_one_of_a_kind_keeps_its_reason() -> None:
    one = Difference(
        "ipvs (nft)", "a/b", "10.0.0.1:80/TCP", "pod", "drop", "forward", "source is [2001:db8::1]:80, not 10.0.0.9"
    )
    assert page.differences([one]).groups[0].reason == one.reason


def test_differences_are_cut_at_a_number_in_all() -> None:
    found = page.differences(comparison(1000, 600).disagreements)
    assert (found.total, found.shown) == (600, page.DIFFERENCES)


def test_frontends_that_disagree_come_first_and_cells_follow_the_modes() -> None:
    made = comparison(30, 2, by_design=4)
    table = page.frontends(made.modes)
    assert [row.state for row in table.rows[:5]] == ["differs", "differs", "design", "design", "agrees"]
    assert [cell.state for cell in table.rows[0].cells] == ["agrees", "agrees", "differs"]
    assert table.rows[0].cells[2].text == "for 1 of 3 senders"


def test_frontend_that_one_mode_was_not_probed_at_is_said() -> None:
    made = comparison(3, 0, by_design=0)
    fewer = msgspec.structs.replace(made.modes[1], frontends=made.modes[1].frontends[1:])
    row = page.frontends((made.modes[0], fewer)).rows[0]
    assert [cell.word for cell in row.cells] == ["agrees", "not probed"]


def test_balance_lists_the_least_even_first() -> None:
    summaries = page.balance(comparison(60).modes)
    assert [(summary.measured, summary.uneven) for summary in summaries] == [(20, 1)] * 3
    first = summaries[0].rows[0]
    assert (first.service_port, first.even, first.range, first.p_value) == (
        "team-4/service-4:http",
        False,
        "5 to 90",
        "< 0.0001",
    )


def test_balance_of_all_together_shows_a_small_bias_of_many() -> None:
    made = comparison(60).modes[0]
    biased = [
        msgspec.structs.replace(
            one, balance=Balance(Sender(SenderKind.POD, "10.0.0.1"), {"a": 20, "b": 11}, 2.61, 1, 0.106, False, True)
        )
        for one in made.frontends
    ]
    (summary,) = page.balance([msgspec.structs.replace(made, frontends=tuple(biased))])
    assert summary.uneven == 0
    assert summary.together == "All together: chi-square 157 with 60 degrees of freedom, p < 0.0001."
    assert page.balance(comparison(60).modes)[2].together == ""


def test_figures_leave_out_what_nobody_has() -> None:
    modes = comparison(3).modes
    names = [row.name for row in page.figures(modes)]
    assert {"First sync", "Rules", "Virtual servers", "connect() to the last Service by name, p99"} <= set(names)
    rows = {row.name: row.cells for row in page.figures(modes)}
    assert rows["Virtual servers"] == ("", "", "6")
    assert rows["CPU per change"] == ("15 ms",) * 3
    bare = [msgspec.structs.replace(mode, figures=Figures(first_sync=1.5)) for mode in modes]
    assert [row.name for row in page.figures(bare)] == ["First sync"]


@pytest.mark.parametrize("names", [{}, HOSTILE])
def test_page_is_one_file(tmp_path: Path, names: dict[int, str]) -> None:
    html.make_room(tmp_path / "new" / "report.html")
    html.write(comparison(8, 8, by_design=0, names=names), tmp_path / "new" / "report.html")
    text = (tmp_path / "new" / "report.html").read_text()
    tags = re.findall(r"<[a-zA-Z][^>]*>", text)
    addresses = [value for tag in tags for value in re.findall(r"(?:src|href|action|data|srcset)=[\"']?([^\"' >]*)", tag)]
    assert addresses and all(address.startswith("#") for address in addresses)
    assert not re.search(r"url\(|@import", text)
    assert set(re.findall(r"https?://[^\"'<&, ]*", text)) <= {
        "http://www.w3.org/2000/svg",
        "https://10.0.0.1:6443",
        "http://evil.example/x",
    }


def test_the_same_comparison_gives_the_same_bytes() -> None:
    assert html.render(comparison(8)) == html.render(comparison(8))


def test_bare_comparison_is_rendered() -> None:
    made = comparison(3, 0, by_design=0)
    bare = [msgspec.structs.replace(mode, figures=Figures(), frontends=()) for mode in made.modes]
    text = html.render(msgspec.structs.replace(made, modes=tuple(bare)))
    assert "Nothing was probed" in text
    assert "<figure" not in text
    assert "Side by side" not in text


def test_marks_that_turn_text_are_shown() -> None:
    assert html.plain("a\u202eb\tc\U000e0041 é") == "a\\u202eb\\u0009c\\U000e0041 é"
