"""The benchmark at a small shape: every figure is there and makes sense. How fast anything is, is not judged here."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from aiohttp.test_utils import TestClient, TestServer
from rich.console import Console

from hack.bench import idle, plot, report, rules, virtual_servers
from hack.bench.__main__ import Sizes
from hack.bench.results import Changes, Cpu, FirstSync, Idle, IpvsCount, Machine, Report, Run, spread
from hack.bench.static_api import StaticApi
from nodeproxy.kernel.ipvs import RealServer, RealServerState, VirtualServer
from nodeproxy.sandbox.namespace import NETNS_DIR
from nodeproxy.sandbox.pace import scaled
from tests.ways import needs_ipvs

SERVICES, ENDPOINTS, CHANGES = 30, 2, 3


def bench(directory: Path, *arguments: str) -> dict[str, Any]:
    """Run the benchmark as from a shell, in all variants, and return its JSON report."""
    if os.geteuid() != 0:
        pytest.skip("needs root: programs a real kernel")
    file = directory / "report.json"
    command = [sys.executable, "-m", "hack.bench", *arguments, "--json", str(file), "--plot", str(directory / "plot.svg")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            output, _ = process.communicate(timeout=scaled(240))
        finally:
            process.terminate()
    assert process.returncode == 0, output
    assert not list(NETNS_DIR.glob(f"*-{process.pid}-*")), "namespaces are left behind"
    report: dict[str, Any] = json.loads(file.read_text())
    return report


@pytest.mark.kernel
def test_first_sync_changes_and_idling(tmp_path: Path) -> None:
    shape = ("--services", str(SERVICES), "--endpoints", str(ENDPOINTS), "--changes", str(CHANGES))
    report = bench(tmp_path, *shape, "--idle", "2", "--floor")
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
        assert run["idle"]["seconds"] >= 2
        assert run["idle"]["cpu"]["own"] > 0
        assert run["idle"]["rss_before_kib"] == run["memory"]["rss_kib"]
        assert run["idle"]["rss_after_kib"] > 0
    assert report["machine"]["cores"] > 0
    plotted = (tmp_path / "plot.svg").read_text()
    assert "First sync" in plotted
    assert "Idle CPU" in plotted


@pytest.mark.kernel
def test_idling_without_changes(tmp_path: Path) -> None:
    report = bench(tmp_path, "--services", "2,5", "--endpoints", "1", "--changes", "0", "--idle", "1", "--variants", "nft")
    assert [(run["services"], run["error"], run["changes"]) for run in report["runs"]] == [(2, None, None), (5, None, None)]
    assert all(run["idle"]["seconds"] >= 1 for run in report["runs"])


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


@pytest.mark.kernel
def test_several_sizes_from_the_static_api_server(tmp_path: Path) -> None:
    sizes = ("--services", "20,5", "--endpoints", "2", "--changes", "2")
    report = bench(tmp_path, *sizes, "--source", "static", "--variants", "nft")
    assert report["services"] == [5, 20]
    assert [(run["services"], run["source"], run["error"]) for run in report["runs"]] == [
        (5, "static", None),
        (20, "static", None),
    ]
    less, more = (run["rules"]["ipv4"]["rules"] for run in report["runs"])
    assert more > less + 15 * 2
    assert len(report["runs"][0]["changes"]["cpu_seconds"]) == 2
    assert "First sync, s: 20 Services x 2 endpoints" in (tmp_path / "plot.svg").read_text()


@pytest.mark.kernel
@pytest.mark.timeout(3600)
@needs_ipvs
def test_ipvs_mode(tmp_path: Path) -> None:
    shape = ("--services", "20", "--endpoints", "3", "--changes", "2")
    report = bench(tmp_path, "--mode", "ipvs", "--source", "static", *shape)
    [run] = report["runs"]
    assert run["error"] is None
    assert (run["mode"], run["variant"], run["source"]) == ("ipvs", "nft", "static")
    assert run["first_sync"]["seconds"] >= run["first_sync"]["answered_seconds"] > 0
    assert len(run["changes"]["seconds"]) == len(run["changes"]["cpu_seconds"]) == 2
    with_probe = {"virtual_servers": 20 + 1, "real_servers": 20 * 3 + 1, "addresses": 20 + 1}
    assert {name: run["ipvs"][name] for name in with_probe} == with_probe
    assert run["ipvs"]["sets"] > 0
    assert run["ipvs"]["set_entries"] > 20
    assert run["rules"]["ipv4"]["rules"] > 0


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


def state(address: str, weight: int) -> RealServerState:
    return RealServerState(RealServer(address, 8080), weight, 3, 1, 0)


def test_virtual_servers_count_with_those_real_servers_that_serve() -> None:
    found = virtual_servers.summed_up(
        {
            VirtualServer(4, "tcp", "10.96.0.1", 80): [state("10.244.0.12", 1), state("10.244.0.11", 0)],
            VirtualServer(4, "udp", "10.96.0.2", 53): [],
            VirtualServer(6, "tcp", "fd00:10:96::1", 80): [state("fd00:10:244::1", 1)],
        }
    )
    assert (found.virtual_servers, found.real_servers) == (3, 3)
    assert found.serving == {"10.96.0.1": 1, "10.96.0.2": 0, "fd00:10:96::1": 1}
    virtual_servers.check_all_there(found, 1, ["10.96.0.1", "fd00:10:96::1"])
    with pytest.raises(rules.NotProgrammed, match=r"2 of 3 .* 10\.96\.0\.2 for one has 0 of 1"):
        virtual_servers.check_all_there(found, 1, ["10.96.0.1", "10.96.0.2", "10.96.0.3"])


def test_sizes_are_sorted_numbers() -> None:
    assert Sizes().convert("1000,100, 100", None, None) == [100, 1000]
    for text in ("", "0", "1,x", "-5"):
        with pytest.raises(click.BadParameter):
            Sizes().convert(text, None, None)


def made_run(agent: str, services: int, cpu_seconds: list[float], first_sync: float = 2.0) -> Run:
    return Run(
        agent=agent,
        mode="ipvs",
        variant="nft",
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


def made_report(*runs: Run) -> Report:
    machine = Machine(cores=1, kernel="6.1", iptables="1.8.9", python="3.11", load_average=0.0, time_factor=1.0)
    sizes = sorted({run.services for run in runs})
    return Report("command", "now", machine, mode="ipvs", services=sizes, endpoints=10, runs=list(runs))


def test_sizes_are_compared_in_one_table() -> None:
    ours = [made_run("nodeproxy", size, [0.004, 0.005, 0.006], first_sync=2.0) for size in (100, 5000)]
    theirs = [
        made_run("peer", 100, [0.1, 0.11, 0.09], first_sync=8.0),
        made_run("peer", 5000, [5.0, 5.1, 4.9], first_sync=100.0),
    ]
    result = made_report(ours[0], theirs[0], ours[1], theirs[1])
    output = io.StringIO()
    report.show(Console(file=output, width=250), result)
    rows = [line.split("│") for line in output.getvalue().splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row[1:-1]] for row in rows]
    assert [row[:2] for row in cells] == [["100", "nodeproxy"], ["100", "peer"], ["5,000", "nodeproxy"], ["5,000", "peer"]]
    assert cells[0][2:4] == ["2.00", ""]
    assert cells[1][2:4] == ["8.00", "0.250"]
    assert cells[3][2:4] == ["100.00", "0.020"]
    assert cells[3][-4:] == ["5,001", "50,001", "10,000", "5,001"]
    assert "nodeproxy: CPU per change does not depend on the Services: 5.0 ± 0.6 ms at 100" in output.getvalue()
    assert "peer: CPU per change grows with the Services: 100.0 ± 5.8 ms at 100, 5000.0 ± 57.7 ms at 5,000; +1000.00" in (
        output.getvalue()
    )


def test_what_may_be_chance_is_not_called_growth() -> None:
    runs = [made_run("nodeproxy", 100, [0.0, 0.01, 0.0, 0.01]), made_run("nodeproxy", 5000, [0.01, 0.02, 0.0, 0.01])]
    [line] = report.dependence(made_report(*runs))
    assert "does not depend" in line


SERVICES_PATH = "/api/v1/services"


def made_service(name: str, **labels: str) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "load", "labels": labels}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"clusterIP": f"10.96.0.{len(name)}"}}


def names_in(answer: dict[str, Any]) -> list[str]:
    return [item["metadata"]["name"] for item in answer["items"]]


async def test_the_static_api_server_lists_what_selectors_accept() -> None:
    app = StaticApi([made_service("a"), made_service("bb", proxy="other"), made_service("ccc", proxy="mine")]).application()
    async with TestClient(TestServer(app)) as client:
        for query, names in (
            ({}, ["a", "bb", "ccc"]),
            ({"labelSelector": "!proxy"}, ["a"]),
            ({"labelSelector": "proxy,proxy!=mine"}, ["bb"]),
            ({"labelSelector": "proxy=mine", "limit": "1"}, ["ccc"]),
            ({"fieldSelector": "spec.clusterIP!=10.96.0.1"}, ["bb", "ccc"]),
            ({"fieldSelector": "metadata.name=bb"}, ["bb"]),
        ):
            answer = await (await client.get(SERVICES_PATH, params=query)).json()
            assert names_in(answer) == names, query
            assert answer["metadata"] == {"resourceVersion": "3"}
        empty = await (await client.get("/apis/networking.k8s.io/v1/servicecidrs")).json()
        assert (empty["kind"], empty["apiVersion"], empty["items"]) == ("ServiceCIDRList", "networking.k8s.io/v1", [])


async def test_the_static_api_server_tells_watchers_of_changes() -> None:
    app = StaticApi([made_service("a"), made_service("bb")]).application()
    async with TestClient(TestServer(app)) as client:
        listing = {"watch": "true", "sendInitialEvents": "true", "labelSelector": "!other", "timeoutSeconds": "60"}
        resuming = {"watch": "1", "resourceVersion": "1", "timeoutSeconds": "60"}
        async with (
            client.get(SERVICES_PATH, params=listing) as listed,
            client.get(SERVICES_PATH, params=resuming) as resumed,
        ):
            events = [json.loads(await listed.content.readline()) for _ in range(3)]
            assert [event["type"] for event in events] == ["ADDED", "ADDED", "BOOKMARK"]
            assert events[2]["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}
            assert json.loads(await resumed.content.readline())["object"]["metadata"]["name"] == "bb"
            for item in (made_service("a", other="yes"), made_service("a", changed="yes")):
                path = "/api/v1/namespaces/load/services/a"
                assert (await client.put(path, json=item)).status == 200
            event = json.loads(await listed.content.readline())
            assert (event["type"], event["object"]["metadata"]["labels"]) == ("MODIFIED", {"changed": "yes"})
            assert json.loads(await resumed.content.readline())["object"]["metadata"]["resourceVersion"] == "3"
        ended = await client.get(SERVICES_PATH, params={"watch": "true", "timeoutSeconds": "0.1"})
        assert await ended.read() == b""


def made_idle(milliseconds: float) -> Idle:
    cpu = Cpu(milliseconds / 1000, 0.0)
    return Idle(
        60.0, cpu, milliseconds, milliseconds / 600, switches_per_second=1.5, rss_before_kib=2000, rss_after_kib=3000
    )


def test_idling_is_compared_too() -> None:
    ours, theirs = made_run("nodeproxy", 100, [0.004]), made_run("peer", 100, [0.1])
    ours.idle, theirs.idle = made_idle(60.0), made_idle(600.0)
    more = made_run("nodeproxy", 5000, [0.004])
    output = io.StringIO()
    report.show(Console(file=output, width=300), made_report(ours, theirs, more))
    rows = [line.split("│") for line in output.getvalue().splitlines() if line.startswith("│")]
    idling = [[cell.strip() for cell in row[-7:-1]] for row in rows]
    assert idling[0] == ["60.0", "", "0.100", "1.50", "2.0", "3.1"]
    assert idling[1] == ["600.0", "0.100", "1.000", "1.50", "2.0", "3.1"]
    assert idling[2] == ["-", "", "-", "-", "-", "-"]


BUSY = "import time\nwhile time.process_time() < 0.25: pass"
WORKS_WHEN_TOLD = f"""
import subprocess, sys, time
print("ready", flush=True)
while command := sys.stdin.readline().strip():
    if command == "rest":
        for _ in range(20):
            time.sleep(0.001)
    elif command == "wait for a child":
        subprocess.run([sys.executable, "-c", {BUSY!r}], check=True)
    elif command == "leave a child alone":
        busy = {BUSY!r} + "\\nprint(flush=True)\\ntime.sleep(60)"
        child = subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE)
        child.stdout.readline()
    elif command == "end the child":
        child.kill()
        child.wait()
    print("done", flush=True)
