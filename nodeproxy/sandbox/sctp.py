"""Owns the little of SCTP that a probe needs: INIT and INIT ACK as bytes (RFC 9260), with correct checksums.

Kernels without SCTP sockets still track and translate SCTP in netfilter, so two raw sockets and these packets show
where an association would go. The answer of a server travels in the INIT ACK's state cookie. Packets here begin with
the SCTP common header; ports are numbers, verification tags 32-bit numbers, all network byte order on the wire.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

PROTOCOL: Final = 132
INIT: Final = 1
INIT_ACK: Final = 2
ABORT: Final = 6
STATE_COOKIE: Final = 7

_COMMON = struct.Struct("!HHI")  # source port, destination port, verification tag; then the checksum
_CHUNK = struct.Struct("!BBH")  # type, flags, length
_INIT = struct.Struct("!IIHHI")  # initiate tag, receiver window, outbound streams, inbound streams, initial TSN
_CASTAGNOLI_REFLECTED: Final = 0x82F63B78


def _table() -> list[int]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (_CASTAGNOLI_REFLECTED if crc & 1 else 0)
        table.append(crc)
    return table


_TABLE = _table()


def crc32c(data: bytes) -> int:
    """The CRC-32C (Castagnoli) of data, as a number."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


class Packet(NamedTuple):
    """A received packet: its common header and what matters of its first chunk."""

    source_port: int
    destination_port: int
    verification_tag: int
    chunk: int
    initiate_tag: int
    cookie: bytes


def _with_checksum(source_port: int, destination_port: int, tag: int, chunk: bytes) -> bytes:
    header = _COMMON.pack(source_port, destination_port, tag)
    checksum = crc32c(header + bytes(4) + chunk)
    return header + struct.pack("<I", checksum) + chunk  # the CRC goes out least significant byte first


def init(source_port: int, destination_port: int, initiate_tag: int) -> bytes:
    """An INIT: asks for an association; its verification tag is 0."""
    body = _INIT.pack(initiate_tag, 65536, 1, 1, initiate_tag)
    return _with_checksum(source_port, destination_port, 0, _CHUNK.pack(INIT, 0, _CHUNK.size + len(body)) + body)


def init_ack(to: Packet, initiate_tag: int, cookie: bytes) -> bytes:
    """The INIT ACK to an INIT: carries the peer's tag, our own, and the cookie."""
    body = _INIT.pack(initiate_tag, 65536, 1, 1, initiate_tag)
    body += struct.pack("!HH", STATE_COOKIE, 4 + len(cookie)) + cookie
    padding = bytes(-len(body) % 4)
    chunk = _CHUNK.pack(INIT_ACK, 0, _CHUNK.size + len(body)) + body + padding
    return _with_checksum(to.destination_port, to.source_port, to.initiate_tag, chunk)


def abort(to: Packet) -> bytes:
    """The ABORT that says no to an INIT: nobody listens on that port."""
    return _with_checksum(to.destination_port, to.source_port, to.initiate_tag, _CHUNK.pack(ABORT, 0, _CHUNK.size))


def ports(data: bytes) -> tuple[int, int] | None:
    """(source, destination) of a packet, even if it is cut short as in an ICMP error."""
    if len(data) < 4:
        return None
    source, destination = struct.unpack_from("!HH", data)
    return source, destination


def parse(data: bytes) -> Packet | None:
    """Decode a packet; None if it is too short or its checksum is wrong."""
    if len(data) < 16:
        return None
    checksum = struct.unpack_from("<I", data, 8)[0]
    if crc32c(data[:8] + bytes(4) + data[12:]) != checksum:
        return None
    source, destination, tag = _COMMON.unpack_from(data)
    chunk, _, length = _CHUNK.unpack_from(data, 12)
    body = data[16 : 12 + length]
    if chunk not in (INIT, INIT_ACK) or len(body) < _INIT.size:
        return Packet(source, destination, tag, chunk, 0, b"")
    return Packet(source, destination, tag, chunk, _INIT.unpack_from(body)[0], _cookie(body[_INIT.size :]))


def _cookie(parameters: bytes) -> bytes:
    while len(parameters) >= 4:
        kind, length = struct.unpack_from("!HH", parameters)
        if length < 4:
            break
        if kind == STATE_COOKIE:
            return parameters[4:length]
        parameters = parameters[length + (-length % 4) :]
    return b""
