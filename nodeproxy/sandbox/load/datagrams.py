"""Owns UDP requests: flows that keep their source port, one request after the other, and requests from a new port each.

A request that is not answered is sent again after a while, as a resolver does; it has failed when it is refused, or not
answered within the time-out. Some clients live through a lost datagram, so a request that was sent again is told apart.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import select
import socket
import time
from collections.abc import Sequence

from nodeproxy.sandbox.load.loop import Loop
from nodeproxy.sandbox.load.sources import Sources
from nodeproxy.sandbox.load.tally import Tally

SEND_AGAIN = 0.25
_CATCH_UP = 0.25


class KeptFlows:
    """So many flows for each target; each has one request at a time under way."""

    def __init__(
        self, loop: Loop, sources: Sources, tallies: Sequence[Tally], *, each: int, interval: float, timeout: float
    ) -> None:
        self._interval = interval
        self._next = time.monotonic()
        self._flows = [_Flow(loop, sources, tally, timeout) for _ in range(each) for tally in tallies]
        self._stopped = False

    def due(self) -> float:
        return self._next if self._flows else float("inf")

    def tick(self, now: float) -> None:
        self._next = max(self._next + self._interval, now)
        for flow in self._flows:
            if flow.waiting:
                flow.look_at_clock(now)
            elif not self._stopped:
                flow.ask(now)

    def stop(self) -> None:
        self._stopped = True

    def pending(self) -> int:
        return sum(flow.waiting for flow in self._flows)


class FreshFlows:
    """Requests at a rate, each from a new source port."""

    def __init__(self, loop: Loop, sources: Sources, tallies: Sequence[Tally], *, rate: float, timeout: float) -> None:
        self._loop = loop
        self._sources = sources
        self._turns = itertools.cycle(tallies)
        self._gap = 1 / rate
        self._timeout = timeout
        self._next = time.monotonic()
        self._flows: list[_Flow] = []
        self._stopped = False

    def due(self) -> float:
        if not self._flows:
            return float("inf") if self._stopped else self._next
        return time.monotonic() + SEND_AGAIN / 4 if self._stopped else self._next

    def tick(self, now: float) -> None:
        for flow in self._flows:
            flow.look_at_clock(now)
            if not flow.waiting:
                flow.close()
        self._flows = [flow for flow in self._flows if flow.waiting]
        self._next = max(self._next, now - _CATCH_UP)
        while self._next <= now and not self._stopped:
            self._next += self._gap
            flow = _Flow(self._loop, self._sources, next(self._turns), self._timeout)
            flow.ask(now)
            self._flows.append(flow)

    def stop(self) -> None:
        self._stopped = True

    def pending(self) -> int:
        return sum(flow.waiting for flow in self._flows)


class _Flow:
    """A UDP socket with one request at a time under way (`waiting`)."""

    def __init__(self, loop: Loop, sources: Sources, tally: Tally, timeout: float) -> None:
        self._loop = loop
        self._tally = tally
        self._timeout = timeout
        self._number = -1
        self._asked = self._sent = 0.0
        self._repeats = 0
        self.waiting = False
        self._sock, self._source = sources.socket(tally.target, socket.SOCK_DGRAM)
        self._sock.connect((tally.target.address, tally.target.port))
        loop.add(self._sock.fileno(), select.EPOLLIN, self._look)

    def ask(self, now: float) -> None:
        """Send the next request."""
        self._number += 1
        self._asked = now
        self._repeats = 0
        self.waiting = True
        self._tally.attempted += 1
        self._send(now)

    def look_at_clock(self, now: float) -> None:
        """Send the request again, or give it up."""
        if not self.waiting:
            return
        if now - self._asked >= self._timeout:
            self._fail(errno.ETIMEDOUT, now)
        elif now - self._sent >= SEND_AGAIN:
            self._repeats += 1
            self._send(now)

    def close(self) -> None:
        """The port is given up."""
        self._loop.forget(self._sock.fileno())
        self._sock.close()

    def _send(self, now: float) -> None:
        self._sent = now
        try:
            self._sock.send(b"%d" % self._number)
        except (BlockingIOError, PermissionError):
            pass  # lost: EPERM says that this machine's own rules (or IPVS) dropped it on its way out
        except OSError as error:
            self._fail(error.errno or errno.EIO, now)

    def _look(self, _mask: int) -> None:
        now = time.monotonic()
        try:
            answer = self._sock.recv(256)
        except BlockingIOError:
            return
        except OSError as error:
            if self.waiting:
                self._fail(error.errno or errno.EIO, now)
            return
        request = b"%d" % self._number
        _, _, number = answer.partition(b" ")
        late = number.isdigit() and int(number) < self._number
        if late or not self.waiting:
            return  # the answer to a request that was sent again, or given up
        self.waiting = False
        if self._tally.checked(answer, request, self._asked, now, self._source) and self._repeats:
            self._tally.slow(self._asked, now, self._about())

    def _fail(self, code: int, now: float) -> None:
        self.waiting = False
        self._tally.failed(code, self._asked, now, detail=self._about())

    def _about(self) -> str:
        port = 0
        with contextlib.suppress(OSError):
            port = self._sock.getsockname()[1]
        return f" (port {port}, request {self._number}, sent again {self._repeats} x)"
