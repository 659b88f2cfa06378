"""Owns the probes: one packet exchange each, and a verdict on what became of it.

A probe is sent from a namespace, from a source address of choice, and ends in one of six verdicts. An ICMP error is
read from the socket's error queue, so a REJECT is told from a closed port even where both mean ECONNREFUSED. Only one
SYN, datagram or INIT is sent, so a verdict is about that packet (TCP repeats a SYN after 1 s: stay below).

Times are in seconds. `probe_many` runs its probes at the same time, so many that are dropped cost one time-out.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import select
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from nodeproxy.sandbox import sctp
from nodeproxy.sandbox.namespace import Namespace
from nodeproxy.sandbox.pace import scaled
from nodeproxy.sandbox.sockets import (
    IP_BIND_ADDRESS_NO_PORT,
    RESET_ON_CLOSE,
    TCP_SYNCNT,
    IcmpError,
    family_of,
    next_icmp_error,
    receive_errors,
    split_host_port,
)

TIMEOUT: Final = 0.4
PATIENT: Final = 0.9  # where an answer is expected: costs nothing when it comes, and bears with a busy machine
AT_ONCE: Final = 200
_TCP_ESTABLISHED: Final = 1
_SCTP_PORTS: Final = itertools.count(secrets.randbelow(28000))  # one after the other: two alike would be one connection


@dataclass(frozen=True, slots=True)
class Probe:
    """What to send: destination address and port, TCP, UDP or SCTP, and from where (by default as the kernel picks)."""

    destination: str
    port: int
    protocol: str = "TCP"
    source: str | None = None
    source_port: int = 0


@dataclass(frozen=True, slots=True)
class Answered:
    """A server answered: its name, and the client's address and port as the server saw them."""

    name: str
    source: str
    source_port: int
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Connected:
    """A TCP connection was made, but the server did not say who it is (not one of ours)."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """An ICMP port unreachable came back: for TCP always a firewall's REJECT."""


@dataclass(frozen=True, slots=True)
class NoListener:
    """Nobody is there: a TCP reset, an SCTP ABORT, or ICMP protocol unreachable where SCTP is not spoken at all."""


@dataclass(frozen=True, slots=True)
class Unreachable:
    """The way ended: another ICMP error, or no route; `reason` says which."""

    reason: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """Nothing came back within the time-out."""


Verdict = Answered | Connected | Rejected | NoListener | Unreachable | Dropped


def probe(where: Namespace, what: Probe, *, timeout: float = TIMEOUT) -> Verdict:
    """Send one probe from a namespace."""
    return probe_many(where, [what], timeout=timeout)[0]


def probe_many(where: Namespace, probes: Sequence[Probe], *, timeout: float = TIMEOUT) -> list[Verdict]:
    """Send many probes from a namespace, up to 200 at the same time; verdicts in the order of the probes.

    The time-out is for a machine of usual speed; on a slower one it is longer.
    """
    verdicts: list[Verdict] = []
    for start in range(0, len(probes), AT_ONCE):
        verdicts += where.run(_batch, probes[start : start + AT_ONCE], adapted(timeout))
    return verdicts


def adapted(timeout: float) -> float:
    """A time-out of probes on this machine. The short one, which every dropped packet costs, grows little."""
    return min(scaled(timeout), max(timeout, 1.2 if timeout <= TIMEOUT else 12.0))


def _batch(probes: Sequence[Probe], timeout: float) -> list[Verdict]:
    """Runs in the namespace's thread."""
    attempts: list[_Attempt | Verdict] = []
    for one in probes:
        try:
            attempts.append(_SctpAttempt(one) if one.protocol == "SCTP" else _Attempt(one))
        except OSError as error:
            attempts.append(Unreachable(f"{one.source or 'any'} to {one.destination}: {error.strerror}"))
    try:
        _wait([a for a in attempts if isinstance(a, _Attempt)], timeout)
        return [a.final() if isinstance(a, _Attempt) else a for a in attempts]
    finally:
        for attempt in attempts:
            if isinstance(attempt, _Attempt):
                attempt.close()


def _wait(attempts: Iterable[_Attempt], timeout: float) -> None:
    poll = select.poll()
    open_attempts = {one.sock.fileno(): one for one in attempts if one.verdict is None}
    for descriptor in open_attempts:
        poll.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + timeout
    while open_attempts and (left := deadline - time.monotonic()) > 0:
        for descriptor, _ in poll.poll(left * 1000):
            one = open_attempts[descriptor]
            one.look()
            if one.verdict is not None:
                poll.unregister(descriptor)
                del open_attempts[descriptor]


