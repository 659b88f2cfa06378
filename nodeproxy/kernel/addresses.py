"""Owns which addresses the node has, and being told when they change, over rtnetlink.

Everything is about the network namespace of the thread that calls or makes the object. Addresses are text. Interfaces that
hold addresses for other reasons than being the node's (kube-ipvs0: one for each service) can be left out by name.

Sources: include/uapi/linux/rtnetlink.h, if_addr.h, if_link.h; net/core/rtnetlink.c, net/ipv4/devinet.c, net/ipv6/addrconf.c.
"""

import asyncio
import errno
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from typing import Final, Self, TypeVar

from nodeproxy.kernel.address_text import address_text
from nodeproxy.kernel.errors import RequestRefused
from nodeproxy.kernel.netlink import NETLINK_ROUTE, NLM_F_DUMP, NetlinkSocket, attributes

_T = TypeVar("_T")

_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK = 16, 17, 18
_RTM_NEWADDR, _RTM_DELADDR, _RTM_GETADDR = 20, 21, 22
_RTMGRP_LINK: Final = 0x1
_RTMGRP_IPV4_IFADDR: Final = 0x10
_RTMGRP_IPV6_IFADDR: Final = 0x100
_IFINFOMSG: Final = struct.Struct("=BxHiII")  # family, device type, index, flags, changed flags
_IFADDRMSG: Final = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, interface index
_NLMSGHDR: Final = struct.Struct("=IHHII")
_IFLA_IFNAME: Final = 3
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_IFA_F_TENTATIVE: Final = 0x40
_SCOPE_LINK: Final = 253
_FAMILIES: Final = {4: socket.AF_INET, 6: socket.AF_INET6}
_SO_RCVBUFFORCE: Final = 33
_BUFFER_BYTES: Final = 4 << 20  # some 10,000 notifications unread
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
class AddressNews:
    """What is new since the last time. `node_changed`: the node's addresses are others, or have other properties.

    `removed`: addresses that were on an excluded interface, and now are on none of them, whoever removed them.
    """

    node_changed: bool = False
    removed: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return self.node_changed or bool(self.removed)


def list_addresses(family: int | None = None) -> list[LocalAddress]:
    """All addresses of all interfaces, loopback and tentative ones included, of one IP family (4, 6) or both.

    Raises RequestRefused, AnswerLost.
    """
    with NetlinkSocket(NETLINK_ROUTE) as netlink:
        return _again_if_interrupted(lambda: _list_addresses(netlink, family))


def local_addresses(family: int | None = None, *, excluding: Collection[str] = ()) -> list[str]:
    """The addresses of `list_addresses` as text, each once, in the kernel's order; without those that are only on the
    interfaces named in `excluding`."""
    left_out = {index for index in map(_index_of, excluding) if index is not None}
    kept = (one for one in list_addresses(family) if one.interface_index not in left_out)
    return list(dict.fromkeys(address.address for address in kept))


