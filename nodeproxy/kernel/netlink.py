"""Owns the netlink socket that the packed drivers share: batches with errors mapped to their message, and dumps.

Message bodies are bytes packed by the caller; headers are in host byte order, as netlink wants them. A batch asks for an
acknowledgement only of the last message of each datagram: the kernel reports every failure by itself, and handles the whole
datagram before `send` returns, so success of thousands of messages costs one read. Blocking; one thread at a time.

Sources: include/uapi/linux/netlink.h, net/netlink/af_netlink.c.
"""

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from typing import Final, Self

from nodeproxy.kernel.errors import AnswerLost, PermissionMissing, RequestRefused

NETLINK_ROUTE: Final = 0
NETLINK_NETFILTER: Final = 12

NLM_F_REQUEST: Final = 0x1
NLM_F_ACK: Final = 0x4
NLM_F_DUMP_INTR: Final = 0x10
NLM_F_EXCL: Final = 0x200
NLM_F_CREATE: Final = 0x400
NLM_F_DUMP: Final = 0x300

NLA_F_NESTED: Final = 0x8000
NLA_F_NET_BYTEORDER: Final = 0x4000
NLA_TYPE_MASK: Final = 0x3FFF

_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_SOL_NETLINK: Final = 270
_NETLINK_CAP_ACK: Final = 10
_NETLINK_EXT_ACK: Final = 11
_NLM_F_CAPPED: Final = 0x100
_NLM_F_ACK_TLVS: Final = 0x200
_NLMSGERR_ATTR_MSG: Final = 1
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33

_HEADER: Final = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port id
_HEADER_SIZE: Final = _HEADER.size
_ATTRIBUTE: Final = struct.Struct("=HH")
_ERROR: Final = struct.Struct("=i")

_BUFFER_BYTES: Final = 4 << 20
_DATAGRAM_BYTES: Final = 256 << 10  # the kernel copies a datagram into one buffer: larger ones only cost more at once
_DATAGRAM_MESSAGES: Final = 1500  # if all fail, their error messages (about 1.3 kB of buffer each) must fit _BUFFER_BYTES
_READ_BYTES: Final = 1 << 16

Message = tuple[int, int, bytes]
"""One message of a batch: nlmsg_type, extra nlmsg_flags, everything after the header."""


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded to 4 bytes; `kind` carries NLA_F_NESTED or NLA_F_NET_BYTEORDER where the family wants it."""
    size = 4 + len(value)
    return _ATTRIBUTE.pack(size, kind) + value + bytes(-size & 3)


def attributes(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Walk the attributes in data[start:end]: (kind without flags, first byte of the value, byte after the value)."""
    while end - start >= 4:
        size, kind = _ATTRIBUTE.unpack_from(data, start)
        if size < 4 or start + size > end:
            return
        yield kind & NLA_TYPE_MASK, start + 4, start + size
        start += (size + 3) & ~3


