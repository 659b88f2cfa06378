"""Owns what a generator of load is told to do, and what it reports. All of it travels between processes as JSON."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

CONNECTION, STREAM, KEPT_FLOW, FRESH_FLOW = "connection", "stream", "UDP flow", "UDP request"
KINDS = (CONNECTION, STREAM, KEPT_FLOW, FRESH_FLOW)


class Target(Struct, frozen=True):
    """An address to load, and what the name of whoever answers there begins with.

    `sticky`: the same source must reach the same server each time (session affinity).
    """

    title: str
    address: str
    port: int
    expect: str
    sticky: bool = False


class Plan(Struct, frozen=True):
    """The load of one place, a network namespace. Rates are of all targets together.

    `sources`: addresses to send from in turn, those of the target's family; without any, the kernel chooses.
    `rate`: short TCP connections in a second. `fresh_rate`: UDP requests in a second, each from a new port.
    `streams`, `kept_flows`: how many of each there are for each target at the same time. Every other stream lives as long
    as the load; the others end and begin anew after `stream_seconds`.
    `interval`: seconds between two messages of a stream, and between two requests of a UDP flow.
    `timeout`: after so long without an answer a request has failed.
    """

    place: str
    namespace: str
    tcp: tuple[Target, ...]
    udp: tuple[Target, ...] = ()
    sources: tuple[str, ...] = ()
    rate: float = 100.0
    fresh_rate: float = 10.0
    streams: int = 2
    kept_flows: int = 2
    interval: float = 0.05
    stream_seconds: float = 4.0
    timeout: float = 5.0
    seed: int = 0


class Count(Struct, frozen=True):
    """What became of one kind of load at one target.

    A request is one short connection, one stream, or one UDP request.
    `repeated`: answered, but only after a packet had to be sent again (TCP: it took 0.9 s or more).
    `moved`: a sticky source was answered by another server than before.
    `stall`: the longest time between two successes, which for a stream are messages; `slowest`: the longest time from a
    request (or message) to its answer. `..._at` is when it ended.
    """

    attempted: int = 0
    succeeded: int = 0
    refused: int = 0
    timed_out: int = 0
    reset: int = 0
    wrong: int = 0
    repeated: int = 0
    moved: int = 0
    stall: float = 0.0
    stall_at: float = 0.0
    slowest: float = 0.0
    slowest_at: float = 0.0

    @property
    def failed(self) -> int:
        """Requests without an answer: refused and timed out. (What was reset or wrong counts on its own.)"""
        return self.refused + self.timed_out

    @property
    def ended_badly(self) -> int:
        """All that an application would notice."""
        return self.failed + self.reset + self.wrong

    def __add__(self, other: Count) -> Count:
        stall = max((self.stall, self.stall_at), (other.stall, other.stall_at))
        slowest = max((self.slowest, self.slowest_at), (other.slowest, other.slowest_at))
        return Count(
            self.attempted + other.attempted,
            self.succeeded + other.succeeded,
            self.refused + other.refused,
            self.timed_out + other.timed_out,
            self.reset + other.reset,
            self.wrong + other.wrong,
            self.repeated + other.repeated,
            self.moved + other.moved,
            *stall,
            *slowest,
        )


class Outcome(Struct, frozen=True):
    """The count of one kind of load at one target from one place."""

    place: str
    kind: str
    target: str
    count: Count


class Failure(Struct, frozen=True):
    """One request that ended badly, or was slow; `at` is when that was noticed, `began` when it was sent."""

    at: float
    began: float
    place: str
    kind: str
    target: str
    what: str

    def __str__(self) -> str:
        return f"{self.at:8.3f} (sent {self.began:.3f}) {self.kind} from {self.place} to {self.target}: {self.what}"


class Move(Struct, frozen=True):
    """A sticky source was answered by another server than before."""

    at: float
    place: str
    target: str
    source: str
    before: str
    after: str

    def __str__(self) -> str:
        source = self.source or "the kernel's choice"
        return f"{self.at:8.3f} {self.place} ({source}) to {self.target}: was with {self.before}, is with {self.after}"


class Report(Struct, frozen=True):
    """What a generator saw, or several.

    `slow`: what was answered, but only after a packet was sent again (of a stream: single lines). Of these, of `failures`
    and of `moves`, the first ten thousand of each generator. `skipped`: short connections that were due but not begun,
    because the machine was too slow. `late`: the longest time that a generator itself was held up, which no agent can be
    blamed for.
    """

    seconds: float
    outcomes: tuple[Outcome, ...] = ()
    failures: tuple[Failure, ...] = ()
    slow: tuple[Failure, ...] = ()
    moves: tuple[Move, ...] = ()
    skipped: int = 0
    late: float = 0.0
    late_at: float = 0.0

    def count(self, *kinds: str) -> Count:
        """The sum over all places and targets, of these kinds or of all."""
        return sum((one.count for one in self.outcomes if not kinds or one.kind in kinds), Count())


def merge(reports: Iterable[Report]) -> Report:
    """Several reports of the same time as one, failures in their order."""
    all_of = list(reports)
    late, late_at = max(((one.late, one.late_at) for one in all_of), default=(0.0, 0.0))
    return Report(
        seconds=max((one.seconds for one in all_of), default=0.0),
        outcomes=tuple(outcome for one in all_of for outcome in one.outcomes),
        failures=tuple(sorted((failure for one in all_of for failure in one.failures), key=lambda failure: failure.at)),
        slow=tuple(sorted((one for report in all_of for one in report.slow), key=lambda one: one.at)),
        moves=tuple(sorted((move for one in all_of for move in one.moves), key=lambda move: move.at)),
        skipped=sum(one.skipped for one in all_of),
        late=late,
        late_at=late_at,
    )
