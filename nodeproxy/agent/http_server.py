"""Owns a small HTTP server for probes and scrapers: one request for each connection, any method, no request body.

It runs on the agent's event loop, without threads, so that it answers as long as the agent works, and thousands of listeners
cost little. A web framework would cost every node 15 MB and a third of the time to the first sync. These ports are open to
the network, so whatever a client sends or leaves out, it holds a bounded share of memory for a bounded time.
"""

from __future__ import annotations

import asyncio
import errno
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import Final, NamedTuple, TypeVar, cast

import structlog

_log = structlog.get_logger(__name__)

TEXT: Final = "text/plain; charset=utf-8"
_REQUEST_SECONDS: Final = 5.0  # for a client to send its request
_ANSWER_SECONDS: Final = 10.0  # and to take the answer
_MAX_REQUEST_BYTES: Final = 16 * 1024
_MAX_CONNECTIONS: Final = 512
_BACKLOG: Final = 128
_REQUEST_LINE: Final = re.compile(rb"([A-Z]{1,32}) ([!-~]+) HTTP/1\.[01]\r?\n")
_Answered = TypeVar("_Answered")
_END_OF_HEADERS: Final = re.compile(rb"\r?\n\r?\n")


class Answer(NamedTuple):
    """What is said to a request. `headers`: those beside the usual ones."""

    status: int
    content_type: str
    body: bytes
    headers: Mapping[str, str] = {}


Respond = Callable[[str], Answer | Callable[[], Answer]]
"""The answer to a request for a path, without query. Called on the event loop; returns at once.

What takes longer is returned as a function, which is called in a thread.
"""

Admit = Callable[[socket.socket], bool]
"""Whether who is at the other end of a connection is answered. One that is not is cut."""


def bound(address: str, port: int, *, scope: int = 0, both_families: bool = False) -> socket.socket:
    """A listening TCP socket. `scope`: interface index, for a link-local address. Raises OSError.

    `both_families`, for a wildcard address: connections of IPv4 and of IPv6, where the node has that.
    """
    if both_families:
        try:
            return _bound(socket.AF_INET6, ("::", port), v6_only=False)
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
        return _bound(socket.AF_INET, ("0.0.0.0", port))
    if ":" in address:
        return _bound(socket.AF_INET6, (address, port, 0, scope))
    return _bound(socket.AF_INET, (address, port))


def _bound(family: socket.AddressFamily, where: tuple[str | int, ...], *, v6_only: bool = True) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(v6_only))
        made.bind(where)
        made.listen(_BACKLOG)  # here, because a port in use may show only now
    except BaseException:
        made.close()
        raise
    return made


class Listener:
    """One listening socket that answers. Use as a context manager, or `close` it."""

    def __init__(self, connections: Connections, respond: Respond, admit: Admit | None = None) -> None:
        self._connections = connections
        self._respond = respond
        self._admit = admit
        self._server: asyncio.Server | None = None

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def open(self, sock: socket.socket) -> None:
        """Answer on a listening socket, which is the listener's from now on."""
        loop = asyncio.get_running_loop()
        # Not started by this call, which thus cannot be cancelled between the start and our knowing of the server.
        self._server = await loop.create_server(self._connection, sock=sock, backlog=_BACKLOG, start_serving=False)
        await self._server.start_serving()

    def close(self) -> None:
        """Stop listening, which frees the port at once. Connections that are open end by themselves, soon."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def _connection(self) -> _Connection:
        return _Connection(self._respond, self._connections, self._admit)


class Connections:
    """The open connections of a number of listeners: so many at most, because each costs a file descriptor and memory.

    Where there are too many the oldest goes. A flood of silent clients thus cannot keep out a probe, which is answered as
    soon as it has spoken.
    """

    def __init__(self, limit: int = _MAX_CONNECTIONS) -> None:
        self._limit = limit
        self._open: dict[_Connection, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    def listener(self, respond: Respond, admit: Admit | None = None) -> Listener:
        """A listener, not open yet, whose connections are counted here. By default everybody is answered."""
        return Listener(self, respond, admit)

    def close(self) -> None:
        """Cut all connections."""
        for connection in list(self._open):
            connection.abort()

    def add(self, connection: _Connection) -> None:
        """A connection was accepted."""
        self._open[connection] = None
        if len(self._open) > self._limit:
            next(iter(self._open)).abort()

    def remove(self, connection: _Connection) -> None:
        """A connection is closed."""
        self._open.pop(connection, None)


class _Connection(asyncio.Protocol):
    """One request and its answer. What a client sends after its request is read, a little of it, and ignored.

    Closing with input unread would reset the connection, and might take the answer with it.
    """

    def __init__(self, respond: Respond, connections: Connections, admit: Admit | None = None) -> None:
        self._respond = respond
        self._admit = admit
        self._connections = connections
        self._received = bytearray()
        self._answered = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(_REQUEST_SECONDS, self.abort)
        self._connections.add(self)
        if self._admit is not None and not self._admit(transport.get_extra_info("socket")):
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._connections.remove(self)

    def data_received(self, data: bytes) -> None:
        self._received += data
        too_long = len(self._received) > _MAX_REQUEST_BYTES
        if self._answered:
            if too_long:
                self.abort()
        elif end := _END_OF_HEADERS.search(self._received):
            self._answer(bytes(self._received[: end.end()]))
        elif too_long:
            self._send(False, Answer(431, TEXT, b"request too long\n"))

    def abort(self) -> None:
        """Cut the connection."""
        self._connections.remove(self)
        self._transport.abort()

    def _answer(self, request: bytes) -> None:
        found = _REQUEST_LINE.match(request)
        if found is None:
            self._send(False, Answer(400, TEXT, b"not an HTTP/1.1 request\n"))
            return
        method, target = found.groups()
        path = target.decode("ascii").partition("?")[0]
        answer = _answered(path, lambda: self._respond(path))
        if isinstance(answer, Answer):
            self._send(method == b"HEAD", answer)
            return
        self._answered = True
        working = self._loop.run_in_executor(None, _answered, path, answer)
        working.add_done_callback(lambda done: self._send_later(method == b"HEAD", done.result()))

    def _send_later(self, head_only: bool, answer: Answer) -> None:
        if not self._transport.is_closing():
            self._send(head_only, answer)

    def _send(self, head_only: bool, answer: Answer) -> None:
        self._answered = True
        self._received.clear()
        self._timer.cancel()
        self._timer = self._loop.call_later(_ANSWER_SECONDS, self.abort)
        self._transport.write(_head(answer) + (b"" if head_only else answer.body))
        if self._transport.can_write_eof():
            self._transport.write_eof()


def _answered(path: str, respond: Callable[[], _Answered]) -> _Answered | Answer:
    try:
        return respond()
    except Exception as error:  # a fault of ours must show, and must not stop the server
        _log.error("cannot answer a request", path=path, error=repr(error))
        return Answer(500, TEXT, b"internal error\n")


def _head(answer: Answer) -> bytes:
    headers: Iterable[tuple[str, str]] = (
        ("Server", "nodeproxy"),  # tells us from kube-proxy, which answers alike (`other_proxies`)
        ("Content-Type", answer.content_type),
        ("X-Content-Type-Options", "nosniff"),
        *answer.headers.items(),
        ("Content-Length", str(len(answer.body))),
        ("Date", formatdate(usegmt=True)),
        ("Connection", "close"),
    )
    lines = [
        f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}",
        *(f"{name}: {value}" for name, value in headers),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
