"""Owns waiting for changes in one directory by inotify, on the event loop: nothing runs while nothing changes.

Our own, as packages did not fit: watchfiles looks at its queue every few milliseconds; asyncinotify loses what it has read
when a wait is cancelled, as by a timeout, and starts a process on import. Sources: inotify(7), linux/inotify.h.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from pathlib import Path
from typing import Final, Self

_IN_MODIFY: Final = 0x2
_IN_ATTRIB: Final = 0x4
_IN_CLOSE_WRITE: Final = 0x8
_IN_MOVE: Final = 0x40 | 0x80  # from and to
_IN_CREATE: Final = 0x100  # of links, too
_IN_DELETE: Final = 0x200
_IN_SELF: Final = 0x400 | 0x800  # the directory itself deleted, moved
_IN_IGNORED: Final = 0x8000  # the watch is gone
_IN_ONLYDIR: Final = 0x1000000
_WATCHED: Final = _IN_MODIFY | _IN_ATTRIB | _IN_CLOSE_WRITE | _IN_MOVE | _IN_CREATE | _IN_DELETE | _IN_SELF | _IN_ONLYDIR
_EVENT: Final = struct.Struct("=iIII")  # watch, mask, cookie, length of the name that follows, padded with zeros
_READ_BYTES: Final = 1 << 16

_libc = ctypes.CDLL(None, use_errno=True)


class DirectoryWatch:
    """The names that change in a directory from now on. As a context manager it is closed at the end."""

    def __init__(self, directory: Path) -> None:
        """Symbolic links are followed. Raises OSError: no such directory, or EMFILE or ENOSPC where no watch is left."""
        self._file = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), directory)
        try:
            _checked(_libc.inotify_add_watch(self._file, os.fsencode(directory), _WATCHED), directory)
        except OSError:
            os.close(self._file)
            raise
        self.ended = False  # nothing more will come: the directory was removed, or unmounted
        self._readable = asyncio.Event()
        self._listening: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End watching. Not while somebody waits."""
        self._stop_listening()
        os.close(self._file)

    async def wait(self, seconds: float) -> bool:
        """Whether there is something to `take` within this time. Cancelled, it loses nothing."""
        if self._listening is None:
            self._listening = asyncio.get_running_loop()
            self._listening.add_reader(self._file, self._on_readable)
        try:
            async with asyncio.timeout(seconds):
                await self._readable.wait()
        except TimeoutError:
            return False
        return True

    def take(self) -> set[str]:
        """Names that changed, none if nothing did; at most a buffer full, and what is left makes `wait` return at once.

        The empty name stands for the directory itself, and for names that are lost as there were too many.
        """
        self._readable.clear()
        try:
            data = os.read(self._file, _READ_BYTES)
        except BlockingIOError:
            return set()
        names: set[str] = set()
        position = 0
        while position < len(data):
            _, mask, _, length = _EVENT.unpack_from(data, position)
            position += _EVENT.size
            names.add(os.fsdecode(data[position : position + length].rstrip(b"\0")))
            position += length
            self.ended = self.ended or bool(mask & _IN_IGNORED)
        return names

    def _on_readable(self) -> None:
        """Once: until what is there is taken, which may be after a long scan, more of it need wake nobody."""
        self._stop_listening()
        self._readable.set()

    def _stop_listening(self) -> None:
        if self._listening is not None:
            self._listening.remove_reader(self._file)
            self._listening = None


def _checked(result: int, directory: Path) -> int:
    """The result of a system call. Raises OSError."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(directory))
    return result
