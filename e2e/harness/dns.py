"""Owns DNS requests from a place: one question about addresses, by UDP or by TCP, to a server of choice."""

from __future__ import annotations

import ipaddress
import secrets
import socket
import struct
from typing import Final

from e2e.harness.pace import scaled
from e2e.harness.places import Place
from nodeproxy.sandbox.sockets import family_of

_HEADER: Final = struct.Struct(">HHHHHH")
_RECORD: Final = struct.Struct(">HHIH")
_TYPES: Final = {4: 1, 6: 28}  # A, AAAA
_TIMEOUT: Final = 5.0


def resolve(place: Place, server: str, name: str, *, tcp: bool = False, family: int = 4) -> set[str]:
    """The addresses of a name; none where the server says that there are none, or says nothing."""
    return place.run(_resolve, server, name, tcp, _TYPES[family])


def _resolve(server: str, name: str, tcp: bool, kind: int) -> set[str]:
    number = secrets.randbelow(1 << 16)
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.rstrip(".").split("."))
    query = _HEADER.pack(number, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", kind, 1)
    with socket.socket(family_of(server), socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as sock:
        sock.settimeout(scaled(_TIMEOUT))
        try:
            sock.connect((server, 53))
            sock.sendall(struct.pack(">H", len(query)) + query if tcp else query)
            answer = _read(sock) if tcp else sock.recv(4096)
        except OSError:
            return set()
    return _addresses(answer, kind) if answer[:2] == query[:2] else set()


def _read(sock: socket.socket) -> bytes:
    with sock.makefile("rb") as stream:
        return stream.read(struct.unpack(">H", stream.read(2))[0])


def _addresses(answer: bytes, kind: int) -> set[str]:
    _, _, questions, answers, _, _ = _HEADER.unpack_from(answer)
    position = _HEADER.size
    for _ in range(questions):
        position = _after_name(answer, position) + 4
    found = set()
    for _ in range(answers):
        position = _after_name(answer, position)
        this, _, _, length = _RECORD.unpack_from(answer, position)
        position += _RECORD.size
        if this == kind:
            found.add(str(ipaddress.ip_address(answer[position : position + length])))
        position += length
    return found


def _after_name(answer: bytes, position: int) -> int:
    while length := answer[position]:
        if length >= 0xC0:  # the rest of the name is elsewhere
            return position + 2
        position += length + 1
    return position + 1
