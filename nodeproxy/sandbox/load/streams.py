"""Owns long-lived TCP streams: each sends a numbered line at a fixed interval and expects it back, in order.

A stream is cut when the other side resets or closes it, and when no line comes back within the time-out; another takes its
place. Every other stream lives as long as the load does. The others end by themselves after a while and begin anew, so
that new streams are made at all times, too.
"""

from __future__ import annotations

import contextlib
import errno
import random
import select
import socket
import time
from collections.abc import Sequence

from nodeproxy.sandbox.load.loop import Loop
from nodeproxy.sandbox.load.sources import Sources
from nodeproxy.sandbox.load.tally import REPEATED, Tally

_MOST_LINES = 1 << 16
_RETRY = 0.2


class Streams:
    """So many streams for each target."""

    def __init__(
        self,
        loop: Loop,
        sources: Sources,
        tallies: Sequence[Tally],
        *,
        each: int,
        interval: float,
        lifetime: float,
        timeout: float,
        seed: int,
    ) -> None:
        self.loop = loop
        self.sources = sources
        self.interval = interval
        self.timeout = timeout
        self._random = random.Random(seed)
        self._lifetime = lifetime
        self._next = time.monotonic()
        self._streams = [
            _Stream(self, tally, lasting=number % 2 == 0)
            for number in range(each)
            for tally in tallies
            if not tally.target.sticky
        ]
        self.stopped = False

    def due(self) -> float:
        return self._next if self._streams else float("inf")

    def tick(self, now: float) -> None:
        self._next = max(self._next + self.interval, now)
        for stream in self._streams:
            stream.step(now)

    def stop(self) -> None:
        self.stopped = True

    def pending(self) -> int:
        return sum(stream.sock is not None for stream in self._streams)

    def lifetime(self) -> float:
        """How long a stream that does not last is to live."""
        return self._lifetime * self._random.uniform(0.5, 1.5)


class _Stream:
    """One stream after the other, to one target. Counted as succeeded when it ends as it should."""

    def __init__(self, engine: Streams, tally: Tally, *, lasting: bool) -> None:
        self._engine = engine
        self._tally = tally
        self._lasting = lasting
        self._retry_at = 0.0
        self.sock: socket.socket | None = None

    def step(self, now: float) -> None:
        """Send the next line, or begin or end the stream, or find that it is stuck."""
        if self.sock is None:
            if not self._engine.stopped and now >= self._retry_at:
                self._begin(now)
            return
        waited_since = self._sent_at[self._returned] if self._returned < self._sent else None
        if not self._connected:
            waited_since = self._began
        if waited_since is not None and now - waited_since >= self._engine.timeout:
            self._cut(errno.ETIMEDOUT, waited_since, now)
        elif self._connected:
            if not (self._engine.stopped or now >= self._ends):
                self._send(now)
            elif self._returned == self._sent:
                self._finish()

    def _begin(self, now: float) -> None:
        engine, target = self._engine, self._tally.target
        self._began = now
        self._ends = float("inf") if self._lasting else now + engine.lifetime()
        self._connected = False
        self._sent = self._returned = 0
        self._sent_at: list[float] = []
        self._rest = b""
        self._name = b""
        self._tally.attempted += 1
        self.sock, _ = engine.sources.socket(target, socket.SOCK_STREAM)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        edges = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
        engine.loop.add(self.sock.fileno(), edges, self._look)
        code = self.sock.connect_ex((target.address, target.port))
        if code not in (0, errno.EINPROGRESS):
            self._cut(code, now, now)

    def _send(self, now: float) -> None:
        assert self.sock is not None
        if self._sent >= _MOST_LINES:
            self._ends = now
            return
        try:
            self.sock.send(b"%d\n" % self._sent)
        except BlockingIOError:
            return
        except OSError as error:
            self._cut(error.errno or errno.EIO, now, now)
            return
        self._connected = True
        self._sent_at.append(now)
        self._sent += 1

    def _look(self, _mask: int) -> None:
        if self.sock is None:
            return
        now = time.monotonic()
        if not self._connected:
            self._send(now)
            return
        try:
            data = self.sock.recv(4096)
        except BlockingIOError:
            return
        except OSError as error:
            self._cut(error.errno or errno.EIO, self._waiting_since(now), now)
            return
        if not data:
            self._cut(0, self._waiting_since(now), now)
            return
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if not self._check(line, now):
                return

    def _check(self, line: bytes, now: float) -> bool:
        """The line must be `NAME NUMBER`, of the server of this stream and in order."""
        name, _, number = line.partition(b" ")
        self._name = self._name or name
        sent = self._waiting_since(now)
        right = name.startswith(self._tally.target.expect.encode()) and name == self._name
        if not right or self._returned >= self._sent or number != b"%d" % self._returned:
            self._tally.wrong += 1
            self._tally.note(sent, now, f"wrong line {line[:60]!r}, expected number {self._returned} of {self._name!r}")
            self._close(now)
            return False
        self._returned += 1
        self._tally.answered(sent, now)
        if now - sent >= REPEATED:
            self._tally.slow(sent, now, self._about(now))
        return True

    def _waiting_since(self, now: float) -> float:
        return self._sent_at[self._returned] if self._returned < self._sent else now

    def _cut(self, code: int, sent: float, now: float) -> None:
        self._tally.failed(code, sent, now, connected=self._connected, detail=self._about(now))
        self._close(now)

    def _about(self, now: float) -> str:
        port = 0
        with contextlib.suppress(OSError):
            port = self.sock.getsockname()[1] if self.sock else 0
        who = self._name.decode() or "nobody"
        return f" (port {port}, {now - self._began:.2f} s old, {self._returned} lines from {who})"

    def _close(self, now: float) -> None:
        assert self.sock is not None
        self._engine.loop.forget(self.sock.fileno())
        self.sock.close()
        self.sock = None
        self._retry_at = now + _RETRY

    def _finish(self) -> None:
        self._tally.succeeded += 1
        self._close(time.monotonic())
