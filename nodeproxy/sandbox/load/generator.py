"""Owns starting and stopping a load, and the servers that it goes to, from the process that runs a test."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from functools import lru_cache
from types import TracebackType
from typing import Final, Literal, Self

from msgspec.structs import replace

from nodeproxy.sandbox.load import client, server
from nodeproxy.sandbox.load.children import Child, LoadError
from nodeproxy.sandbox.load.plan import Failure, Plan, Report, merge
from nodeproxy.sandbox.load.server import Command, Reply
from nodeproxy.sandbox.namespace import Namespace
from nodeproxy.sandbox.pace import scaled

Protocol = Literal["TCP", "UDP"]
_START_TIMEOUT: Final = 20.0
_LONGEST_TIMEOUT: Final = 12.0
_PROBES: Final = 200
_SHARE: Final = 0.06  # of all processors for the two ends of all connections: the way between them costs several times that


class Backends:
    """The process that serves all backends. Use as a context manager."""

    def __init__(self) -> None:
        self._child = Child(server.__name__)

    def serve(self, where: Namespace, address: str, port: int, protocol: Protocol, name: str) -> None:
        """Serve address:port in a namespace. Raises LoadError where that cannot be."""
        self._tell(Command("serve", where.name, address, port, protocol, name))

    def stop_listening(self, where: Namespace, address: str, port: int, protocol: Protocol, name: str) -> None:
        """Take no new connections (and no datagrams) there; those that are open stay."""
        self._tell(Command("stop", where.name, address, port, protocol, name))

    def kill(self, where: Namespace, address: str, port: int, protocol: Protocol, name: str) -> None:
        """Stop listening and reset all connections of that name, as when a pod is killed."""
        self._tell(Command("kill", where.name, address, port, protocol, name))

    def _tell(self, command: Command) -> None:
        self._child.say(command)
        reply = self._child.hear(Reply, scaled(_START_TIMEOUT))
        if reply.error:
            raise LoadError(reply.error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._child.end()


class Load:
    """A load from several places at the same time, one process for each. Use as a context manager, and `stop` it inside.

    `began` is when (monotonic) the last of them had begun.
    """

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._plans = [replace(plan, timeout=min(scaled(plan.timeout), _LONGEST_TIMEOUT)) for plan in plans]
        self._children: list[Child] = []
        self._stack = ExitStack()
        self._began: list[float] = []
        self.began = 0.0

    def __enter__(self) -> Self:
        try:
            for plan in self._plans:
                child = Child(client.__name__)
                self._stack.callback(child.end)
                self._children.append(child)
                child.say(plan)
            self._began = [child.hear(float, scaled(_START_TIMEOUT)) for child in self._children]
            self.began = max(self._began)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def since(self) -> float:
        """Seconds since the load began."""
        return time.monotonic() - self.began

    def stop(self) -> Report:
        """Begin nothing more, wait for what is under way (its time-out at most), and say what became of all."""
        for child in self._children:
            child.say("stop")
        timeout = max(plan.timeout for plan in self._plans) + scaled(_START_TIMEOUT)
        reports = [child.hear(Report, timeout) for child in self._children]
        return merge(_shifted(*one) for one in zip(reports, (began - self.began for began in self._began), strict=True))


def _shifted(report: Report, seconds: float) -> Report:
    """A report told by another clock, so many seconds ahead."""

    def told(failures: Iterable[Failure]) -> tuple[Failure, ...]:
        return tuple(replace(one, at=one.at + seconds, began=one.began + seconds) for one in failures)

    moves = (replace(one, at=one.at + seconds) for one in report.moves)
    return replace(report, failures=told(report.failures), slow=told(report.slow), moves=tuple(moves))


def affordable(rate: float) -> float:
    """How many short connections in a second this machine can bear besides all else: `rate`, or less on a slow one.

    Measured by connections over loopback, because in a VM it is the kernel that is slow rather than the processor.
    """
    return min(rate, _SHARE * (os.cpu_count() or 1) / _seconds_of_a_connection())


@lru_cache(maxsize=1)
def _seconds_of_a_connection() -> float:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        address = listener.getsockname()
        return min(_time_connections(listener, address) for _ in range(3))


def _time_connections(listener: socket.socket, address: tuple[str, int]) -> float:
    start = time.perf_counter()
    for _ in range(_PROBES):
        with closing(socket.create_connection(address)) as one, closing(listener.accept()[0]) as other:
            one.send(b"?\n")
            other.send(other.recv(16))
            one.recv(16)
    return (time.perf_counter() - start) / _PROBES
