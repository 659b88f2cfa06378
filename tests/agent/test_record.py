"""What an agent remembers, and why it says that it is not in sync."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nodeproxy.agent.record import Record
from nodeproxy.agent.reporter import why_not
from nodeproxy.agent.status import SourceState, SyncState
from nodeproxy.api.objects import Kind


@pytest.fixture
def clock() -> Iterator[list[float]]:
    yield [1_700_000_000.0]


@pytest.fixture
def record(clock: list[float]) -> Record:
    return Record(lambda: clock[0])


def test_the_same_error_again_is_counted(record: Record, clock: list[float]) -> None:
    for _ in range(3):
        record.trouble("sync", "no")
        clock[0] += 1
    record.trouble("audit", "no")
    assert [(one.where, one.times, one.at) for one in record.troubles] == [
        ("sync", 3, "2023-11-14T22:13:22Z"),
        ("audit", 1, "2023-11-14T22:13:23Z"),
    ]


def test_errors_are_bounded(record: Record) -> None:
    for number in range(1000):
        record.trouble("sync", str(number))
    assert len(record.troubles) == 50 and record.troubles[-1].text == "999"


def test_drift_is_repaired_by_the_next_sync(record: Record, clock: list[float]) -> None:
    record.audited(())
    assert record.drifts == ()
    record.audited([f"chain {number}" for number in range(30)])
    assert record.drifts[-1].repaired is None
    assert record.drifts[-1].differs[-1] == "and 10 more" and len(record.drifts[-1].differs) == 21
    clock[0] += 1
    record.sync_failed("no", 2.0)
    record.audited(["rules of IPv6"])
    assert [drift.repaired for drift in record.drifts] == [None, None]
    clock[0] += 1
    record.synced(0.1, True, 3)
    assert [drift.repaired for drift in record.drifts] == ["2023-11-14T22:13:22Z"] * 2
    assert (record.audits, record.sync_error, record.retry_at) == (3, None, None)


GOOD_SYNC = SyncState(first_done=True, pending=0, in_time=True)
GOOD_SOURCE = SourceState(origin="x", lists_complete=True, last_event=None, not_watched={})


def test_why_it_is_not_in_sync(record: Record) -> None:
    def reasons(sync: SyncState = GOOD_SYNC, source: SourceState = GOOD_SOURCE, refused: int = 0) -> list[str]:
        return list(why_not(sync, source, refused, record))

    assert reasons() == []
    assert reasons(SyncState(first_done=True, pending=7, in_time=True)) == []  # keeping up
    assert reasons(SyncState(first_done=True, pending=7, in_time=False)) == ["7 Services wait too long for being programmed"]
    assert reasons(SyncState(first_done=False, pending=0, in_time=True)) == ["the first sync is not done"]
    assert reasons(refused=2) == ["the kernel refuses 2 ServicePorts"]
    assert reasons(SyncState(True, 0, True, error=record.trouble("sync", "bad"))) == ["the last sync failed: bad"]
    record.audited(["rules"])
    assert reasons() == ["what somebody changed in the kernel is not put back yet"]
    record.waiting_for = "kube-proxy runs"
    assert reasons() == ["nothing is programmed: kube-proxy runs"]


def test_a_kind_that_is_not_watched(record: Record) -> None:
    record.watch_started(Kind.SERVICE)
    record.request_failed(Kind.NODE, "403 Forbidden")
    record.watch_ended(Kind.ENDPOINT_SLICE, "cut")
    assert {kind: error for kind, error in record.watched.items() if error} == {
        Kind.NODE: "403 Forbidden",
        Kind.ENDPOINT_SLICE: "cut",
    }
    record.watch_started(Kind.ENDPOINT_SLICE)
    record.watch_ended(Kind.ENDPOINT_SLICE, None)  # its time was up
    assert record.watched[Kind.ENDPOINT_SLICE] is None
    assert [one.where for one in record.troubles] == ["source", "source"]
