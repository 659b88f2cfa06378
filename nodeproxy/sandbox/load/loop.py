"""Owns the loop of a generator: one epoll for all sockets, and engines that have something to do at certain times.

Bare epoll and sockets: asyncio's streams cost several times as much for each connection, and two processors carry the
generators, the servers, the agent and the kernel.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Sequence
from typing import Protocol

Handler = Callable[[int], None]
LONGEST_WAIT = 1.0


class Engine(Protocol):
    """A kind of load."""

    def due(self) -> float:
        """When (monotonic) `tick` is to be called next."""

    def tick(self, now: float) -> None:
        """Begin what is due and give up what took too long."""

    def stop(self) -> None:
        """Begin nothing more."""

    def pending(self) -> int:
        """Requests under way."""


class Loop:
    """Handlers by file descriptor. A handler is called with epoll's mask and may be called without cause: it must look."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self.late = 0.0
        self.late_at = 0.0

    def add(self, descriptor: int, mask: int, handler: Handler) -> None:
        """Watch a descriptor."""
        self._handlers[descriptor] = handler
        self._epoll.register(descriptor, mask)

    def forget(self, descriptor: int) -> None:
        """Watch it no more; it must be closed right after."""
        self._handlers.pop(descriptor, None)

    def unregister(self, descriptor: int) -> None:
        """Watch it no more; it stays open."""
        if self._handlers.pop(descriptor, None):
            self._epoll.unregister(descriptor)

    def turn(self, engines: Sequence[Engine]) -> None:
        """Wait for sockets until something is due, and do both."""
        due = min((engine.due() for engine in engines), default=time.monotonic() + LONGEST_WAIT)
        wait = min(max(0.0, due - time.monotonic()), LONGEST_WAIT)
        events = self._epoll.poll(wait)
        now = time.monotonic()
        if now - due > self.late:
            self.late, self.late_at = now - due, now
        for descriptor, mask in events:
            if handler := self._handlers.get(descriptor):  # else an earlier one of these closed it
                handler(mask)
        now = time.monotonic()
        for engine in engines:
            if engine.due() <= now:
                engine.tick(now)