class NodeAddresses:
    """The node's addresses, but those on the interfaces named in `excluding`, kept current by the kernel's notifications.

    An interface that is renamed to or from one of these names is judged by its new name. Making it lists all addresses;
    they are listed again only where notifications were lost. When that fails (RequestRefused, AnswerLost), the next `poll`
    tries again. For one thread at a time.
    """

    def __init__(self, excluding: Collection[str] = ()) -> None:
        self._excluding = frozenset(excluding)
        self._names: dict[int, str] = {}  # an index is not given to another interface before we are told that it is gone
        self._node: dict[tuple[int, str, int], LocalAddress] = {}  # by interface, address, prefix length
        self._excluded: dict[int, set[str]] = {}  # by interface; has every excluded one
        self._node_touched = False
        self._stale = False
        self._lister = NetlinkSocket(NETLINK_ROUTE)
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_ROUTE)
        try:
            self._subscribe()
            self._list()
        except BaseException:
            self.close()
            raise
        self._current = frozenset(self._node.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()
        self._lister.close()

    @property
    def current(self) -> frozenset[LocalAddress]:
        """The addresses on all interfaces but the excluded ones, as of the last `poll`."""
        return self._current

    @property
    def excluded(self) -> frozenset[str]:
        """The addresses on the excluded interfaces, as of the last `poll`."""
        return frozenset().union(*self._excluded.values())

    async def changes(self) -> AsyncIterator[AddressNews]:
        """News as they come, without end. What does not matter (addresses added to excluded interfaces) is kept back."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        ready.set()
        loop.add_reader(self._socket, ready.set)
        try:
            while True:
                await ready.wait()
                ready.clear()
                if news := self.poll():
                    yield news
        finally:
            loop.remove_reader(self._socket)

    def poll(self) -> AddressNews:
        """Take note of all that happened since the last time, without waiting for more."""
        gone: set[str] = set()
        self._read_pending(gone)
        if self._stale:
            gone.update(*self._excluded.values())
            self._list()
        node_changed = False
        if self._node_touched:
            self._node_touched = False
            node = frozenset(self._node.values())
            node_changed = node != self._current
            self._current = node
        removed = frozenset(text for text in gone if not any(text in held for held in self._excluded.values()))
        return AddressNews(node_changed, removed)

    def _subscribe(self) -> None:
        self._socket.setblocking(False)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        self._socket.bind((0, _RTMGRP_LINK | _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR))

    def _list(self) -> None:
        """Forget all, and ask for everything. What changes meanwhile is still told by notifications, in order."""
        self._stale = True
        names = _again_if_interrupted(lambda: _list_links(self._lister))
        addresses = _again_if_interrupted(lambda: _list_addresses(self._lister, None))
        self._names = names
        self._excluded = {index: set() for index, name in names.items() if name in self._excluding}
        self._node = {}
        for address in addresses:
            self._added(address)
        self._node_touched = True
        self._stale = False

    def _read_pending(self, gone: set[str]) -> None:
        """Apply all that is waiting. `gone` collects what went from an excluded interface."""
        while True:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._stale = True
                continue
            at = 0
            while len(data) - at >= _NLMSGHDR.size:
                length, kind, *_ = _NLMSGHDR.unpack_from(data, at)
                if length < _NLMSGHDR.size:
                    break
                if kind in (_RTM_NEWADDR, _RTM_DELADDR):
                    address = _decode(data, at + _NLMSGHDR.size, at + length)
                    if address is not None and kind == _RTM_NEWADDR:
                        self._added(address)
                    elif address is not None:
                        self._removed(address, gone)
                elif kind in (_RTM_NEWLINK, _RTM_DELLINK):
                    self._link_changed(kind, data, at + _NLMSGHDR.size, at + length, gone)
                at += (length + 3) & ~3

    def _added(self, address: LocalAddress) -> None:
        held = self._excluded.get(address.interface_index)
        if held is not None:
            held.add(address.address)
            return
        self._node[address.interface_index, address.address, address.prefix_length] = address
        self._node_touched = True

    def _removed(self, address: LocalAddress, gone: set[str]) -> None:
        held = self._excluded.get(address.interface_index)
        if held is not None:
            if address.address in held:
                held.remove(address.address)
                gone.add(address.address)
            return
        self._node.pop((address.interface_index, address.address, address.prefix_length), None)
        self._node_touched = True

    def _link_changed(self, kind: int, data: bytes, start: int, end: int, gone: set[str]) -> None:
        """An interface came, went or has another name. Bridges tell of their ports in the same way, as AF_BRIDGE."""
        family, _, index, _, _ = _IFINFOMSG.unpack_from(data, start)
        if family != socket.AF_UNSPEC:
            return
        if kind == _RTM_DELLINK:
            self._names.pop(index, None)
            gone.update(self._excluded.pop(index, ()))
            self._drop_node_addresses(index)
            return
        name = _interface_name(data, start, end)
        if self._names.get(index) == name:
            return
        self._names[index] = name
        if name in self._excluding and index not in self._excluded:
            self._excluded[index] = {address.address for address in self._drop_node_addresses(index)}
        elif name not in self._excluding and index in self._excluded:
            self._stale = True  # of its addresses only the text is known

    def _drop_node_addresses(self, index: int) -> list[LocalAddress]:
        dropped = [key for key in self._node if key[0] == index]
        self._node_touched = self._node_touched or bool(dropped)
        return [self._node.pop(key) for key in dropped]


def _again_if_interrupted(ask: Callable[[], _T]) -> _T:
    """The kernel says when what it lists changed meanwhile: the listing may lack something then, and is asked for again."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return ask()
        except RequestRefused as error:
            if error.errno != errno.EINTR:
                raise
    return ask()


def _list_addresses(netlink: NetlinkSocket, family: int | None) -> list[LocalAddress]:
    body = _IFADDRMSG.pack(socket.AF_UNSPEC if family is None else _FAMILIES[family], 0, 0, 0, 0)
    messages = netlink.dump_in_place(_RTM_GETADDR, body, NLM_F_DUMP, "list addresses")
    return [address for address in (_decode(*message) for message in messages) if address is not None]


def _list_links(netlink: NetlinkSocket) -> dict[int, str]:
    """Interface names by index."""
    body = _IFINFOMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    return {
        _IFINFOMSG.unpack_from(data, start)[2]: _interface_name(data, start, end)
        for data, start, end in netlink.dump_in_place(_RTM_GETLINK, body, NLM_F_DUMP, "list interfaces")
    }


def _interface_name(data: bytes, start: int, end: int) -> str:
    for kind, first, last in attributes(data, start + _IFINFOMSG.size, end):
        if kind == _IFLA_IFNAME:
            return data[first:last].rstrip(b"\0").decode(errors="replace")
    return ""


def _index_of(name: str) -> int | None:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def _decode(data: bytes, start: int, end: int) -> LocalAddress | None:
    """ifaddrmsg and its attributes; None for families other than IP. On point-to-point links IFA_ADDRESS is the peer's."""
    family, prefix_length, flags, scope, index = _IFADDRMSG.unpack_from(data, start)
    if family not in (socket.AF_INET, socket.AF_INET6):
        return None
    raw = None
    for kind, first, last in attributes(data, start + _IFADDRMSG.size, end):
        if kind == _IFA_LOCAL or (kind == _IFA_ADDRESS and raw is None):
            raw = data[first:last]
        elif kind == _IFA_FLAGS:  # 32 bits, of which the header has the low eight
            flags = int.from_bytes(data[first:last], sys.byteorder)
    if raw is None:
        return None
    tentative = bool(flags & _IFA_F_TENTATIVE)
    return LocalAddress(address_text(raw), prefix_length, index, scope == _SCOPE_LINK, tentative)
