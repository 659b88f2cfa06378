"""The benchmark at a small shape: every figure is there and makes sense. How fast anything is, is not judged here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from hack.bench.results import Report, Run
from nodeproxy.sandbox.namespace import NETNS_DIR
from nodeproxy.sandbox.pace import scaled
from tests.ways import needs_ipvs


def bench(directory: Path, *arguments: str, status: int = 0) -> Report:
    """Run the benchmark as from a shell, and return its JSON report."""
    if os.geteuid() != 0:
        pytest.skip("needs root: programs a real kernel")
    files = [part for what in ("json", "markdown", "plot") for part in (f"--{what}", str(directory / what))]
    command = [sys.executable, "-m", "hack.bench", *arguments, *files]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            output, _ = process.communicate(timeout=scaled(240))
        finally:
            process.terminate()
    assert process.returncode == status, output
    assert not list(NETNS_DIR.glob(f"*-{process.pid}-*")), "namespaces are left behind"
    return msgspec.json.decode((directory / "json").read_bytes(), type=Report)


@pytest.mark.kernel
def test_all_scenarios(tmp_path: Path) -> None:
    report = bench(tmp_path, "--quick", "--variants", "nft")
    assert report.failed == []
    assert [(run.services, run.endpoints, run.source, run.idle is not None) for run in report.runs] == [
        (20, 2, "manifests", True),
        (40, 1, "manifests", False),
    ]
    for run in report.runs:
        check_run(run)
    check_rolling(report)
    check_churn(report)
    check_connect(report)
    assert report.parts[0].machine.cores > 0
    tables = (tmp_path / "markdown").read_text()
    for title in ("20 x 2, 40 x 1 Services", "Rolling update of 3 pods", "Churn, 20 endpoints moved", "connect(), median"):
        assert title in tables
    plotted = "".join(ElementTree.parse(tmp_path / "plot").getroot().itertext())
    for title in ("First sync, s: 20 Services x 2 endpoints", "Rolling update", "Churn at 20 changes/s", "connect()"):
        assert title in plotted


def check_run(run: Run) -> None:
    """First sync, changes and idling."""
    assert run.first_sync and run.changes and run.memory
    assert run.first_sync.seconds >= run.first_sync.answered_seconds > 0
    assert run.first_sync.cpu.own > 0
    assert len(run.changes.seconds) == len(run.changes.write_seconds) == len(run.changes.cpu_seconds) == 2
    assert 0 < run.changes.spread.min <= run.changes.spread.median <= run.changes.spread.max == max(run.changes.seconds)
    assert run.changes.cpu_per_change.own >= 0
    assert 0 < run.memory.rss_kib <= run.memory.peak_kib
    assert run.rules["ipv4"].rules > run.services * run.endpoints
    assert run.rules["ipv4"].chains > run.services
    if run.idle:
        assert run.idle.seconds >= 1
        assert run.idle.cpu.own > 0
        assert run.idle.rss_before_kib == run.memory.rss_kib
        assert run.idle.rss_after_kib > 0


def check_rolling(report: Report) -> None:
    """All pods are replaced, and nobody notices."""
    [one] = report.rolling
    assert len(one.joined_seconds) == len(one.left_seconds) == one.replicas == 3
    assert one.joined and one.joined.min > 0
    assert one.left and 0 <= one.left.min <= one.left.max
    assert one.writes == 4 * 3
    assert one.connections > 100 / scaled(1.0)
    assert (one.failed, one.failures) == (0, [])
    assert one.cpu and one.cpu.total > 0


def check_churn(report: Report) -> None:
    """Changes are written, and all of them are in the kernel in the end."""
    [one] = report.churn
    assert one.changes > 0
    assert one.seconds >= 2
    assert one.latency and one.latency.min > 0
    assert len(one.latency_seconds) > 0
    assert one.missing == 0
    assert one.drain_seconds is not None
    assert one.cpu and one.core_percent > 0
    assert 0 < one.rss_after_kib <= one.peak_kib


def check_connect(report: Report) -> None:
    """Both ends among few and many Services."""
    [run] = report.connect
    assert run.ratio and run.ratio > 0
    places = [(target.services, target.position) for target in run.targets]
    assert places == [(3, "first"), (3, "last"), (30, "first"), (30, "last")]
    for target in run.targets:
        assert len(target.microseconds) == 100
        assert min(target.microseconds) > 0


@pytest.mark.kernel
def test_startup_from_the_static_api_server_with_the_floor(tmp_path: Path) -> None:
    options = ("--scenario", "startup", "--source", "static", "--services", "20,5", "--variants", "legacy", "--floor")
    report = bench(tmp_path, *options)
    assert [(run.services, run.source, run.error, run.changes) for run in report.runs] == [
        (5, "static", None, None),
        (20, "static", None, None),
    ]
    less, more = (run.rules["ipv4"].rules for run in report.runs)
    assert more > less + 15 * 10
    for run in report.runs:
        assert run.first_sync and run.first_sync.floor_seconds and run.first_sync.floor_seconds > 0


@pytest.mark.kernel
def test_who_times_out_does_not_run_with_more(tmp_path: Path) -> None:
    options = ("--scenario", "scale", "--shapes", "5x1,9x1,2x5", "--variants", "nft", "--timeout", "0.01")
    report = bench(tmp_path, *options, status=1)
    first, larger, also_larger = report.runs
    assert (first.shape, first.timed_out) == ((5, 1), True)
    assert (first.error or "").startswith("timed out")
    for run, shape in ((larger, (9, 1)), (also_larger, (2, 5))):
        assert (run.shape, run.timed_out, run.error) == (shape, True, "not run: timed out at 5 Services x 1")
    tables = (tmp_path / "markdown").read_text()
    assert "timed out" in tables
    assert "not run" in tables


@pytest.mark.kernel
@pytest.mark.timeout(3600)
@needs_ipvs
def test_ipvs_mode_beside_iptables_mode(tmp_path: Path) -> None:
    report = bench(tmp_path, "--quick", "--scenario", "startup,change,churn", "--mode", "iptables,ipvs", "--variants", "nft")
    assert [(run.mode, run.variant, run.error) for run in report.runs] == [("iptables", "nft", None), ("ipvs", "nft", None)]
    run = report.runs[1]
    assert run.first_sync and run.first_sync.seconds >= run.first_sync.answered_seconds > 0
    assert run.changes and len(run.changes.seconds) == len(run.changes.cpu_seconds) == 2
    assert run.ipvs
    assert (run.ipvs.virtual_servers, run.ipvs.real_servers, run.ipvs.addresses) == (20 + 1, 20 * 2 + 1, 20 + 1)
    assert run.ipvs.sets > 0
    assert run.ipvs.set_entries > 20
    assert run.rules["ipv4"].rules > 0
    assert [(one.mode, one.error, one.missing) for one in report.churn] == [("iptables", None, 0), ("ipvs", None, 0)]
