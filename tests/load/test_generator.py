"""The load itself, without an agent: what it counts when servers answer, go, reset, hang or lie."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from nodeproxy.sandbox.load.generator import Backends, Load
from nodeproxy.sandbox.load.plan import (
    CONNECTION,
    FRESH_FLOW,
    KEPT_FLOW,
    STREAM,
    Count,
    Failure,
    Move,
    Plan,
    Report,
    Target,
    merge,
)
from nodeproxy.sandbox.namespace import Namespace
from nodeproxy.sandbox.topology import Sandbox

SERVER, SERVER6, CLIENTS = "10.1.0.1", "fd00:10::1", ("10.1.0.8", "10.1.0.9", "fd00:10::9")


class Pair:
    """A pod that serves and a pod that loads it."""

    def __init__(self, box: Sandbox, backends: Backends) -> None:
        self.box = box
        self.backends = backends
        self.server = box.add_pod(SERVER, SERVER6)
        self.client = box.add_pod(*CLIENTS)
        for address in (SERVER, SERVER6):
            backends.serve(self.server, address, 8080, "TCP", "web-1")
        backends.serve(self.server, SERVER, 8080, "UDP", "web-1")

    def plan(self, *, expect: str = "web-", rate: float = 100, timeout: float = 1.0) -> Plan:
        target, target6 = Target("four", SERVER, 8080, expect), Target("six", SERVER6, 8080, expect)
        return Plan(
            place="pod",
            namespace=self.client.name,
            tcp=(target, target6),
            udp=(target,),
            sources=CLIENTS,
            rate=rate,
            fresh_rate=20,
            stream_seconds=0.5,
            timeout=timeout,
        )

    def block(self, port: int, where: Namespace | None = None) -> None:
        (where or self.server).command(["iptables-nft", "-A", "INPUT", "-p", "tcp", "--dport", str(port), "-j", "DROP"])


@pytest.fixture
def pair() -> Iterator[Pair]:
    with Sandbox() as box, Backends() as backends:
        yield Pair(box, backends)


@pytest.mark.kernel
def test_everything_succeeds_where_nothing_happens(pair: Pair) -> None:
    with Load([pair.plan()]) as load:
        time.sleep(2)
        report = load.stop()
    total = report.count()
    assert total.ended_badly == 0
    assert total.attempted == total.succeeded
    assert report.failures == report.moves == ()
    connections, streams = report.count(CONNECTION), report.count(STREAM)
    assert 150 <= connections.attempted + report.skipped <= 260
    assert streams.attempted > 4, "those that do not last begin anew"
    assert report.count(KEPT_FLOW).succeeded > 10
    assert report.count(FRESH_FLOW).succeeded > 10
    assert 0 < connections.slowest <= report.seconds
    assert {outcome.target for outcome in report.outcomes if outcome.kind == CONNECTION} == {"four", "six"}


@pytest.mark.kernel
def test_a_server_that_is_killed_is_noticed_by_all_kinds(pair: Pair) -> None:
    with Load([pair.plan()]) as load:
        time.sleep(0.5)
        killed = load.since()
        for address in (SERVER, SERVER6):
            pair.backends.kill(pair.server, address, 8080, "TCP", "web-1")
        pair.backends.kill(pair.server, SERVER, 8080, "UDP", "web-1")
        time.sleep(0.5)
        report = load.stop()
    assert report.count(CONNECTION).refused > 10
    assert report.count(STREAM).reset == 4, "two streams to each of two targets"
    assert report.count(KEPT_FLOW).refused > 0
    assert report.count(FRESH_FLOW).refused > 0
    assert report.count().wrong == 0
    assert min(failure.at for failure in report.failures) >= killed - 0.1
    assert report.count(CONNECTION).stall >= 0.4, "no success until the end"


@pytest.mark.kernel
def test_a_server_that_stops_listening_keeps_its_streams(pair: Pair) -> None:
    with Load([pair.plan()]) as load:
        time.sleep(0.3)
        for address in (SERVER, SERVER6):
            pair.backends.stop_listening(pair.server, address, 8080, "TCP", "web-1")
        time.sleep(1)
        report = load.stop()
    streams = report.count(STREAM)
    assert report.count(CONNECTION).refused > 10
    assert streams.reset == streams.timed_out == 0
    assert streams.succeeded == 4, "all that were open ended as they should"


@pytest.mark.kernel
def test_silence_is_a_time_out(pair: Pair) -> None:
    with Load([pair.plan(timeout=0.5)]) as load:
        time.sleep(0.3)
        pair.block(8080)
        time.sleep(1)
        report = load.stop()
    assert report.count(CONNECTION).timed_out > 10
    assert report.count(STREAM).timed_out >= 2
    assert report.count(STREAM).slowest < 5
    assert report.count().reset == report.count().refused == 0


@pytest.mark.kernel
def test_the_wrong_server_is_noticed(pair: Pair) -> None:
    with Load([pair.plan(expect="cart-")]) as load:
        time.sleep(0.5)
        report = load.stop()
    total = report.count()
    assert total.wrong > 10
    assert total.succeeded == 0
    assert "web-1" in report.failures[0].what


@pytest.mark.kernel
def test_a_sticky_client_that_changes_servers_is_noticed(pair: Pair) -> None:
    target = Target("sticky", SERVER, 8080, "web-", sticky=True)
    plan = Plan("pod", pair.client.name, (target,), sources=CLIENTS, rate=100)
    with Load([plan]) as load:
        time.sleep(0.5)
        pair.backends.stop_listening(pair.server, SERVER, 8080, "TCP", "web-1")
        pair.backends.serve(pair.server, SERVER, 8080, "TCP", "web-2")
        time.sleep(0.5)
        report = load.stop()
    assert report.count().moved == 2
    assert {(move.source, move.before, move.after) for move in report.moves} == {
        (source, "web-1", "web-2") for source in CLIENTS if ":" not in source
    }
    assert report.count(STREAM).attempted == 0, "streams do not go to sticky targets"


def test_counts_add_up() -> None:
    first = Count(attempted=5, succeeded=3, refused=1, timed_out=1, stall=0.5, stall_at=2.0)
    second = Count(attempted=4, succeeded=2, reset=1, wrong=1, stall=0.7, stall_at=1.0)
    total = first + second
    assert (total.attempted, total.failed, total.ended_badly) == (9, 2, 4)
    assert (total.stall, total.stall_at) == (0.7, 1.0)
    assert first + Count() == first


def test_reports_are_merged_in_order_of_time() -> None:
    def report(*moments: float) -> Report:
        failures = tuple(Failure(at, at, "pod", CONNECTION, "web", "refused") for at in moments)
        return Report(
            1.0, failures=failures, moves=(Move(moments[0], "pod", "web", "", "a", "b"),), skipped=1, late=moments[0]
        )

    merged = merge([report(2.0, 3.0), report(1.0, 4.0)])
    assert [failure.at for failure in merged.failures] == [1.0, 2.0, 3.0, 4.0]
    assert [move.at for move in merged.moves] == [1.0, 2.0]
    assert (merged.skipped, merged.late) == (2, 2.0)
