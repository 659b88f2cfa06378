"""Owns the echo servers: who answers at an address, and whom the answer shows as the client.

Each connection (TCP), datagram (UDP) or INIT (SCTP) is answered with one line, `NAME CLIENT_IP:PORT`: the name of the
server and the source address as it arrived there. A server of every address (`add_any`) is named by that at which it was
reached. A TCP connection then stays open until the client closes it, and
each line the client sends is answered with the same line again, so that a flow can be seen to live on.

One thread serves all sockets of all namespaces; a socket belongs to the namespace it was made in.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from nodeproxy.sandbox import sctp
from nodeproxy.sandbox.namespace import Namespace
from nodeproxy.sandbox.sockets import IP_PKTINFO, RESET_ON_CLOSE, any_address, family_of, host_port

BACKLOG: Final = 4096
Handler = Callable[[], None]
Key = tuple[str, str, int, str]  # namespace, address, port, protocol
SctpKey = tuple[str, socket.AddressFamily]


class EchoServers:
    """All servers of a sandbox. `answers` counts what each name has answered."""

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter()
        self._sockets: dict[Key, socket.socket] = {}
        self._connections: set[socket.socket] = set()
        self._sctp: dict[SctpKey, _SctpSocket] = {}
        self._selector = selectors.DefaultSelector()
        self._lock = threading.RLock()
        self._wake_read, self._wake_write = os.pipe()
        self._closing = False
        self._selector.register(self._wake_read, selectors.EVENT_READ, lambda: None)
        self._thread = threading.Thread(target=self._loop, name="echo-servers", daemon=True)
        self._thread.start()

    def add(self, where: Namespace, address: str, port: int, *, protocol: str = "TCP", name: str | None = None) -> None:
        """Serve address:port in a namespace. The address need not be one of the namespace's own."""
        label = name or host_port(address, port)
        key = (where.name, address, port, protocol)
        if protocol == "SCTP":
            self._add_sctp(where, address, port, label)
            return
        kind = socket.SOCK_STREAM if protocol == "TCP" else socket.SOCK_DGRAM
        sock = where.run(_listen, kind, address, port)
        serve = self._accept if protocol == "TCP" else self._datagram
        with self._lock:
            self._sockets[key] = sock
            self._selector.register(sock, selectors.EVENT_READ, lambda: serve(sock, label))
        self._wake()

    def add_any(self, where: Namespace, family: int, port: int, *, protocol: str = "TCP") -> None:
        """Serve a port at every address of a family (4 or 6) in a namespace; its name is address:port as it was reached."""
        anything = "::" if family == 6 else "0.0.0.0"
        if protocol == "SCTP":
            self._add_sctp(where, anything, port, "")
            return
        kind = socket.SOCK_STREAM if protocol == "TCP" else socket.SOCK_DGRAM
        sock = where.run(_listen, kind, anything, port)
        serve = self._accept if protocol == "TCP" else self._datagram_at
        with self._lock:
            self._sockets[where.name, anything, port, protocol] = sock
            self._selector.register(sock, selectors.EVENT_READ, lambda: serve(sock, ""))
        self._wake()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No server answers meanwhile; TCP connections are made all the same, by the kernel."""
        with self._lock:
            yield

    def remove(self, where: Namespace, address: str, port: int, *, protocol: str = "TCP") -> None:
        """Stop serving there: new clients find the port closed; open TCP connections stay."""
        with self._lock:
            if protocol == "SCTP":
                self._sctp[where.name, family_of(address)].names.pop((address, port))
                return
            sock = self._sockets.pop((where.name, address, port, protocol))
            self._selector.unregister(sock)
            sock.close()

    def close(self) -> None:
        """Close every socket and end the thread."""
        if self._closing:
            return
        self._closing = True
        self._wake()
        self._thread.join()
        for sock in [*self._sockets.values(), *self._connections, *(one.sock for one in self._sctp.values())]:
            sock.close()
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _wake(self) -> None:
        os.write(self._wake_write, b".")

    def _loop(self) -> None:
        while not self._closing:
            events = self._selector.select()
            with self._lock:
                for key, _ in events:
                    if key.fd == self._wake_read:
                        os.read(self._wake_read, 4096)
                    elif key.fd in self._selector.get_map():
                        handler: Handler = key.data
                        handler()

    def _line(self, name: str, host: str, port: int) -> bytes:
        self.answers[name] += 1
        return f"{name} {host_port(host, port)}\n".encode()

    def _accept(self, listener: socket.socket, name: str) -> None:
        while True:
            try:
                connection, peer = listener.accept()
            except BlockingIOError:
                return
            except OSError:
                continue  # the client was gone before we looked
            connection.setblocking(False)
            line = self._line(name or host_port(*connection.getsockname()[:2]), peer[0], peer[1])
            with contextlib.suppress(OSError):
                connection.send(line)
            self._connections.add(connection)
            self._selector.register(connection, selectors.EVENT_READ, lambda c=connection, t=line: self._talk(c, t))

    def _talk(self, connection: socket.socket, line: bytes) -> None:
        try:
            received = connection.recv(4096)
            connection.send(line * received.count(b"\n"))
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self._selector.unregister(connection)
            self._connections.discard(connection)
            connection.close()

    def _datagram(self, sock: socket.socket, name: str) -> None:
        while True:
            try:
                _, peer = sock.recvfrom(2048)
                sock.sendto(self._line(name, peer[0], peer[1]), peer)
            except BlockingIOError:
                return
            except OSError:
                continue  # an ICMP error about an earlier answer

    def _datagram_at(self, sock: socket.socket, _name: str) -> None:
        """Answers from the address that was asked."""
        while True:
            try:
                _, ancillary, _, peer = sock.recvmsg(2048, 256)
                address, info = _packet_info(sock.family, ancillary)
                line = self._line(host_port(address, sock.getsockname()[1]), peer[0], peer[1])
                sock.sendmsg([line], [info], 0, peer)
            except BlockingIOError:
                return
            except OSError:
                continue  # an ICMP error about an earlier answer

    def _add_sctp(self, where: Namespace, address: str, port: int, name: str) -> None:
        if Path("/proc/net/sctp").exists():
            raise OSError("this kernel's own SCTP is loaded and would answer before ours does: unload it (rmmod sctp)")
        key = (where.name, family_of(address))
        with self._lock:
            if key not in self._sctp:
                made = _SctpSocket(where.run(_raw_sctp, key[1]), self._line)
                self._sctp[key] = made
                self._selector.register(made.sock, selectors.EVENT_READ, made.serve)
                self._wake()
            self._sctp[key].names[address, port] = name


class _SctpSocket:
    """A raw socket that answers INIT: with INIT ACK for the (address, port) pairs in `names`, else with ABORT."""

    def __init__(self, sock: socket.socket, line: Callable[[str, str, int], bytes]) -> None:
        self.sock = sock
        self.names: dict[tuple[str, int], str] = {}
        self._line = line

    def serve(self) -> None:
        while True:
            try:
                data, ancillary, _, peer = self.sock.recvmsg(2048, 256)
            except BlockingIOError:
                return
            except OSError:
                continue
            if self.sock.family == socket.AF_INET:
                destination = socket.inet_ntop(socket.AF_INET, data[16:20])
                data = data[(data[0] & 15) * 4 :]
            else:
                info = next(value for _, kind, value in ancillary if kind == socket.IPV6_PKTINFO)
                destination = socket.inet_ntop(socket.AF_INET6, info[:16])
            packet = sctp.parse(data)
            if packet is None or packet.chunk != sctp.INIT:
                continue
            port = packet.destination_port
            name = self.names.get((destination, port))
            if name is None and (_any_address_of(self.sock.family), port) in self.names:
                name = host_port(destination, port)
            if name is None:
                answer = sctp.abort(packet)
            else:
                line = self._line(name, peer[0], packet.source_port)
                answer = sctp.init_ack(packet, secrets.randbits(31) + 1, line)
            with contextlib.suppress(OSError):
                self._send(destination, peer[0], answer)

    def _send(self, source: str, to: str, packet: bytes) -> None:
        if self.sock.family == socket.AF_INET:
            header = struct.pack("!BBHHHBBH", 0x45, 0, 0, 0, 0, 64, sctp.PROTOCOL, 0)
            self.sock.sendto(header + socket.inet_aton(source) + socket.inet_aton(to) + packet, (to, 0))
        else:
            info = socket.inet_pton(socket.AF_INET6, source) + struct.pack("I", 0)
            self.sock.sendmsg([packet], [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, info)], 0, (to, 0))


def _any_address_of(family: int) -> str:
    return "::" if family == socket.AF_INET6 else "0.0.0.0"


def _tell_packet_info(sock: socket.socket) -> None:
    """Let the socket say at which address a datagram arrived."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)


def _packet_info(family: int, ancillary: Iterable[tuple[int, int, bytes]]) -> tuple[str, tuple[int, int, bytes]]:
    """The address at which a datagram arrived, and what makes an answer leave from there."""
    if family == socket.AF_INET6:
        data = next(data for _, kind, data in ancillary if kind == socket.IPV6_PKTINFO)
        info = (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, data[:16] + struct.pack("I", 0))
        return socket.inet_ntop(socket.AF_INET6, data[:16]), info
    data = next(data for _, kind, data in ancillary if kind == IP_PKTINFO)
    address = data[8:12]  # struct in_pktinfo: interface, the local address, the destination in the header
    return socket.inet_ntoa(address), (socket.IPPROTO_IP, IP_PKTINFO, struct.pack("I4s4s", 0, address, address))


def _listen(kind: socket.SocketKind, address: str, port: int) -> socket.socket:
    sock = socket.socket(family_of(address), kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        any_address(sock)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            if address == _any_address_of(sock.family):
                _tell_packet_info(sock)
        sock.bind((address, port))
        if kind == socket.SOCK_STREAM:
            sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _raw_sctp(family: socket.AddressFamily) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, sctp.PROTOCOL)
    any_address(sock)
    if family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    return sock
