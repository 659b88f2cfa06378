"""Owns one request to a server of the tests (agnhost netexec), and what became of it.

A TCP request is one connection with two HTTP requests on it: who are you, and who am I. By UDP these are two datagrams. An
ICMP error is read from the socket's error queue, so a REJECT is told from a closed port, although an application sees
ECONNREFUSED for both.
"""

from __future__ import annotations

import errno
import itertools
import random
import re
import socket
import time
from dataclasses import dataclass
from typing import Final

from e2e.harness.pace import scaled
from nodeproxy.sandbox.client import Answered, Connected, Dropped, NoListener, Rejected, Unreachable, Verdict
from nodeproxy.sandbox.sockets import RESET_ON_CLOSE, family_of, next_icmp_error, receive_errors, split_host_port

PATIENT: Final = 5.0  # where an answer is expected: costs nothing when it comes
BRIEF: Final = 1.0  # where nothing is expected to come back; this one does not grow

WHO_ARE_YOU: Final = b"GET /hostname HTTP/1.1\r\nHost: e2e\r\n\r\n"
_WHO_AM_I: Final = b"GET /clientip HTTP/1.1\r\nHost: e2e\r\nConnection: close\r\n\r\n"
_LENGTH: Final = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_SEND_AGAIN: Final = 1.0
_FIRST_PORT, _END_PORT = 11000, 30000  # beyond what listens on nodes, below node ports
_OWN_PORTS: Final = itertools.cycle(random.sample(range(_FIRST_PORT, _END_PORT), _END_PORT - _FIRST_PORT))


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. `reset`: close with RST, so that neither conntrack nor IPVS remembers the connection for long.

    `lasting`: the source port is one that the kernel gives away. Else it is one of ours below these, because a request
    that is sent before a Service is programmed leaves an entry in conntrack that leads past the Service for two minutes,
    for whoever gets that port.
    """

    address: str
    port: int
    protocol: str = "TCP"
    source: str | None = None
    source_port: int = 0
    timeout: float = PATIENT
    reset: bool = False
    lasting: bool = False


def ask(what: Ask) -> Verdict:
    """Send it from the network namespace of the calling thread."""
    return _tcp(what) if what.protocol == "TCP" else _udp(what)


def name_of(verdict: Verdict) -> str:
    """Who answered; anything but an answer as itself: `Rejected()`."""
    return verdict.name if isinstance(verdict, Answered) else str(verdict)


def open_socket(what: Ask) -> socket.socket:
    """A socket of the request's family and kind, bound to its source."""
    kind = socket.SOCK_STREAM if what.protocol == "TCP" else socket.SOCK_DGRAM
    sock = socket.socket(family_of(what.address), kind)
    try:
        receive_errors(sock)
        _bind(sock, what)
        if what.reset and kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    except OSError:
        sock.close()
        raise
    return sock


def _bind(sock: socket.socket, what: Ask) -> None:
    if what.lasting:
        return
    source = what.source or ("::" if ":" in what.address else "0.0.0.0")
    if what.source_port:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((source, what.source_port))
        return
    for port in itertools.islice(_OWN_PORTS, 1000):
        try:
            sock.bind((source, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return
    raise OSError(errno.EADDRINUSE, "no source port is free")


def _limit(what: Ask) -> float:
    return what.timeout if what.timeout <= BRIEF else scaled(what.timeout)


def _tcp(what: Ask) -> Verdict:
    start = time.monotonic()
    with open_socket(what) as sock:
        sock.settimeout(_limit(what))
        try:
            sock.connect((what.address, what.port))
        except TimeoutError:
            return Dropped()
        except OSError as error:
            return _refusal(sock, error)
        try:
            sock.sendall(WHO_ARE_YOU + _WHO_AM_I)
            data = b""
            while block := sock.recv(4096):
                data += block
        except TimeoutError:
            return Connected()
        except OSError as error:
            return Unreachable(f"after it was connected: {error.strerror}")
        bodies = http_bodies(data)
        if len(bodies) != 2:
            return Connected()
        host, port = split_host_port(bodies[1])
        return Answered(bodies[0], host, port, time.monotonic() - start)


def _udp(what: Ask) -> Verdict:
    start = time.monotonic()
    with open_socket(what) as sock:
        try:
            sock.connect((what.address, what.port))
            name = _exchange(sock, b"hostname", _limit(what))
            peer = name and _exchange(sock, b"clientip", _limit(what), before=name)
        except OSError as error:
            return _refusal(sock, error)
        if not name or not peer:
            return Dropped()
        host, port = split_host_port(peer)
        return Answered(name, host, port, time.monotonic() - start)


def _exchange(sock: socket.socket, request: bytes, timeout: float, *, before: str = "") -> str:
    """The answer, or nothing. The datagram is sent once a second, as a resolver would.

    A second answer to the request `before`, which was sent twice, is not taken for one to this.
    """
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        sock.settimeout(min(_SEND_AGAIN, left))
        try:
            sock.send(request)
            answer = sock.recv(2048).decode()
            if answer != before:
                return answer
        except (TimeoutError, PermissionError):  # EPERM: dropped on its way out, by the rules of the node itself
            time.sleep(0.01)
    return ""


def _refusal(sock: socket.socket, error: OSError) -> Verdict:
    sock.setblocking(False)
    icmp = next_icmp_error(sock)
    if icmp is None:
        return NoListener() if isinstance(error, ConnectionRefusedError) else Unreachable(error.strerror or str(error))
    return Rejected() if icmp.port_unreachable else Unreachable(f"ICMP type {icmp.type} code {icmp.code}")


def http_bodies(data: bytes) -> list[str]:
    """The bodies of HTTP responses that came one after the other; an incomplete one is left out."""
    bodies: list[str] = []
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if length is None or len(rest) < int(length[1]) or b" 200 " not in head.split(b"\r\n")[0]:
            break
        bodies.append(rest[: int(length[1])].decode())
        data = rest[int(length[1]) :]
    return bodies