class NetlinkSocket:
    """A netlink socket of one protocol in the network namespace of the thread that makes it.

    Raises PermissionMissing where the kernel refuses a request for lack of CAP_NET_ADMIN, AnswerLost when an answer does not
    come within `timeout_seconds` or the receive buffer overran.
    """

    def __init__(self, protocol: int, *, timeout_seconds: float = 30.0) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._lock = threading.Lock()  # a dump and a batch that interleave would read each other's answers
        self._sequence = int.from_bytes(os.urandom(3), "little")
        self._timeout_seconds = timeout_seconds
        for force, plain in ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF)):
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, force, _BUFFER_BYTES)
            except PermissionError:
                self._socket.setsockopt(socket.SOL_SOCKET, plain, _BUFFER_BYTES)
        seconds, fraction = divmod(timeout_seconds, 1)
        self._socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), int(fraction * 1_000_000))
        )
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        self._socket.bind((0, 0))
        # Without CAP_NET_ADMIN the buffers stay at the system's limit: keep datagrams and their answers within it.
        receive = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        send = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self._datagram_messages = max(1, min(_DATAGRAM_MESSAGES, receive // 2048))
        self._datagram_bytes = min(_DATAGRAM_BYTES, send // 2)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def batch(self, messages: Sequence[Message], request: str = "netlink batch") -> dict[int, tuple[int, str]]:
        """Send all messages; return the refused ones: index in `messages` -> (positive errno, the kernel's text or "").

        Every message is carried out whatever happened to the others. Raises PermissionMissing, AnswerLost.
        """
        refused: dict[int, tuple[int, str]] = {}
        with self._lock:
            start = 0
            while start < len(messages):
                start = self._send_datagram(messages, start, refused, request)
        return refused

    def _send_datagram(
        self, messages: Sequence[Message], start: int, refused: dict[int, tuple[int, str]], request: str
    ) -> int:
        """Send messages[start:stop] as one datagram, collect its refusals, return stop."""
        first = self._sequence
        datagram = bytearray()
        pack = _HEADER.pack
        last_header = 0
        stop = start
        for kind, flags, body in messages[start : start + self._datagram_messages]:
            if datagram and len(datagram) + len(body) > self._datagram_bytes:
                break
            last_header = len(datagram)
            padding = -len(body) & 3
            datagram += pack(_HEADER_SIZE + len(body), kind, flags | NLM_F_REQUEST, first + stop - start, 0)
            datagram += body
            if padding:
                datagram += bytes(padding)
            stop += 1
        kind, flags, body = messages[stop - 1]
        last = first + stop - 1 - start
        _HEADER.pack_into(datagram, last_header, _HEADER_SIZE + len(body), kind, flags | NLM_F_REQUEST | NLM_F_ACK, last, 0)
        self._advance(stop - start)
        self._send(bytes(datagram), request)
        while True:
            data = self._receive(request)
            for kind, flags, sequence, at, end in _messages(data):
                if kind != _NLMSG_ERROR or not first <= sequence <= last:
                    continue  # left over from a request that timed out
                number, text = _error(data, flags, at, end)
                if number in (errno.EPERM, errno.EACCES):
                    raise PermissionMissing(request, text or "CAP_NET_ADMIN is needed")
                if number:
                    refused[start + sequence - first] = (number, text)
                if sequence == last:
                    return stop

    def dump(self, kind: int, body: bytes, flags: int = NLM_F_DUMP, request: str = "netlink dump") -> Iterator[bytes]:
        """Send one request, yield the answer's messages, each without its header, until the kernel says it is complete.

        With flags=0 the answer is a single message. Raises RequestRefused (EINTR: the data changed under the dump, and the
        caller may ask again), PermissionMissing, AnswerLost. The socket is busy until the iterator is exhausted or closed.
        """
        for data, start, end in self.dump_in_place(kind, body, flags, request):
            yield data[start:end]

    def dump_in_place(
        self, kind: int, body: bytes, flags: int = NLM_F_DUMP, request: str = "netlink dump"
    ) -> Iterator[tuple[bytes, int, int]]:
        """Like `dump`, without copying: (datagram, first byte after the header, byte after the message)."""
        with self._lock:
            sequence = self._sequence
            self._advance(1)
            acknowledged = 0 if flags & NLM_F_DUMP else NLM_F_ACK  # a single answer has no end mark but the acknowledgement
            header = _HEADER.pack(_HEADER_SIZE + len(body), kind, flags | NLM_F_REQUEST | acknowledged, sequence, 0)
            self._send(header + body, request)
            interrupted = False
            while True:
                data = self._receive(request)
                for found, message_flags, number, at, end in _messages(data):
                    if number != sequence:
                        continue
                    interrupted = interrupted or (found != _NLMSG_ERROR and bool(message_flags & NLM_F_DUMP_INTR))
                    if found not in (_NLMSG_ERROR, _NLMSG_DONE):
                        yield data, at, end
                        continue
                    code, text = _error(data, message_flags, at, end) if end - at >= 4 else (0, "")
                    if code in (errno.EPERM, errno.EACCES):
                        raise PermissionMissing(request, text or "CAP_NET_ADMIN is needed")
                    if code or interrupted:
                        raise RequestRefused(request, code or errno.EINTR, text)
                    return

    def _advance(self, count: int) -> None:
        """Move to the next unused sequence number, starting over well before 32 bits are full."""
        self._sequence += count
        if self._sequence > 0xF0000000:
            self._sequence = 1

    def _send(self, data: bytes, request: str) -> None:
        try:
            self._socket.sendto(data, (0, 0))
        except PermissionError as error:
            raise PermissionMissing(request, str(error)) from error

    def _receive(self, request: str) -> bytes:
        try:
            return self._socket.recv(_READ_BYTES)
        except BlockingIOError as error:
            raise AnswerLost(request, f"none within {self._timeout_seconds:g} s") from error
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                raise AnswerLost(request, "receive buffer overrun") from error
            raise


def _messages(data: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """The messages of a datagram: (type, flags, sequence, first byte after the header, byte after the message)."""
    at = 0
    unpack = _HEADER.unpack_from
    size = len(data)
    while size - at >= _HEADER_SIZE:
        length, kind, flags, sequence, _port = unpack(data, at)
        if length < _HEADER_SIZE:
            return
        yield kind, flags, sequence, at + _HEADER_SIZE, at + length
        at += (length + 3) & ~3


def _error(data: bytes, flags: int, start: int, end: int) -> tuple[int, str]:
    """(positive errno or 0, the kernel's explanation or "") of an NLMSG_ERROR or NLMSG_DONE message."""
    number = -_ERROR.unpack_from(data, start)[0]
    if not flags & _NLM_F_ACK_TLVS:
        return number, ""
    at = start + 4 + _HEADER_SIZE
    if not flags & _NLM_F_CAPPED:  # the whole request is quoted
        at = start + 4 + ((_HEADER.unpack_from(data, start + 4)[0] + 3) & ~3)
    for kind, first, last in attributes(data, at, end):
        if kind == _NLMSGERR_ATTR_MSG:
            return number, data[first:last].rstrip(b"\0").decode(errors="replace")
    return number, ""
