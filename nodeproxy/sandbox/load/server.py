"""Owns the process that serves all backends of a load, each in its network namespace.

    python -m nodeproxy.sandbox.load.server      # commands as JSON lines; each is answered with one

A line that comes (TCP) and a datagram (UDP) is answered with itself behind the server's name: `NAME LINE`. A server that is
told to stop listening keeps its connections, as a pod that drains does; one that is killed resets them.
"""

from __future__ import annotations

import os
import select
import socket
import sys
from typing import Final, Literal

import msgspec
from msgspec import Struct

from nodeproxy.sandbox.load.children import enter
from nodeproxy.sandbox.sockets import RESET_ON_CLOSE, any_address, family_of

_BACKLOG: Final = 4096
_ACCEPT_AT_ONCE: Final = 64
_READABLE: Final = select.EPOLLIN | select.EPOLLRDHUP


class Command(Struct, frozen=True):
    """Serve, stop listening, or kill: the server named `name` at address:port in a namespace."""

    do: Literal["serve", "stop", "kill"]
    namespace: str
    address: str
    port: int
    protocol: Literal["TCP", "UDP"]
    name: str


class Reply(Struct, frozen=True):
    """`error` is empty if it was done."""

    error: str = ""


Key = tuple[str, str, int, str]


class Servers:
    """All listeners and connections, in one loop."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._by_key: dict[Key, socket.socket] = {}
        self._listeners: dict[int, tuple[socket.socket, bytes]] = {}
        self._datagrams: dict[int, tuple[socket.socket, bytes]] = {}
        self._connections: dict[int, tuple[socket.socket, bytes]] = {}
        self._input = b""

    def run(self) -> None:
        """Until the input ends."""
        control = sys.stdin.fileno()
        os.set_blocking(control, False)
        self._epoll.register(control, select.EPOLLIN)
        while True:
            for descriptor, _ in self._epoll.poll():
                if connection := self._connections.get(descriptor):
                    self._talk(descriptor, *connection)
                elif listener := self._listeners.get(descriptor):
                    self._accept(*listener)
                elif server := self._datagrams.get(descriptor):
                    self._answer(*server)
                elif descriptor == control and not self._obey(control):
                    return

    def _obey(self, control: int) -> bool:
        data = os.read(control, 1 << 16)
        *lines, self._input = (self._input + data).split(b"\n")
        for line in lines:
            try:
                self._do(msgspec.json.decode(line, type=Command))
                reply = Reply()
            except (OSError, KeyError) as error:
                reply = Reply(f"{line.decode()}: {error!r}")
            os.write(sys.stdout.fileno(), msgspec.json.encode(reply) + b"\n")
        return bool(data)

    def _do(self, command: Command) -> None:
        key = (command.namespace, command.address, command.port, command.protocol)
        if command.do == "serve":
            self._by_key[key] = self._listen(command)
            return
        if (sock := self._by_key.pop(key, None)) is not None:
            self._listeners.pop(sock.fileno(), None)
            self._datagrams.pop(sock.fileno(), None)
            sock.close()
        if command.do == "kill":
            name = command.name.encode()
            for descriptor, (connection, whose) in list(self._connections.items()):
                if whose == name:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                    self._drop(descriptor, connection)

    def _listen(self, command: Command) -> socket.socket:
        enter(command.namespace)
        kind = socket.SOCK_STREAM if command.protocol == "TCP" else socket.SOCK_DGRAM
        sock = socket.socket(family_of(command.address), kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            any_address(sock)
            if kind == socket.SOCK_STREAM:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            sock.bind((command.address, command.port))
            if kind == socket.SOCK_STREAM:
                sock.listen(_BACKLOG)
        except OSError:
            sock.close()
            raise
        table = self._listeners if kind == socket.SOCK_STREAM else self._datagrams
        table[sock.fileno()] = (sock, command.name.encode())
        self._epoll.register(sock.fileno(), select.EPOLLIN)
        return sock

    def _accept(self, listener: socket.socket, name: bytes) -> None:
        for _ in range(_ACCEPT_AT_ONCE):
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError:
                continue  # the client was gone before we looked
            connection.setblocking(False)
            descriptor = connection.fileno()
            self._connections[descriptor] = (connection, name)
            self._epoll.register(descriptor, _READABLE)

    def _talk(self, descriptor: int, connection: socket.socket, name: bytes) -> None:
        try:
            received = connection.recv(4096)
            if received:
                connection.send(_named(received, name))
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._drop(descriptor, connection)

    def _drop(self, descriptor: int, connection: socket.socket) -> None:
        del self._connections[descriptor]
        connection.close()

    def _answer(self, sock: socket.socket, name: bytes) -> None:
        for _ in range(_ACCEPT_AT_ONCE):
            try:
                request, client = sock.recvfrom(2048)
                sock.sendto(name + b" " + request, client)
            except BlockingIOError:
                return
            except OSError:
                continue  # an ICMP error about an earlier answer


def _named(received: bytes, name: bytes) -> bytes:
    if received.count(b"\n") == 1:
        return name + b" " + received
    return b"".join(name + b" " + line + b"\n" for line in received.split(b"\n")[:-1])


def main() -> None:
    """Serve until the standard input ends."""
    Servers().run()


if __name__ == "__main__":
    main()
