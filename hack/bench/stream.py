"""Owns a steady load of short connections to one Service, from one pod: which backend each of them reached, and when.

All backends are outside the node, where their listeners belong to this process. A backend that has ended still listens, so
that it is seen who still comes: such a connection has failed.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Final, Self

from hack.bench.datapath import Endpoint, accept_all, client_socket, listen
from nodeproxy.sandbox.namespace import Namespace
from nodeproxy.sandbox.pace import scaled

_TIMEOUT: Final = 0.9  # less than after which TCP sends a SYN again
_KEPT: Final = 20  # failures in words
_MOST_AT_ONCE: Final = 1000


class Stream:
    """So many connections a second from a pod to a Service while the block lasts.

    Attributes:
        first, last: when (monotonic) the first and the last connection reached each backend, by its address.
        connections: how many have been begun and have ended, one way or the other.
        failed, failures: how many of them badly, and the first of these in words.
    """

    def __init__(self, client: Namespace, service: Endpoint, outside: Namespace, backends: Sequence[str], port: int) -> None:
        self._client = client
        self._service = service
        self._where = outside
        self._backends = backends
        self._port = port
        self._listeners: dict[int, tuple[socket.socket, str]] = {}
        self._pending: dict[int, tuple[socket.socket, float]] = {}  # in the order of their beginning
        self._ended: set[str] = set()
        self._stop = threading.Event()
        self._work: Future[None] | None = None
        self.rate = 0.0
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.connections = 0
        self.failed = 0
        self.failures: list[str] = []

    def start(self, rate: float) -> None:
        """Begin, with so many connections a second."""
        self.rate = rate
        self._began = time.monotonic()
        self._work = self._client.submit(self._run)

    def end_backend(self, address: str) -> None:
        """From now on whoever comes there has failed."""
        self._ended.add(address)

    def stop(self) -> None:
        """Begin nothing more, and wait for what is under way. Raises what went wrong in between."""
        self._stop.set()
        if self._work is not None:
            self._work.result()
            self._work = None

    def __enter__(self) -> Self:
        for address in self._backends:
            listener = listen(self._where, address, self._port)
            self._listeners[listener.fileno()] = (listener, address)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.stop()
        finally:
            for sock, _ in (*self._listeners.values(), *self._pending.values()):
                sock.close()

    def _run(self) -> None:
        """In the client's namespace: one loop for both ends."""
        limit, gap = scaled(_TIMEOUT), 1 / self.rate
        due = time.monotonic()
        with select.epoll() as epoll:
            for descriptor in self._listeners:
                epoll.register(descriptor, select.EPOLLIN)
            while not self._stop.is_set() or self._pending:
                now = time.monotonic()
                self._expire(epoll, now - limit)
                if self._stop.is_set():
                    due = now + gap
                elif due <= now:
                    due = max(due + gap, now)  # what is missed is not made up for: it would all come at once
                    if len(self._pending) < _MOST_AT_ONCE:
                        self._begin(epoll)
                for descriptor, _ in epoll.poll(max(0.0, due - time.monotonic())):
                    if descriptor in self._listeners:
                        self._arrived(*self._listeners[descriptor])
                    elif descriptor in self._pending:
                        self._end(epoll, descriptor)
            for listener in self._listeners.values():
                self._arrived(*listener)

    def _begin(self, epoll: select.epoll) -> None:
        sock = client_socket()
        sock.setblocking(False)
        self._pending[sock.fileno()] = (sock, time.monotonic())
        code = sock.connect_ex(self._service)
        epoll.register(sock.fileno(), select.EPOLLOUT)
        if code not in (0, errno.EINPROGRESS):
            self._end(epoll, sock.fileno(), code)

    def _end(self, epoll: select.epoll, descriptor: int, code: int | None = None) -> None:
        """Its handshake is done, or has failed."""
        sock, began = self._pending.pop(descriptor)
        epoll.unregister(descriptor)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if code is None else code
        sock.close()
        self.connections += 1
        if code:
            self._fail(f"begun at {began - self._began:.3f} s: {os.strerror(code)}")

    def _expire(self, epoll: select.epoll, before: float) -> None:
        while self._pending:
            descriptor, (_, began) = next(iter(self._pending.items()))
            if began > before:
                return
            self._end(epoll, descriptor, errno.ETIMEDOUT)

    def _arrived(self, listener: socket.socket, address: str) -> None:
        now = time.monotonic()
        for _ in accept_all(listener):
            self.first.setdefault(address, now)
            self.last[address] = now
            if address in self._ended:
                self._fail(f"at {now - self._began:.3f} s: reached {address}, whose pod has ended")

    def _fail(self, what: str) -> None:
        self.failed += 1
        if len(self.failures) < _KEPT:
            self.failures.append(what)
