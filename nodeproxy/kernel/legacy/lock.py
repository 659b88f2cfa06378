"""Owns the xtables lock: the file that iptables programs lock while they change legacy tables."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from nodeproxy.kernel.errors import LockHeld

_DEFAULT_FILE: Final = "/run/xtables.lock"
_PAUSE_SECONDS: Final = 0.01


def lock_file() -> str:
    """The file, as iptables programs started by us choose it."""
    return os.environ.get("XTABLES_LOCKFILE", _DEFAULT_FILE)


@contextmanager
def xtables_lock(timeout_seconds: int) -> Iterator[None]:
    """Hold the lock; blocks the thread until it is had. Raises LockHeld, and OSError where there can be no such file."""
    path = lock_file()
    handle = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise LockHeld(timeout_seconds, path) from error
                time.sleep(_PAUSE_SECONDS)
        yield
    finally:
        os.close(handle)