def _verdict_of(error: IcmpError) -> Verdict:
    if error.port_unreachable:
        return Rejected()
    if error.protocol_unreachable:
        return NoListener()
    return Unreachable(f"ICMP type {error.type} code {error.code}")


class _Attempt:
    """One TCP or UDP probe under way."""

    def __init__(self, what: Probe) -> None:
        self.what = what
        self.verdict: Verdict | None = None
        self.started = time.monotonic()
        self.sock = self._socket()
        try:
            self.sock.setblocking(False)
            receive_errors(self.sock)
            self._start()
        except OSError:
            self.sock.close()
            raise

    def _socket(self) -> socket.socket:
        kind = socket.SOCK_STREAM if self.what.protocol == "TCP" else socket.SOCK_DGRAM
        return socket.socket(family_of(self.what.destination), kind)

    def _bind(self) -> None:
        if self.what.source is not None:
            self.sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, int(self.what.source_port == 0))
            self.sock.bind((self.what.source, self.what.source_port))

    def _start(self) -> None:
        if self.what.protocol == "TCP":
            self.sock.setsockopt(socket.IPPROTO_TCP, TCP_SYNCNT, 1)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self._bind()
        code = self.sock.connect_ex((self.what.destination, self.what.port))
        if code not in (0, errno.EINPROGRESS):
            self._failed(code)
        elif self.what.protocol == "UDP":
            with contextlib.suppress(PermissionError, ConnectionRefusedError):  # filtered on the way out: ICMP says how
                self.sock.send(b"?\n")

    def _failed(self, code: int) -> None:
        if error := next_icmp_error(self.sock):
            self.verdict = _verdict_of(error)
        elif code == errno.ECONNREFUSED:
            self.verdict = NoListener()
        elif code == errno.ETIMEDOUT:  # TCP gave up first, as it does where ours is a slow machine's time-out
            self.verdict = Dropped()
        else:
            self.verdict = Unreachable(os.strerror(code))

    def look(self) -> None:
        """The socket has something: an ICMP error, a failure or the answer."""
        if error := next_icmp_error(self.sock):
            self.verdict = _verdict_of(error)
            return
        try:
            data = self.sock.recv(2048)
        except BlockingIOError:
            return
        except OSError as failure:
            self._failed(failure.errno or 0)
            return
        self.verdict = self._answer(data) if data else Connected()

    def _answer(self, data: bytes) -> Verdict:
        name, _, peer = data.decode().partition("\n")[0].rpartition(" ")
        if not name:
            return Connected()
        host, port = split_host_port(peer)
        return Answered(name, host, port, time.monotonic() - self.started)

    def final(self) -> Verdict:
        """The verdict now that the time is over."""
        if self.verdict is None and (error := next_icmp_error(self.sock)):
            self.verdict = _verdict_of(error)
        if self.verdict is not None:
            return self.verdict
        if self.what.protocol == "TCP":
            state = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[0]
            return Connected() if state == _TCP_ESTABLISHED else Dropped()
        return Dropped()

    def close(self) -> None:
        self.sock.close()


class _SctpAttempt(_Attempt):
    """One INIT under way. Each attempt has a raw socket and its own ports; others' packets are passed over."""

    def _socket(self) -> socket.socket:
        return socket.socket(family_of(self.what.destination), socket.SOCK_RAW, sctp.PROTOCOL)

    def _start(self) -> None:
        self.port = self.what.source_port or 32768 + next(_SCTP_PORTS) % 28000
        self.tag = secrets.randbits(31) + 1
        if self.what.source is not None:
            self.sock.bind((self.what.source, 0))
        self.sock.connect((self.what.destination, 0))
        with contextlib.suppress(PermissionError):
            self.sock.send(sctp.init(self.port, self.what.port, self.tag))

    def look(self) -> None:
        while error := next_icmp_error(self.sock):
            if sctp.ports(error.payload) == (self.port, self.what.port):
                self.verdict = _verdict_of(error)
                return
        while True:
            try:
                data = self.sock.recv(2048)
            except OSError:
                return
            if self.sock.family == socket.AF_INET:
                data = data[(data[0] & 15) * 4 :]
            packet = sctp.parse(data)
            if packet and (packet.destination_port, packet.verification_tag) == (self.port, self.tag):
                self.verdict = self._answer(packet.cookie) if packet.chunk == sctp.INIT_ACK else NoListener()
                return

    def final(self) -> Verdict:
        if self.verdict is None:
            self.look()
        return self.verdict or Dropped()
