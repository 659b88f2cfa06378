"""Owns sending the traced packet for real, from the node itself, and asking conntrack where the kernel sent it.

One TCP SYN, or one empty UDP datagram; a connection that comes about is reset. What was rejected or dropped before it
left has no conntrack entry. Nor has a SYN that was answered by a reset at once (net/netfilter/nf_conntrack_proto_tcp.c),
nor what is not tracked: of these it cannot be told where they went.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
import time
from collections.abc import Sequence
from typing import Final

from nodeproxy.kernel import conntrack
from nodeproxy.kernel.errors import KernelError
from nodeproxy.trace.ends import TraceError, endpoint_text
from nodeproxy.trace.kernel_view import KernelViewError
from nodeproxy.trace.results import Destination, Sent, TracedPacket
from nodeproxy.trace.walk import End

_KINDS: Final = {"tcp": (socket.SOCK_STREAM, conntrack.TCP), "udp": (socket.SOCK_DGRAM, conntrack.UDP)}
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s
_SECONDS: Final = 1.0  # the first packet is on its way, or refused, long before


def send(packet: TracedPacket, walked: Sequence[Destination]) -> Sent:
    """Send the packet, and say whether conntrack has it where the walk has it. Raises TraceError, KernelViewError."""
    if packet.protocol not in _KINDS:
        raise TraceError(f"--send: only TCP and UDP can be sent, not {packet.protocol.upper()}")
    kind, number = _KINDS[packet.protocol]
    family = socket.AF_INET if packet.family == 4 else socket.AF_INET6
    with socket.socket(family, kind) as sock:
        try:
            sock.bind((packet.source, 0))
            sock.setblocking(False)
            if packet.protocol == "tcp":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            refusal = _sent(sock, packet)
            at = sock.getsockname()[1]
            entry = _entry(packet, number, at, sock)
            refusal = refusal or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        except OSError as error:
            raise TraceError(f"--send: {error.strerror}") from error
    here = endpoint_text(packet.source, at)
    if entry is None:
        return Sent(here, None, None, _confirmed_without_entry(refusal, walked), errno.errorcode.get(refusal, ""))
    to = endpoint_text(entry.reply_source, entry.reply_source_port)
    answers = endpoint_text(entry.reply_destination, entry.reply_destination_port)
    return Sent(here, to, answers if answers != here else None, _confirmed(to, packet, walked))


def _confirmed(to: str, packet: TracedPacket, walked: Sequence[Destination]) -> bool | None:
    """Whether the walk has it going there; None where the walk did not get so far."""
    arriving = [one for one in walked if one.end in (End.SENT, End.DELIVERED)]
    if to in {one.backend or endpoint_text(packet.destination, packet.port) for one in arriving}:
        return True
    return None if any(one.end == End.UNKNOWN for one in walked) else False


def _confirmed_without_entry(refusal: int, walked: Sequence[Destination]) -> bool | None:
    """Whether the walk has it stopped on the way; None where it may have arrived without an entry, or the walk got lost."""
    if any(one.end not in (End.SENT, End.DELIVERED, End.UNKNOWN) for one in walked):
        return True
    lost = any(one.end == End.UNKNOWN or one.untracked for one in walked)
    return None if lost or refusal == errno.ECONNREFUSED else False


def _sent(sock: socket.socket, packet: TracedPacket) -> int:
    """Send the first packet; the errno with which the kernel refused it at once, 0 for none."""
    status = sock.connect_ex((packet.destination, packet.port))
    if packet.protocol == "tcp":
        return 0 if status in (0, errno.EINPROGRESS) else status
    if status:
        return status
    try:
        sock.send(b"")
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _entry(packet: TracedPacket, protocol: int, source_port: int, sock: socket.socket) -> conntrack.Flow | None:
    """The packet's conntrack entry, as soon as there is one; None where there is none after a while, or it was refused."""
    deadline = time.monotonic() + _SECONDS
    refused = False
    while True:
        try:
            for flow in conntrack.dump(packet.family, protocol, packet.destination, packet.port):
                if (flow.source, flow.source_port) == (packet.source, source_port):
                    return flow
        except KernelError as error:
            raise KernelViewError(str(error)) from error
        if refused or time.monotonic() > deadline:
            return None
        refused = _peer_error(sock)
        time.sleep(0.01)


def _peer_error(sock: socket.socket) -> bool:
    """Whether an error is waiting on the socket, which stays there."""
    poll = select.poll()
    poll.register(sock, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
