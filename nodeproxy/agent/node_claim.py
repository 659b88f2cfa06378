"""Owns the claim to be the one nodeproxy on a node: who holds the name `@nodeproxy` in a network namespace.

An abstract Unix socket: the kernel has one space of such names for each network namespace, frees a name when its process
ends, however it ends, and tells process and user of the holder. A lock file would be in a pod's own file system, where
another pod does not see it, or stay behind. Any user of the node may bind the name, so only a holder that is root, or of our
own user, counts.

Sources: unix(7), net/unix/af_unix.c.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import time
from typing import Final, NamedTuple, Self

import structlog

_log = structlog.get_logger(__name__)

_NAME: Final = "\0nodeproxy"
_CREDENTIALS: Final = struct.Struct("=iII")  # ucred: pid (0: not of our PID namespace), uid, gid
_TIMEOUT_SECONDS: Final = 1.0
_ATTEMPTS, _PAUSE_SECONDS = 5, 0.01


class Holder(NamedTuple):
    """Who holds the claim on this node: process id (0 where it is in a PID namespace that we do not see into), and user."""

    pid: int
    uid: int

    @property
    def counts(self) -> bool:
        """Whether it may be an agent: anybody can bind the name, to keep agents off."""
        return self.uid in (0, os.getuid())


class NodeClaim:
    """The claim to be the one nodeproxy in the network namespace of the thread that takes it. Released by `close`."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it. The end of the process does so, too."""
        if self._socket is not None:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(self._socket)
            self._socket.close()
            self._socket = self._loop = None

    def take(self) -> Holder | None:
        """Take it. None: it is ours now, or was already; else who holds it. A holder that does not count is passed over.

        Blocking, for a second at most.
        """
        for _ in range(_ATTEMPTS):
            self._socket = self._socket or _bound()
            if self._socket is not None:
                return None
            holder = _holder()
            if holder is not None and not holder.counts:
                _log.warning("another user holds the name of nodeproxy; it is not heeded", pid=holder.pid, uid=holder.uid)
                return None
            if holder is not None:
                return holder
            time.sleep(_PAUSE_SECONDS)  # it was let go of just now, or taken and does not listen yet
        return None

    def answer(self) -> None:
        """Receive those who ask, on the running event loop; else the kernel keeps some waiting, and holds up the others."""
        if self._socket is not None and self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._socket, self._let_go, self._socket)

    def _let_go(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            listening.accept()[0].close()


def _bound() -> socket.socket | None:
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        ours.bind(_NAME)
        ours.listen()  # only then a connection tells whose it is
    except OSError:
        ours.close()
        return None
    return ours


def _holder() -> Holder | None:
    """Who holds the claim; None where nobody listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as asking:
        asking.settimeout(_TIMEOUT_SECONDS)
        try:
            asking.connect(_NAME)
            credentials = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except ConnectionRefusedError:
            return None
        except OSError:
            return Holder(0, 0)  # it is there, and too busy to tell
    pid, uid, _ = _CREDENTIALS.unpack(credentials)
    return Holder(pid, uid)
