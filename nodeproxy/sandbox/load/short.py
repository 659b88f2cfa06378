"""Owns short TCP connections at a given rate: connect, one request, one answer with the server's name, close."""

from __future__ import annotations

import errno
import itertools
import select
import socket
import time
from collections.abc import Sequence

from nodeproxy.sandbox.load.loop import Loop
from nodeproxy.sandbox.load.sources import Sources
from nodeproxy.sandbox.load.tally import REPEATED, Tally

_REQUEST = b"who\n"
_EDGES = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
_MOST_AT_ONCE = 2000
_CATCH_UP = 0.25  # seconds of missed connections that are made up for; what is older is skipped


class ShortConnections:
    """Connections to targets in turn, begun evenly over time."""

    def __init__(self, loop: Loop, sources: Sources, tallies: Sequence[Tally], rate: float, timeout: float) -> None:
        self._loop = loop
        self._sources = sources
        self._turns = itertools.cycle(tallies)
        self._gap = 1 / rate
        self._timeout = timeout
        self._next = time.monotonic()
        self._open: dict[_Connection, None] = {}  # in the order of their beginning
        self._stopped = False
        self.skipped = 0

    def due(self) -> float:
        expiry = next(iter(self._open)).began + self._timeout if self._open else float("inf")
        return expiry if self._stopped else min(self._next, expiry)

    def tick(self, now: float) -> None:
        while self._open and (oldest := next(iter(self._open))).began + self._timeout <= now:
            oldest.expire(now)
        missed = int((now - self._next - _CATCH_UP) / self._gap)
        if missed > 0 and not self._stopped:
            self._next += missed * self._gap
            self.skipped += missed
        while self._next <= now and not self._stopped:
            self._next += self._gap
            if len(self._open) >= _MOST_AT_ONCE:
                self.skipped += 1
            else:
                self._begin(next(self._turns))

    def stop(self) -> None:
        self._stopped = True

    def pending(self) -> int:
        return len(self._open)

    def _begin(self, tally: Tally) -> None:
        sock, source = self._sources.socket(tally.target, socket.SOCK_STREAM)
        connection = _Connection(self, sock, tally, source)
        self._open[connection] = None
        tally.attempted += 1
        self._loop.add(sock.fileno(), _EDGES, connection.look)
        code = sock.connect_ex((tally.target.address, tally.target.port))
        if code == errno.EADDRNOTAVAIL:  # the ports went round in less than TIME_WAIT's minute
            tally.attempted -= 1
            self.skipped += 1
            self.end(connection)
        elif code not in (0, errno.EINPROGRESS):
            connection.fail(code)

    def end(self, connection: _Connection) -> None:
        """Close it."""
        del self._open[connection]
        self._loop.forget(connection.sock.fileno())
        connection.sock.close()


class _Connection:
    """One connection under way. Epoll tells of edges: writable once it is made, then readable."""

    __slots__ = ("_engine", "_source", "_tally", "asked", "began", "sock")

    def __init__(self, engine: ShortConnections, sock: socket.socket, tally: Tally, source: str) -> None:
        self._engine = engine
        self._tally = tally
        self._source = source
        self.sock = sock
        self.began = time.monotonic()
        self.asked = False

    def look(self, _mask: int) -> None:
        try:
            if not self.asked:
                self.sock.send(_REQUEST)  # raises what connecting ended with
                self.asked = True
                return
            answer = self.sock.recv(256)
        except BlockingIOError:
            return
        except OSError as error:
            self.fail(error.errno or errno.EIO)
            return
        if not answer:
            self.fail(0)
            return
        now = time.monotonic()
        right = self._tally.checked(answer, _REQUEST, self.began, now, self._source)
        if right and now - self.began >= REPEATED:
            self._tally.slow(self.began, now, self._from())
        self._engine.end(self)

    def expire(self, now: float) -> None:
        phase = " waiting for the answer" if self.asked else " connecting"
        self._tally.failed(errno.ETIMEDOUT, self.began, now, connected=self.asked, detail=phase + self._from())
        self._engine.end(self)

    def fail(self, code: int) -> None:
        self._tally.failed(code, self.began, time.monotonic(), connected=self.asked, detail=self._from())
        self._engine.end(self)

    def _from(self) -> str:
        try:
            return f" (from {self.sock.getsockname()[0]} port {self.sock.getsockname()[1]})"
        except OSError:
            return ""
