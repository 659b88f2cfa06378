"""Owns the xtables lock: the file that iptables programs lock while they change legacy tables."""

import asyncio
import fcntl
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from nodeproxy.kernel.errors import LockHeld

LOCK_FILE_VARIABLE: Final = "XTABLES_LOCKFILE"
"""The environment variable by which iptables programs are told another file, from 1.8.6 on."""
_DEFAULT_FILE: Final = "/run/xtables.lock"
_PAUSE_SECONDS: Final = 0.01


def lock_file() -> str:
    """The file, as iptables programs started by us choose it."""
    return os.environ.get(LOCK_FILE_VARIABLE, _DEFAULT_FILE)


@asynccontextmanager
async def xtables_lock(timeout_seconds: int) -> AsyncIterator[int]:
    """Hold the lock, waiting for it; yields the descriptor of the file.

    A program that inherits the descriptor holds the lock as well, until it ends. Raises LockHeld, and OSError where there
    can be no such file.
    """
    path = lock_file()
    handle = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + timeout_seconds
        while not _locked(handle):
            if time.monotonic() >= deadline:
                raise LockHeld(timeout_seconds, path)
            await asyncio.sleep(_PAUSE_SECONDS)
        yield handle
    finally:
        os.close(handle)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
