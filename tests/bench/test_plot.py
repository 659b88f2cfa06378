"""Plots of a benchmark: every agent in them, every round, and lines where there are sizes enough."""

from pathlib import Path
from xml.etree import ElementTree

from hack.bench import plot
from hack.bench.results import (
    Changes,
    Churn,
    ConnectRun,
    ConnectTarget,
    Cpu,
    FirstSync,
    Memory,
    Report,
    RollingUpdate,
    RuleCount,
    Run,
    spread,
)


def _run(agent: str, services: int, seconds: float) -> Run:
    samples = [seconds / 10, seconds / 5]
    return Run(
        agent=agent, mode="iptables", variant="nft", source="static", program="x", services=services, endpoints=10,
        first_sync=FirstSync(seconds, seconds, seconds, Cpu(seconds, 0.1)),
        changes=Changes(samples, samples, 1.0, spread(samples), samples, Cpu(0.003, 0.001)),
        memory=Memory(50_000, 60_000),
        rules={"ipv4": RuleCount(services * 12, 3)},
    )  # fmt: skip


def _plots(report: Report) -> dict[str, str]:
    """What each says, by title."""
    return {one.title: one.text for one in plot.plots(report) if one}


def test_rounds_are_told_apart() -> None:
    report = Report(parts=[], runs=[_run("a", 100, 1.0), _run("b", 100, 2.0), _run("a", 100, 1.5)])
    titles = _plots(report)
    assert titles["First sync, s: 100 Services x 10 endpoints"].replace("\N{NO-BREAK SPACE}", " ") == (
        "a nft (static): 1 s; b nft (static): 2 s; a nft (static) #2: 1.5 s"
    )
    assert not [title for title in titles if "against" in title]


def test_three_sizes_make_lines_of_medians() -> None:
    runs = [_run("a", size, size / 1000) for size in (100, 1000, 10_000)] + [_run("a", 1000, 3.0), _run("a", 1000, 5.0)]
    titles = _plots(Report(parts=[], runs=runs))
    assert (
        titles["First sync against Services of 10 endpoints"]
        == "a nft (static): 0.1 s at 100 to 10 s at 10\N{THIN SPACE}000"
    )


def test_runs_that_failed_are_no_bars() -> None:
    failed = Run(
        agent="b", mode="ipvs", variant="nft", source="static", program="x", services=100, endpoints=10, error="no IPVS"
    )
    titles = _plots(Report(parts=[], runs=[_run("a", 100, 1.0), failed]))
    assert "b ipvs" not in "".join(titles.values())


def test_all_scenarios_go_into_one_file(tmp_path: Path) -> None:
    common = {"mode": "iptables", "variant": "nft", "source": "static", "program": "x", "services": 100, "endpoints": 10}
    report = Report(
        parts=[],
        rolling=[
            RollingUpdate(**common, agent="<a>", replicas=3, grace_seconds=1, joined_seconds=[0.1], left_seconds=[0.0])
        ],
        churn=[Churn(**common, agent="<a>", rate=20, latency_seconds=[0.1, 0.2], cpu=Cpu(1, 1), core_percent=3)],
        connect=[
            ConnectRun(
                "<a>", "nft", [ConnectTarget(size, "last", "10.0.0.1", [], spread([40.0])) for size in (10, 100, 1000)]
            )
        ],
    )
    plot.write(tmp_path / "new" / "plot.svg", report)
    text = "".join(ElementTree.parse(tmp_path / "new" / "plot.svg").getroot().itertext())
    for title in (
        "Rolling update, new pod gets connections",
        "Churn at 20 changes/s",
        "connect() to the last Service, median",
    ):
        assert title in text
    assert "<a>" in text
