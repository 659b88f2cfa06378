"""Owns noticing that a file changed: written in place, renamed over, or reached by another symbolic link (ConfigMaps).

One `stat` every second and nothing else while nothing changes: what inotify would have to watch (the file, its directory,
`..data`, and where these lead) costs more, and some file systems have no inotify.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

from msgspec import Struct

_POLL_SECONDS = 1.0
_SETTLE_SECONDS = 0.1  # how long a file must be quiet before it is believed to be written to its end
_MAX_BYTES = 1 << 21  # beyond that a file is told from another by its beginning, its size and its times


class _Seen(Struct, frozen=True):
    """What a file looks like from outside; times in nanoseconds."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int


async def watch_file(path: Path, since: float | None = None, poll_seconds: float = _POLL_SECONDS) -> AsyncIterator[None]:
    """Yield each time that the content of a file is another than before. A file that is missing is waited for.

    `since`: seconds since the epoch; yields at once where the file was changed after that, for what happened between reading
    it and watching it. `process_start()` is the safe choice.
    """
    seen, digest = await asyncio.to_thread(_look, path)
    if since is not None and seen is not None and seen.changed / 1e9 > since:
        yield
    while True:
        await asyncio.sleep(poll_seconds)
        now = await asyncio.to_thread(_outside, path)
        if now is None or now == seen:
            continue
        await asyncio.sleep(_SETTLE_SECONDS)
        found, fresh = await asyncio.to_thread(_look, path)
        if found is None or found != now:
            continue  # gone again, or still being written: the next turn sees it
        seen = found
        if fresh != digest:
            digest = fresh
            yield


def process_start() -> float:
    """When this process started, in seconds since the epoch, to a hundredth of a second."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - age


def _outside(path: Path) -> _Seen | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return _Seen(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _look(path: Path) -> tuple[_Seen | None, bytes | None]:
    """The file from outside, and a digest of its content; both None where it is missing."""
    seen = _outside(path)
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES)
    except OSError:
        return None, None
    if len(content) == _MAX_BYTES:
        content += repr(seen).encode()
    return seen, hashlib.sha256(content).digest()
