"""Owns asking the kernel with packets: which backend a cluster IP leads to, and how long connect() takes.

Reading rules back costs 50 ms and more at 5,000 Services, and disturbs what is measured. A connection asks the data path
itself: a pod connects to the cluster IP, and the listener at which the connection arrives tells which backend the rules
choose now. That takes about 0.2 ms and needs no server program: the kernel completes the handshake, and the listeners of
both backends belong to this process.

Conntrack remembers a closed connection for ten seconds, and one from the same port again would go where that one went. So
source ports are taken in turn from a wide range, and it is the client that ends a connection, by a reset: a new SYN is then
taken for what it is.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self

from nodeproxy.sandbox.namespace import Namespace
from nodeproxy.sandbox.pace import scaled
from nodeproxy.sandbox.sockets import RESET_ON_CLOSE, TCP_SYNCNT, any_address

_ATTEMPT_TIMEOUT: Final = 0.02
_BACKLOG: Final = 4096
_SOURCE_PORTS: Final = itertools.cycle(range(2000, 65000))

Endpoint = tuple[str, int]


class NoAnswer(Exception):
    """No connection got through in time."""


def _attempt_timeout() -> float:
    """How long one connection may take; on a slow machine not as many times more, as that is how exact an answer is."""
    return min(scaled(_ATTEMPT_TIMEOUT), 0.25)


def listen(where: Namespace, address: str, port: int) -> socket.socket:
    """A listening socket in a namespace; an empty address means all, even such as the namespace does not have."""
    return where.run(_listen, address, port)


def _listen(address: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    any_address(sock)  # the outside world of the sandbox answers for pods of other nodes
    sock.bind((address, port))
    sock.listen(_BACKLOG)
    return sock


def client_socket() -> socket.socket:
    """A socket of the calling thread's namespace from which a connection can be made, that ends by a reset."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.bind(("", next(_SOURCE_PORTS)))
    sock.setsockopt(socket.IPPROTO_TCP, TCP_SYNCNT, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    return sock


class Witness:
    """Sees which of several backends a Service leads to. `pods` are the backends' namespaces and addresses."""

    def __init__(self, client: Namespace, service: Endpoint, pods: Sequence[tuple[Namespace, str]], port: int) -> None:
        self._client = client
        self._service = service
        self._listeners: list[socket.socket] = []
        for pod, address in pods:
            self._listeners.append(listen(pod, address, port))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for listener in self._listeners:
            listener.close()

    def wait_any(self, timeout: float, pause: float) -> float | None:
        """When (monotonic) any backend answered, asked every `pause` seconds; None if none did within the time-out."""
        return self._client.run(self._wait, range(len(self._listeners)), timeout, pause)

    def wait_for(self, backend: int, timeout: float, pause: float) -> float | None:
        """When (monotonic) that backend answered; None if it did not within the time-out."""
        return self._client.run(self._wait, [backend], timeout, pause)

    def _wait(self, wanted: Sequence[int], timeout: float, pause: float) -> float | None:
        return _repeat(lambda: self._ask() in wanted, timeout, pause)

    def _ask(self) -> int | None:
        """Make one connection: which backend got it."""
        with client_socket() as sock:
            sock.settimeout(_attempt_timeout())
            try:
                sock.connect(self._service)
            except OSError:
                return None
            port: int = sock.getsockname()[1]
        return self._arrival(port)

    def _arrival(self, source_port: int) -> int | None:
        """Where the connection from this port arrived; earlier ones that came too late for us are passed over."""
        deadline = time.monotonic() + _attempt_timeout()
        while (left := deadline - time.monotonic()) > 0:
            for arrived in select.select(self._listeners, [], [], left)[0]:
                for port in accept_all(arrived):
                    if port == source_port:
                        return self._listeners.index(arrived)
        return None


def wait_connected(client: Namespace, service: Endpoint, timeout: float, pause: float) -> float | None:
    """When (monotonic) a connection to a Service got through, tried every `pause` seconds; None within the time-out."""
    return client.run(_repeat, lambda: _connects(service), timeout, pause)


def _connects(service: Endpoint) -> bool:
    with client_socket() as sock:
        sock.settimeout(_attempt_timeout())
        return sock.connect_ex(service) == 0


def _repeat(succeeds: Callable[[], bool], timeout: float, pause: float) -> float | None:
    """An attempt every `pause` seconds, but at most half of the time: a slow machine has one processor for all, perhaps."""
    deadline = time.monotonic() + timeout
    while (began := time.monotonic()) < deadline:
        if succeeds():
            return time.monotonic()
        took = time.monotonic() - began
        time.sleep(max(took, pause - took))
    return None


def accept_all(listener: socket.socket) -> list[int]:
    """Take all waiting connections, which their clients have ended already, and return the clients' ports."""
    ports = []
    with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
        while True:
            connection, peer = listener.accept()
            connection.close()
            ports.append(peer[1])
    return ports


def connect_microseconds(client: Namespace, service: Endpoint, listener: socket.socket, times: int) -> list[float]:
    """How long each of so many connect() calls took. Raises NoAnswer if one fails."""
    return client.run(_connect_many, service, listener, times)


def _connect_many(service: Endpoint, listener: socket.socket, times: int) -> list[float]:
    samples = []
    limit = struct.pack("ll", math.ceil(scaled(1.0)), 0)
    for _ in range(times):
        with client_socket() as sock:
            # Not settimeout: Python would then poll, which is not part of connect().
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            started = time.perf_counter_ns()
            try:
                sock.connect(service)
            except OSError as error:
                raise NoAnswer(f"connect to {service[0]}: {error}") from error
            samples.append((time.perf_counter_ns() - started) / 1000)
    accept_all(listener)
    return samples
