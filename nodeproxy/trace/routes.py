"""Owns asking the kernel for routing decisions, by netlink (RTM_GETROUTE). It decides as it would for a packet.

Sources: include/uapi/linux/rtnetlink.h; net/ipv4/route.c, net/ipv6/route.c (inet_rtm_getroute, inet6_rtm_getroute).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from typing import Final, Self

from nodeproxy.kernel.address_text import address_text
from nodeproxy.kernel.errors import RequestRefused
from nodeproxy.kernel.netlink import NETLINK_ROUTE, NetlinkSocket, attribute, attributes
from nodeproxy.trace.kernel_view import Route, RouteKind

_RTM_GETROUTE: Final = 26
_RTMSG: Final = struct.Struct("=BBBBBBBBI")  # rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
_DST, _SRC, _IIF, _OIF, _PREFSRC, _MARK = 1, 2, 3, 4, 7, 16
_UNICAST, _LOCAL, _BROADCAST, _ANYCAST, _MULTICAST = 1, 2, 3, 4, 5
_REJECTING: Final = {6: "a blackhole route", 7: "an unreachable route", 8: "a prohibit route", 9: "a throw route"}
_FAULTS: Final = {
    errno.ENETUNREACH: "no route",
    errno.EHOSTUNREACH: "no route, or forwarding is off",
    errno.EINVAL: "a martian: loopback without route_localnet, or an address that cannot come from there",
    errno.EXDEV: "the reverse path filter (rp_filter) drops it",
    errno.EACCES: "prohibited",
}


class Routes:
    """Routing decisions of the network namespace of the thread that makes this object. Raises as NetlinkSocket."""

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(NETLINK_ROUTE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._netlink.close()

    def decide(self, destination: str, *, source: str | None = None, incoming: str = "", mark: int = 0) -> Route:
        """Where a packet goes that came in by `incoming`, or that the node itself sends."""
        family = socket.AF_INET6 if ":" in destination else socket.AF_INET
        bits = 128 if family == socket.AF_INET6 else 32
        body = _RTMSG.pack(family, bits, bits if source else 0, 0, 0, 0, 0, 0, 0)
        body += attribute(_DST, socket.inet_pton(family, destination))
        if source:
            body += attribute(_SRC, socket.inet_pton(family, source))
        if incoming:
            try:
                body += attribute(_IIF, struct.pack("=I", socket.if_nametoindex(incoming)))
            except OSError:
                return Route(RouteKind.NONE, fault=f"there is no interface {incoming}")
        if mark:
            body += attribute(_MARK, struct.pack("=I", mark))
        try:
            [answer] = self._netlink.dump(_RTM_GETROUTE, body, 0, "ask for a route")
        except RequestRefused as error:
            return Route(RouteKind.NONE, fault=_FAULTS.get(error.errno, os.strerror(error.errno)))
        return _decode(answer)


def _decode(answer: bytes) -> Route:
    kind = _RTMSG.unpack_from(answer, 0)[7]
    interface, source = "", None
    for attribute_kind, start, end in attributes(answer, _RTMSG.size, len(answer)):
        if attribute_kind == _OIF:
            interface = _name(int.from_bytes(answer[start:end], sys.byteorder))
        elif attribute_kind == _PREFSRC:
            source = address_text(answer[start:end])
    if kind in (_LOCAL, _ANYCAST):
        return Route(RouteKind.LOCAL, "lo", source)
    if kind == _UNICAST:
        return Route(RouteKind.UNICAST, interface, source)
    if kind in (_BROADCAST, _MULTICAST):
        return Route(RouteKind.OTHER, interface, source)
    return Route(RouteKind.NONE, fault=_REJECTING.get(kind, f"a route of kind {kind}"))


def _name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return ""
