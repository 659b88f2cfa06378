"""Owns the agent's local socket: an abstract Unix socket on which it answers tools on its own node, over HTTP.

The kernel has one space of such names for each network namespace, so that `nodeproxy status` finds the agent that programs
the namespace it is called in, without a file, a port or a certificate. Only root and the agent's own user are answered.

Sources: unix(7), net/unix/af_unix.c.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from typing import Final

import structlog

from nodeproxy.agent.backoff import Backoff
from nodeproxy.agent.http import Routes, by_path
from nodeproxy.agent.http_server import Connections

NAME: Final = "\0nodeproxy-status"
SHOWN_NAME: Final = "@nodeproxy-status"
CREDENTIALS: Final = "=iII"  # ucred: pid (0: not of our PID namespace), uid, gid
_BACKLOG: Final = 16
_CONNECTIONS: Final = 16

_log = structlog.get_logger(__name__)


@asynccontextmanager
async def answering(routes: Routes) -> AsyncIterator[None]:
    """Answer on the local socket. Where another holds its name, that is said once, and tried again until it is free."""
    task = asyncio.create_task(_answer(routes), name="local-socket")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _answer(routes: Routes) -> None:
    with (
        closing(Connections(_CONNECTIONS)) as connections,
        connections.listener(by_path(routes), admit=_is_trusted) as listener,
    ):
        backoff = Backoff(0.5, 5.0)
        complained = False
        while True:
            try:
                await listener.open(_bound())
                break
            except OSError as error:
                if not complained:
                    complained = True
                    _log.info("no local socket; trying again", name=SHOWN_NAME, error=error.strerror)
                await asyncio.sleep(backoff.next())
        await asyncio.Event().wait()


def _bound() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        made.bind(NAME)
        made.listen(_BACKLOG)
    except BaseException:
        made.close()
        raise
    return made


def _is_trusted(peer: socket.socket) -> bool:
    _, uid, _ = struct.unpack(CREDENTIALS, peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return uid in (0, os.getuid())
