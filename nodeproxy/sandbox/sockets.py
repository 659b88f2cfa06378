"""Owns the socket options that Python does not name, and addresses as text: `10.0.0.1:80`, `[fd00::1]:80`."""

from __future__ import annotations

import socket
import struct
from typing import Final, NamedTuple

IP_PKTINFO: Final = 8
IP_RECVERR: Final = 11
IP_TRANSPARENT: Final = 19
IP_BIND_ADDRESS_NO_PORT: Final = 24
IPV6_RECVERR: Final = 25
IPV6_TRANSPARENT: Final = 75
TCP_SYNCNT: Final = 7
RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: RST instead of FIN and TIME_WAIT

_EXTENDED_ERROR: Final = struct.Struct("IBBBBII")  # errno, origin, type, code, pad, info, data
_ORIGIN_ICMP: Final = (2, 3)  # SO_EE_ORIGIN_ICMP, SO_EE_ORIGIN_ICMP6


def family_of(address: str) -> socket.AddressFamily:
    """AF_INET or AF_INET6, by the text of an address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def host_port(address: str, port: int) -> str:
    """`10.0.0.1:80` or `[fd00::1]:80`."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def split_host_port(text: str) -> tuple[str, int]:
    """The reverse of `host_port`."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def receive_errors(sock: socket.socket) -> None:
    """Let ICMP errors be read from the socket's error queue."""
    sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1) if sock.family == socket.AF_INET else sock.setsockopt(
        socket.IPPROTO_IPV6, IPV6_RECVERR, 1
    )


def any_address(sock: socket.socket) -> None:
    """Let the socket be bound to, and send from, an address this machine need not have (needs root)."""
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)


class IcmpError(NamedTuple):
    """An ICMP error from a socket's error queue: its type and code, and the beginning of the packet it is about."""

    family: socket.AddressFamily
    type: int
    code: int
    payload: bytes

    @property
    def port_unreachable(self) -> bool:
        """What REJECT sends by default: ICMP 3/3, ICMPv6 1/4."""
        return (self.type, self.code) == ((3, 3) if self.family == socket.AF_INET else (1, 4))

    @property
    def protocol_unreachable(self) -> bool:
        """What a machine sends that does not speak the protocol: ICMP 3/2, ICMPv6 4/1 (unknown next header)."""
        return (self.type, self.code) == ((3, 2) if self.family == socket.AF_INET else (4, 1))


def next_icmp_error(sock: socket.socket) -> IcmpError | None:
    """Take the next ICMP error from the error queue of a non-blocking socket; None when there is none."""
    while True:
        try:
            payload, ancillary, _, _ = sock.recvmsg(2048, 512, socket.MSG_ERRQUEUE)
        except OSError:
            return None
        for level, kind, data in ancillary:
            if (level, kind) not in ((socket.IPPROTO_IP, IP_RECVERR), (socket.IPPROTO_IPV6, IPV6_RECVERR)):
                continue
            _, origin, icmp_type, code, _, _, _ = _EXTENDED_ERROR.unpack_from(data)
            if origin in _ORIGIN_ICMP:
                return IcmpError(sock.family, icmp_type, code, payload)
