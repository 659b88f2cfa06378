"""The tables of the benchmark: who is compared with whom, and what is said of growth, failures and targets."""

from __future__ import annotations

import io
from pathlib import Path
from xml.etree import ElementTree

import click
import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from hack.bench import plot, report
from hack.bench.__main__ import main
from hack.bench.options import ShapesType, Sizes, Words
from hack.bench.results import (
    Changes,
    Churn,
    ConnectRun,
    ConnectTarget,
    Cpu,
    FirstSync,
    Idle,
    IpvsCount,
    Machine,
    Part,
    Report,
    RollingUpdate,
    Run,
    spread,
)


def made_run(
    agent: str, services: int, cpu_seconds: list[float], first_sync: float = 2.0, way: tuple[str, str] = ("ipvs", "nft")
) -> Run:
    return Run(
        agent=agent,
        mode=way[0],
        variant=way[1],
        source="static",
        program=agent,
        services=services,
        endpoints=10,
        first_sync=FirstSync(first_sync, 1.0, first_sync, Cpu(1.0, 0.5)),
        changes=Changes(
            seconds=cpu_seconds,
            write_seconds=cpu_seconds,
            warm_up_seconds=0.1,
            spread=spread(cpu_seconds),
            cpu_seconds=cpu_seconds,
            cpu_per_change=Cpu(sum(cpu_seconds) / len(cpu_seconds), 0.0),
        ),
        ipvs=IpvsCount(services + 1, services * 10 + 1, 24, services * 2, services + 1),
    )


def made_report(*runs: Run, kernel: str = "6.1", cores: int = 1, mode: str = "ipvs") -> Report:
    machine = Machine(cores=cores, kernel=kernel, iptables="1.8.9", python="3.11", load_average=0.0, time_factor=1.0)
    return Report([Part("command", "now", [mode], machine)], runs=list(runs))


def shown(result: Report) -> str:
    output = io.StringIO()
    report.show(Console(file=output, width=300), result)
    return output.getvalue()


def cells_of(text: str) -> list[list[str]]:
    """Those of the rows of a table as it is shown."""
    rows = [line.split("│") for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row[1:-1]] for row in rows]


def test_sizes_are_compared_in_one_table() -> None:
    ours = [made_run("nodeproxy", size, [0.004, 0.005, 0.006], first_sync=2.0) for size in (100, 5000)]
    theirs = [
        made_run("peer", 100, [0.1, 0.11, 0.09], first_sync=8.0),
        made_run("peer", 5000, [5.0, 5.1, 4.9], first_sync=100.0),
    ]
    result = made_report(ours[0], theirs[0], ours[1], theirs[1])
    text = shown(result)
    cells = cells_of(text)
    assert [row[:2] for row in cells] == [["100", "nodeproxy"], ["100", "peer"], ["5,000", "nodeproxy"], ["5,000", "peer"]]
    assert cells[0][2:4] == ["2.00", ""]
    assert cells[1][2:4] == ["8.00", "0.250"]
    assert cells[3][2:4] == ["100.00", "0.020"]
    assert cells[3][-4:] == ["5,001", "50,001", "10,000", "5,001"]
    assert "nodeproxy: CPU per change does not depend on the Services: 5.0 ± 0.6 ms at 100" in text
    assert "peer: CPU per change grows with the Services: 100.0 ± 5.8 ms at 100, 5000.0 ± 57.7 ms at 5,000; +1000.00" in text


def test_what_may_be_chance_is_not_called_growth() -> None:
    runs = [made_run("nodeproxy", 100, [0.0, 0.01, 0.0, 0.01]), made_run("nodeproxy", 5000, [0.01, 0.02, 0.0, 0.01])]
    [line] = report.dependence(made_report(*runs))
    assert "does not depend" in line


def made_idle(milliseconds: float) -> Idle:
    cpu = Cpu(milliseconds / 1000, 0.0)
    return Idle(
        60.0, cpu, milliseconds, milliseconds / 600, switches_per_second=1.5, rss_before_kib=2000, rss_after_kib=3000
    )


def test_idling_is_compared_too() -> None:
    ours, theirs = made_run("nodeproxy", 100, [0.004]), made_run("peer", 100, [0.1])
    ours.idle, theirs.idle = made_idle(60.0), made_idle(600.0)
    more = made_run("nodeproxy", 5000, [0.004])
    idling = [row[-6:] for row in cells_of(shown(made_report(ours, theirs, more)))]
    assert idling[0] == ["60.0", "", "0.100", "1.50", "2.0", "3.1"]
    assert idling[1] == ["600.0", "0.100", "1.000", "1.50", "2.0", "3.1"]
    assert idling[2] == ["-", "", "-", "-", "-", "-"]


def test_targets_are_shares_of_the_peer_in_the_same_run() -> None:
    ours = made_run("nodeproxy", 5000, [0.1], first_sync=2.0, way=("iptables", "legacy"))
    theirs = made_run("peer", 5000, [0.4], first_sync=5.0, way=("iptables", "legacy"))
    text = report.markdown(made_report(ours, theirs, mode="iptables"))
    assert "| first sync, s | 2.00 (0.40x) | 5.00 | legacy 0.5x, nft 5 |" in text
    assert "| one change, median, s | **0.1000 (0.25x)** | 0.4000 | legacy 0.2x, nft 0.05 |" in text