"""


def used_for(process: subprocess.Popen[str], command: str) -> Idle:
    """What that process and its children use to carry out a command."""
    assert process.stdin and process.stdout
    before = idle.usage(process.pid)
    process.stdin.write(f"{command}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n"
    return idle.between(before, idle.usage(process.pid))


def test_what_children_use_counts_once() -> None:
    command = [sys.executable, "-c", WORKS_WHEN_TOLD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        resting = used_for(process, "rest")
        assert resting.switches_per_second * resting.seconds >= 20
        assert resting.cpu.total < 0.2
        assert used_for(process, "wait for a child").cpu.children >= 0.24
        left = used_for(process, "leave a child alone")
        assert left.cpu.children >= 0.24
        assert left.cpu_ms_per_minute == pytest.approx(left.cpu.total * 60_000 / left.seconds)
        assert left.core_percent == pytest.approx(left.cpu.total * 100 / left.seconds)
        assert left.rss_before_kib > 0
        assert used_for(process, "end the child").cpu.children < 0.2
        assert process.stdin
        process.stdin.close()


def test_the_plot_escapes_names() -> None:
    text = plot.render([("a < b", [("x & y", 2.0), ("nothing", 0.0)])])
    assert "a &lt; b" in text
    assert "x &amp; y" in text


def test_spread_is_median_least_and_greatest() -> None:
    assert spread([3.0, 1.0, 2.0]) == spread([2.0, 3.0, 1.0])
    assert (spread([5.0, 1.0, 2.0]).median, spread([5.0, 1.0]).median) == (2.0, 3.0)
    assert spread([float(number) for number in range(101)]).p99 == 99.0
    assert spread([5.0]).p99 == 5.0
