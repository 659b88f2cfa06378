"""The benchmark at a small shape: every figure is there and makes sense. How fast anything is, is not judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hack.bench import plot, rules
from hack.bench.results import spread
from nodeproxy.sandbox.namespace import NETNS_DIR

SERVICES, ENDPOINTS, CHANGES = 30, 2, 3


def bench(directory: Path, *arguments: str) -> dict[str, Any]:
    """Run the benchmark as from a shell, in all variants, and return its JSON report."""
    if os.geteuid() != 0:
        pytest.skip("needs root: programs a real kernel")
    file = directory / "report.json"
    command = [sys.executable, "-m", "hack.bench", *arguments, "--json", str(file), "--plot", str(directory / "plot.svg")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            output, _ = process.communicate(timeout=240)
        finally:
            process.terminate()
    assert process.returncode == 0, output
    assert not list(NETNS_DIR.glob(f"*-{process.pid}-*")), "namespaces are left behind"
    report: dict[str, Any] = json.loads(file.read_text())
    return report


@pytest.mark.kernel
def test_first_sync_changes_and_idling(tmp_path: Path) -> None:
    shape = ("--services", str(SERVICES), "--endpoints", str(ENDPOINTS), "--changes", str(CHANGES))
    report = bench(tmp_path, *shape, "--scenario", "sync,idle", "--idle-seconds", "2", "--floor")
    assert [run["variant"] for run in report["runs"]] == ["legacy", "nft"]
    for run in report["runs"]:
        assert run["error"] is None
        first = run["first_sync"]
        assert first["seconds"] >= first["answered_seconds"] > 0
        assert first["cpu"]["own"] > 0
        assert first["floor_seconds"] > 0
        changes = run["changes"]
        assert len(changes["seconds"]) == len(changes["write_seconds"]) == CHANGES
        assert 0 < changes["spread"]["min"] <= changes["spread"]["median"] <= changes["spread"]["max"]
        assert changes["spread"]["max"] == max(changes["seconds"])
        assert changes["cpu_per_change"]["own"] >= 0
        assert 0 < run["memory"]["rss_kib"] <= run["memory"]["peak_kib"]
        assert run["rules"]["ipv4"]["rules"] > SERVICES * ENDPOINTS
        assert run["rules"]["ipv4"]["chains"] > SERVICES
        assert run["idle"]["seconds"] == 2
        assert run["idle"]["cpu"]["own"] >= 0
    assert report["machine"]["cores"] > 0
    assert "First sync" in (tmp_path / "plot.svg").read_text()


@pytest.mark.kernel
def test_connect_latency(tmp_path: Path) -> None:
    few, many, connections = 3, 40, 100
    counts = ("--connect-services", str(few), str(many), "--connections", str(connections))
    report = bench(tmp_path, "--scenario", "connect", *counts)
    assert report["runs"] == []
    assert [run["variant"] for run in report["connect"]] == ["legacy", "nft"]
    for run in report["connect"]:
        assert run["error"] is None
        assert run["ratio"] > 0
        places = [(target["services"], target["position"]) for target in run["targets"]]
        assert places == [(few, "first"), (few, "last"), (many, "first"), (many, "last")]
        for target in run["targets"]:
            assert len(target["microseconds"]) == connections
            assert min(target["microseconds"]) > 0


RULES = """*nat
:KUBE-SERVICES - [0:0]
:KUBE-SVC-A - [0:0]
-A KUBE-SERVICES -d 10.96.0.2/32 -p tcp -m comment --comment "b" -m tcp --dport 80 -j KUBE-SVC-B
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m comment --comment "a" -m tcp --dport 80 -j KUBE-SVC-A
-A KUBE-SVC-A ! -s 10.0.0.0/8 -d 10.96.0.1/32 -p tcp -m tcp --dport 80 -j KUBE-MARK-MASQ
COMMIT
"""


def test_services_are_found_in_the_order_of_the_rules() -> None:
    assert rules.in_order(RULES, ["10.96.0.1", "10.96.0.2", "10.96.0.3"]) == ["10.96.0.2", "10.96.0.1"]
    assert (rules.count(RULES).rules, rules.count(RULES).chains) == (3, 2)


def test_a_service_that_the_kernel_lacks_is_named() -> None:
    rules.check_all_there(RULES, ["10.96.0.1", "10.96.0.2"])
    with pytest.raises(rules.NotProgrammed, match=r"1 of 2 .* 10\.96\.0\.3"):
        rules.check_all_there(RULES, ["10.96.0.1", "10.96.0.3"])


def test_the_plot_escapes_names() -> None:
    text = plot.render([("a < b", [("x & y", 2.0), ("nothing", 0.0)])])
    assert "a &lt; b" in text
    assert "x &amp; y" in text


def test_spread_is_median_least_and_greatest() -> None:
    assert spread([3.0, 1.0, 2.0]) == spread([2.0, 3.0, 1.0])
    assert (spread([5.0, 1.0, 2.0]).median, spread([5.0, 1.0]).median) == (2.0, 3.0)
