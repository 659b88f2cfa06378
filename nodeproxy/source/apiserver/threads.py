"""Owns the bridge from a blocking iterator in a thread to an asynchronous one in the event loop, with bounded buffering."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Generic, TypeVar

from nodeproxy.source.apiserver.connection import Cancel

_MAX_WAITING = 4096

T = TypeVar("T")


async def in_thread(produce: Callable[[Cancel], Iterator[T]], name: str) -> AsyncGenerator[list[T], None]:
    """Iterate over `produce(cancel)` in a thread of its own and yield what has come, in batches of whatever size.

    Errors of the iterator are raised here, after all that came before. Closing the generator (or cancelling the task)
    cancels and returns at once, without waiting for a thread that is stuck in a system call: it is a daemon, and what it may
    still deliver goes nowhere.
    """
    cancel = Cancel()
    mailbox: _Mailbox[T] = _Mailbox(asyncio.get_running_loop())

    def run() -> None:
        try:
            for item in produce(cancel):
                if not mailbox.put(item):
                    return
            mailbox.end(None)
        except Exception as error:  # raised again in the loop
            mailbox.end(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    try:
        while True:
            items, ended = await mailbox.take()
            if items:
                yield items
            if ended:
                return
    finally:
        mailbox.close()
        cancel.cancel()


async def call_in_thread(work: Callable[[Cancel], T], name: str) -> T:
    """What `work(cancel)` returns, done in a thread that nobody waits for when the task is cancelled."""

    def produce(cancel: Cancel) -> Iterator[T]:
        yield work(cancel)

    async with aclosing(in_thread(produce, name)) as batches:
        async for (found,) in batches:
            result = found
    return result


class _Mailbox(Generic[T]):
    """Items on their way from a thread to the loop. A thread that runs ahead waits."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._changed = threading.Condition()
        self._ready = asyncio.Event()
        self._items: list[T] = []
        self._closed = False
        self._ended = False
        self._error: Exception | None = None

    def put(self, item: T) -> bool:
        """Called by the thread. False: nobody wants more."""
        with self._changed:
            while len(self._items) >= _MAX_WAITING and not self._closed:
                self._changed.wait()
            if self._closed:
                return False
            self._items.append(item)
            return len(self._items) > 1 or self._wake()

    def end(self, error: Exception | None) -> None:
        """Called by the thread when it is done."""
        with self._changed:
            self._ended, self._error = True, error
            if not self._closed:
                self._wake()

    async def take(self) -> tuple[list[T], bool]:
        """Called in the loop: what has come, and whether that was the last. Raises the thread's error once all is taken."""
        await self._ready.wait()
        with self._changed:
            self._ready.clear()
            items, self._items = self._items, []
            if self._ended and items and self._error is not None:
                self._ready.set()  # the items now, the error at the next call
                return items, False
            if self._ended and self._error is not None:
                raise self._error
            self._changed.notify()
            return items, self._ended

    def close(self) -> None:
        """Called in the loop: nothing more is wanted."""
        with self._changed:
            self._closed = True
            self._items = []
            self._changed.notify()

    def _wake(self) -> bool:
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:  # the loop is closed: the program is about to end
            self._closed = True
        return not self._closed