def test_who_failed_is_a_column_that_says_so() -> None:
    ours, theirs = made_run("nodeproxy", 100, [0.1]), made_run("peer", 100, [0.1])
    theirs.first_sync = theirs.changes = theirs.ipvs = None
    theirs.error, theirs.timed_out = "timed out: no answer within 300 s\n[red]its log[/]", True
    text = shown(made_report(ours, theirs))
    assert ["first sync, s", "2.00", "timed out"] in cells_of(text)
    assert "peer ipvs-nft (static), 100 Services x 10: timed out: no answer within 300 s\n[red]its log[/]" in text
    theirs.timed_out = False
    assert ["first sync, s", "2.00", "failed"] in cells_of(shown(made_report(ours, theirs)))


def made_others(agent: str) -> Report:
    """A report of all scenarios but those of runs."""
    own = {"agent": agent, "mode": "iptables", "variant": "nft", "source": "static", "program": agent}
    factor = 1.0 if agent == "nodeproxy" else 4.0
    rolled = RollingUpdate(
        **own,
        services=1000,
        endpoints=10,
        replicas=10,
        grace_seconds=1.0,
        joined=spread([0.05 * factor]),
        left=spread([0.0]),
        connections=5000,
        failed=3,
        seconds=20.0,
    )
    churned = Churn(
        **own,
        services=1000,
        endpoints=10,
        rate=100.0,
        seconds=30.0,
        latency=spread([0.03 * factor]),
        keeps_up=agent == "nodeproxy",
    )
    target = ConnectTarget(10, "last", "10.96.0.1", [20.0], spread([20.0]))
    made = made_report()
    made.rolling, made.churn, made.connect = [rolled], [churned], [ConnectRun(agent, "nft", [target])]
    return made


def test_reports_of_several_kernels_are_shown_as_one(tmp_path: Path) -> None:
    iptables = made_report(made_run("nodeproxy", 100, [0.1], way=("iptables", "nft")), cores=2, mode="iptables")
    reports = [iptables, made_report(made_run("nodeproxy", 100, [0.2]), kernel="6.1-uml")]
    reports += [made_others("nodeproxy"), made_others("peer")]
    files = [tmp_path / f"{number}.json" for number in range(len(reports))]
    for file, made in zip(files, reports, strict=True):
        file.write_bytes(msgspec.json.encode(made))
    together, tables = tmp_path / "together.json", tmp_path / "new" / "tables.md"
    command = ["report", *map(str, files), "--json", str(together), "--markdown", str(tables)]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    text = tables.read_text()
    assert "iptables: 2 cores, Linux 6.1; ipvs: 1 core, Linux 6.1-uml" in text
    assert "|  | nodeproxy nft static | nodeproxy ipvs-nft static |" in text
    assert "| new pod ready, until it gets connections, median, ms | 50 (0.25x) | 200 |" in text
    assert "| - failed | 3 | 3 |" in text
    assert "| keeps up | yes | no |" in text
    assert "| latency of a change, median, ms | 30 (0.25x) | 120 |" in text
    assert "| peer nft | 20.0 | - |" in text
    assert len(msgspec.json.decode(together.read_bytes(), type=Report).parts) == 4


def test_what_is_no_report_is_named_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    for content in ("{}", "nonsense", '{"parts": 5}'):
        file.write_text(content)
        result = CliRunner().invoke(main, ["report", str(file)])
        assert result.exit_code == 1
        assert f"{file} is no report of the benchmark" in result.output
        assert "Traceback" not in result.output


def test_names_mean_nothing_in_markdown() -> None:
    ours = made_run("a|b<c>[red]", 100, [0.1])
    text = report.markdown(made_report(ours))
    assert "a\\|b&lt;c>[red] ipvs-nft static" in text
    assert "a|b<c>[red]" in shown(made_report(ours))


def test_names_mean_nothing_in_plots(tmp_path: Path) -> None:
    file = tmp_path / "new" / "plot.svg"
    plot.write(file, made_report(made_run("x & y <script>", 100, [0.1, 0.2])))
    root = ElementTree.parse(file).getroot()
    assert any("x & y <script>" in (text or "") for text in root.itertext())
    assert not [element for element in root.iter() if element.tag.endswith("script")]


def test_shapes_words_and_sizes() -> None:
    assert ShapesType().convert("100x10, 5000X50,100x10", None, None) == [(100, 10), (5000, 50)]
    assert Words(("a", "b")).convert("all", None, None) == ["a", "b"]
    assert Words(("a", "b")).convert("b", None, None) == ["b"]
    assert Sizes().convert("1000,100, 100", None, None) == [100, 1000]
    for kind, texts in (
        (ShapesType(), ("", "5", "5x0", "x5", "1x2x3")),
        (Words(("a", "b")), ("", "c", "a,c")),
        (Sizes(), ("", "0", "1,x", "-5")),
    ):
        for text in texts:
            with pytest.raises(click.BadParameter):
                kind.convert(text, None, None)


def test_spread_is_median_least_and_greatest() -> None:
    assert spread([3.0, 1.0, 2.0]) == spread([2.0, 3.0, 1.0])
    assert (spread([5.0, 1.0, 2.0]).median, spread([5.0, 1.0]).median) == (2.0, 3.0)
    assert spread([float(number) for number in range(101)]).p99 == 99.0
    assert spread([5.0]).p99 == 5.0
