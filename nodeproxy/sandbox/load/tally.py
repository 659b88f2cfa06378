"""Owns counting, inside a generator's process: what becomes of the requests of one kind to one target."""

from __future__ import annotations

import errno
import os

from nodeproxy.sandbox.load.plan import Count, Failure, Move, Outcome, Target

REPEATED = 0.9  # a TCP request that took as long waited for a packet to be sent again (SYN: after 1 s)
_MOST_NOTES = 10_000
_REFUSED = (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EPERM, errno.EADDRNOTAVAIL)


class Notes:
    """What is remembered one by one, of all kinds of load together: not more than so much."""

    def __init__(self) -> None:
        self.failures: list[Failure] = []
        self.slow: list[Failure] = []
        self.moves: list[Move] = []


class Tally:
    """Counts what becomes of requests. `began` is the monotonic time at which the load began."""

    def __init__(self, place: str, kind: str, target: Target, began: float, notes: Notes) -> None:
        self.target = target
        self.attempted = self.succeeded = self.refused = self.timed_out = self.reset = 0
        self.wrong = self.repeated = self.moved = 0
        self._place = place
        self._kind = kind
        self._began = began
        self._notes = notes
        self._expect = target.expect.encode()
        self._last = began
        self._stall = self._stall_at = self._slowest = self._slowest_at = 0.0
        self._servers: dict[str, tuple[float, bytes]] = {}

    def answered(self, sent: float, now: float) -> None:
        """An answer came, or a message of a stream came back: note its time alone."""
        gap = now - self._last
        if gap > self._stall:
            self._stall, self._stall_at = gap, now - self._began
        self._last = now
        took = now - sent
        if took > self._slowest:
            self._slowest, self._slowest_at = took, now - self._began

    def checked(self, answer: bytes, request: bytes, sent: float, now: float, source: str = "") -> bool:
        """An answer came: whether it is right, `NAME REQUEST`. It is counted as succeeded or as wrong."""
        name, _, rest = answer.partition(b" ")
        if rest != request or not name.startswith(self._expect):
            self.wrong += 1
            self.note(sent, now, f"wrong answer {answer[:60]!r} to {request!r}")
            return False
        self.succeeded += 1
        self.answered(sent, now)
        if self.target.sticky:
            last, before = self._servers.get(source, (sent, name))
            if sent >= last:  # else the answer was overtaken by that of a later request
                self._servers[source] = sent, name
                if before != name:
                    self._moved(now, source, before, name)
        return True

    def failed(self, code: int, sent: float, now: float, *, connected: bool = False, detail: str = "") -> None:
        """A request ended with an error number; 0 means that the other side closed. EADDRINUSE and the like are ours."""
        what = os.strerror(code) if code else "closed by the other side"
        if connected and code in (0, errno.ECONNRESET, errno.EPIPE):
            self.reset += 1
        elif code == errno.ETIMEDOUT:
            self.timed_out += 1
        elif code in _REFUSED or not connected:
            self.refused += 1
        else:
            self.reset += 1
        self.note(sent, now, f"{what}{' while connected' if connected else ''}{detail}")

    def note(self, sent: float, now: float, what: str) -> None:
        """Remember a failure, if not too many are remembered already."""
        self._note(self._notes.failures, sent, now, what)

    def slow(self, sent: float, now: float, what: str) -> None:
        """A request, or a line of a stream, was answered only after a packet was sent again."""
        self.repeated += 1
        self._note(self._notes.slow, sent, now, f"answered after {now - sent:.3f} s{what}")

    def _note(self, notes: list[Failure], sent: float, now: float, what: str) -> None:
        if len(notes) < _MOST_NOTES:
            at, began = round(now - self._began, 4), round(sent - self._began, 4)
            notes.append(Failure(at, began, self._place, self._kind, self.target.title, what))

    def _moved(self, now: float, source: str, before: bytes, after: bytes) -> None:
        self.moved += 1
        if len(self._notes.moves) < _MOST_NOTES:
            at = round(now - self._began, 4)
            self._notes.moves.append(Move(at, self._place, self.target.title, source, before.decode(), after.decode()))

    def outcome(self, end: float) -> Outcome:
        """The count; `end` is when the load was stopped: a target that was silent at the end has been so until then."""
        if end - self._last > self._stall:
            self._stall, self._stall_at = end - self._last, end - self._began
        count = Count(
            self.attempted,
            self.succeeded,
            self.refused,
            self.timed_out,
            self.reset,
            self.wrong,
            self.repeated,
            self.moved,
            round(self._stall, 4),
            round(self._stall_at, 4),
            round(self._slowest, 4),
            round(self._slowest_at, 4),
        )
        return Outcome(self._place, self._kind, self.target.title, count)
