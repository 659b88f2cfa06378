"""Owns which addresses the node has, and being told when they change, over rtnetlink.

Everything is about the network namespace of the thread that calls or makes the monitor. Addresses are text.

Sources: include/uapi/linux/rtnetlink.h, if_addr.h.
"""

import asyncio
import errno
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final, Self

from nodeproxy.kernel.errors import RequestRefused
from nodeproxy.kernel.netlink import NETLINK_ROUTE, NLM_F_DUMP, NetlinkSocket, attributes

_RTM_NEWADDR, _RTM_DELADDR, _RTM_GETADDR = 20, 21, 22
_RTMGRP_IPV4_IFADDR: Final = 0x10
_RTMGRP_IPV6_IFADDR: Final = 0x100
_IFADDRMSG: Final = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, interface index
_NLMSGHDR: Final = struct.Struct("=IHHII")
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_IFA_F_TENTATIVE: Final = 0x40
_SCOPE_LINK: Final = 253
_FAMILIES: Final = {4: socket.AF_INET, 6: socket.AF_INET6}
_READ_BYTES: Final = 1 << 16
_ATTEMPTS: Final = 5


@dataclass(frozen=True, slots=True)
class LocalAddress:
    """An address of an interface. `tentative`: IPv6 duplicate detection is not done. `link_local` by scope (fe80::/10)."""

    address: str
    prefix_length: int
    interface_index: int
    link_local: bool = False
    tentative: bool = False

    @property
    def family(self) -> int:
        """4 or 6."""
        return 6 if ":" in self.address else 4

    def interface(self) -> str | None:
        """The interface's name now, None if it is gone."""
        try:
            return socket.if_indextoname(self.interface_index)
        except OSError:
            return None


@dataclass(frozen=True, slots=True)
class AddressChange:
    """An address that came (`added`) or went, or whose flags changed (`added` again)."""

    added: bool
    address: LocalAddress


def list_addresses(family: int | None = None) -> list[LocalAddress]:
    """All addresses of all interfaces, loopback and tentative ones included, of one IP family (4, 6) or both.

    Raises RequestRefused, AnswerLost.
    """
    number = socket.AF_UNSPEC if family is None else _FAMILIES[family]
    body = _IFADDRMSG.pack(number, 0, 0, 0, 0)
    with NetlinkSocket(NETLINK_ROUTE) as netlink:
        for attempt in range(_ATTEMPTS):
            try:
                found = [_decode(message) for message in netlink.dump(_RTM_GETADDR, body, NLM_F_DUMP, "list addresses")]
            except RequestRefused as error:
                if error.errno != errno.EINTR or attempt == _ATTEMPTS - 1:  # EINTR: addresses changed meanwhile
                    raise
                continue
            return [address for address in found if address is not None]
    raise AssertionError("the last attempt returns or raises")


def local_addresses(family: int | None = None) -> list[str]:
    """The addresses of `list_addresses` as text, each once, in the kernel's order."""
    return list(dict.fromkeys(address.address for address in list_addresses(family)))


class AddressMonitor:
    """Changes of addresses from the making of this object on."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_ROUTE)
        self._socket.setblocking(False)
        self._socket.bind((0, _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    async def changes(self) -> AsyncIterator[tuple[AddressChange, ...]]:
        """What changed, a burst at a time, without end. An empty tuple: changes were lost, list the addresses anew."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(self._socket, ready.set)
        try:
            while True:
                await ready.wait()
                ready.clear()
                found = self._pending()
                if found is None or found:
                    yield tuple(found or ())
        finally:
            loop.remove_reader(self._socket)

    def _pending(self) -> list[AddressChange] | None:
        """All that is waiting; None if the kernel dropped some."""
        found: list[AddressChange] = []
        lost = False
        while True:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                return None if lost else found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True
                continue
            at = 0
            while len(data) - at >= _NLMSGHDR.size:
                length, kind, *_ = _NLMSGHDR.unpack_from(data, at)
                if length < _NLMSGHDR.size:
                    break
                if kind in (_RTM_NEWADDR, _RTM_DELADDR):
                    address = _decode(data[at + _NLMSGHDR.size : at + length])
                    if address is not None:
                        found.append(AddressChange(kind == _RTM_NEWADDR, address))
                at += (length + 3) & ~3


def _decode(message: bytes) -> LocalAddress | None:
    """ifaddrmsg and its attributes; None for families other than IP. On point-to-point links IFA_ADDRESS is the peer's."""
    family, prefix_length, flags, scope, index = _IFADDRMSG.unpack_from(message)
    if family not in (socket.AF_INET, socket.AF_INET6):
        return None
    values = {kind: message[start:end] for kind, start, end in attributes(message, _IFADDRMSG.size, len(message))}
    raw = values.get(_IFA_LOCAL, values.get(_IFA_ADDRESS))
    if raw is None:
        return None
    if _IFA_FLAGS in values:  # 32 bits, of which the header has the low eight
        flags = struct.unpack("=I", values[_IFA_FLAGS])[0]
    return LocalAddress(
        socket.inet_ntop(family, raw), prefix_length, index, scope == _SCOPE_LINK, bool(flags & _IFA_F_TENTATIVE)
    )
