"""Owns the dummy interface that holds service addresses, and its addresses, thousands at a time, over rtnetlink.

Addresses of an interface are local to the node in every state of the interface: it stays DOWN, and nothing is sent on it.

Sources: include/uapi/linux/rtnetlink.h, if_link.h, if_addr.h; net/core/rtnetlink.c, net/ipv4/devinet.c, net/ipv6/addrconf.c.
"""

import errno
import socket
import struct
from collections.abc import Iterable
from typing import Final, Self

from nodeproxy.kernel.address_text import address_text
from nodeproxy.kernel.errors import FeatureMissing, ItemRefused, KernelError, RequestRefused
from nodeproxy.kernel.netlink import (
    NETLINK_ROUTE,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    Message,
    NetlinkSocket,
    attribute,
    attributes,
)

_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK = 16, 17, 18
_RTM_NEWADDR, _RTM_DELADDR, _RTM_GETADDR = 20, 21, 22
_IFINFOMSG: Final = struct.Struct("=BxHiII")  # family, device type, index, flags, changed flags
_IFADDRMSG: Final = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, interface index
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_INFO_KIND = 3, 18, 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFA_F_NODAD: Final = 0x02
_SOL_NETLINK: Final = 270
_NETLINK_GET_STRICT_CHK: Final = 12
_MAX_NAME: Final = 15  # bytes, IFNAMSIZ - 1
_ATTEMPTS: Final = 5


class NotADummy(KernelError):
    """There is an interface of the name that we want, but of another kind ("" for a physical one)."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__(f"interface {name} is there, but of kind {kind or 'device'}, not dummy: rename or delete it")
        self.name = name
        self.kind = kind


class Links:
    """Interfaces of the network namespace of the thread that makes this object. Blocking; threads take turns.

    Any call raises PermissionMissing without CAP_NET_ADMIN (but for questions), and AnswerLost if the kernel did not answer.
    """

    def __init__(self) -> None:
        self._netlink = _StrictSocket()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._netlink.close()

    def ensure_dummy(self, name: str) -> int:
        """The index of the dummy interface of that name, which is made if there is none: DOWN and NOARP, as it comes.

        One that is there is left as it is. Raises FeatureMissing where the kernel has no dummy interfaces, NotADummy,
        RequestRefused, ValueError for a name that cannot be one.
        """
        found = self._link(name)
        if found is None:
            info = attribute(_IFLA_LINKINFO, attribute(_IFLA_INFO_KIND, b"dummy\0"))
            body = _IFINFOMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + _name(name) + info
            refused = self._netlink.batch([(_RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body)], f"add dummy interface {name}")
            for number, text in refused.values():
                if number == errno.EOPNOTSUPP:
                    raise FeatureMissing("dummy interfaces", "the module dummy is not there or cannot be loaded")
                if number != errno.EEXIST:  # EEXIST: somebody else was faster
                    raise RequestRefused(f"add dummy interface {name}", number, text)
            found = self._link(name)
            if found is None:
                raise RequestRefused(f"add dummy interface {name}", errno.ENODEV, "it is gone again")
        index, kind = found
        if kind != "dummy":
            raise NotADummy(name, kind)
        return index

    def delete_link(self, name: str) -> bool:
        """Delete an interface and its addresses; false if there was none. Raises RequestRefused for one that cannot be
        deleted (EOPNOTSUPP, 95, for a physical one)."""
        body = _IFINFOMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + _name(name)
        for number, text in self._netlink.batch([(_RTM_DELLINK, 0, body)], f"delete interface {name}").values():
            if number == errno.ENODEV:
                return False
            raise RequestRefused(f"delete interface {name}", number, text)
        return True

    def link_index(self, name: str) -> int | None:
        """The index of an interface, None if there is none."""
        found = self._link(name)
        return None if found is None else found[0]

    def add_addresses(self, index: int, addresses: Iterable[str], *, tell_existing: bool = False) -> list[ItemRefused]:
        """Add addresses to an interface (/32, /128); returns those refused, `item` being the address.

        One that the interface has is no error, unless `tell_existing` (EEXIST, 17). ENODEV (19): no such interface. IPv4
        addresses are local to the node at once, IPv6 ones (of which duplicates are not looked for) some milliseconds later.
        Each costs the kernel more, the more there are: of IPv4 about 16 us for every thousand.
        """
        return self._change(_RTM_NEWADDR, index, addresses, 0 if tell_existing else errno.EEXIST)

    def remove_addresses(self, index: int, addresses: Iterable[str], *, tell_absent: bool = False) -> list[ItemRefused]:
        """Remove addresses (/32, /128) from an interface; returns those refused, `item` being the address.

        One that the interface does not have is no error, unless `tell_absent` (EADDRNOTAVAIL, 99). ENODEV (19): no such
        interface. The kernel walks all IPv6 routes for each IPv6 address (1 ms where there are 5,000): `delete_link` is the
        fast way to remove all.
        """
        return self._change(_RTM_DELADDR, index, addresses, 0 if tell_absent else errno.EADDRNOTAVAIL)

    def addresses_of(self, index: int) -> set[str]:
        """The addresses of an interface, of both families; none if there is no such interface. Raises RequestRefused.

        From Linux 4.20 on the kernel lists those of this interface only, before that we pick them out.
        """
        for attempt in range(_ATTEMPTS):
            try:
                return {*self._list(index, socket.AF_INET), *self._list(index, socket.AF_INET6)}
            except RequestRefused as error:
                if error.errno == errno.ENODEV:
                    return set()
                if error.errno != errno.EINTR or attempt == _ATTEMPTS - 1:  # EINTR: addresses changed meanwhile
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _list(self, index: int, family: int) -> Iterable[str]:
        body = _IFADDRMSG.pack(family, 0, 0, 0, index)
        for data, start, end in self._netlink.dump_in_place(_RTM_GETADDR, body, NLM_F_DUMP, "list addresses"):
            found, _, _, _, owner = _IFADDRMSG.unpack_from(data, start)
            if found != family or owner != index:
                continue
            values = {kind: data[first:last] for kind, first, last in attributes(data, start + _IFADDRMSG.size, end)}
            packed = values.get(_IFA_LOCAL) or values.get(_IFA_ADDRESS)
            if packed:
                yield address_text(packed)

    def _change(self, kind: int, index: int, addresses: Iterable[str], ignore: int) -> list[ItemRefused]:
        adding = kind == _RTM_NEWADDR
        change, operation = (
            (f"add addresses to interface {index}", f"add to interface {index} address")
            if adding
            else (f"remove addresses from interface {index}", f"remove from interface {index} address")
        )
        flags = NLM_F_CREATE | NLM_F_EXCL if adding else 0
        head4 = _IFADDRMSG.pack(socket.AF_INET, 32, 0, 0, index)
        head6 = _IFADDRMSG.pack(socket.AF_INET6, 128, _IFA_F_NODAD if adding else 0, 0, index)
        batch: list[Message] = []
        items: list[str] = []
        refused: list[ItemRefused] = []
        for text in addresses:
            try:
                if ":" in text:
                    packed = socket.inet_pton(socket.AF_INET6, text)
                    body = head6 + attribute(_IFA_LOCAL, packed)
                else:
                    packed = socket.inet_pton(socket.AF_INET, text)
                    body = head4 + attribute(_IFA_LOCAL, packed) + attribute(_IFA_ADDRESS, packed)
            except (OSError, ValueError):
                refused.append(ItemRefused(operation, text, errno.EINVAL, "not an address"))
                continue
            batch.append((kind, flags, body))
            items.append(text)
        found = self._netlink.batch(batch, change)
        return refused + [
            ItemRefused(operation, items[place], number, text)
            for place, (number, text) in sorted(found.items())
            if number != ignore
        ]

    def _link(self, name: str) -> tuple[int, str] | None:
        """(index, kind or "" where it has none) of an interface, None if there is none."""
        body = _IFINFOMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + _name(name)
        try:
            [answer] = self._netlink.dump(_RTM_GETLINK, body, 0, f"look for interface {name}")
        except RequestRefused as error:
            if error.errno == errno.ENODEV:
                return None
            raise
        index: int = _IFINFOMSG.unpack_from(answer)[2]
        for outer, start, end in attributes(answer, _IFINFOMSG.size, len(answer)):
            if outer == _IFLA_LINKINFO:
                for inner, first, last in attributes(answer, start, end):
                    if inner == _IFLA_INFO_KIND:
                        return index, answer[first:last].rstrip(b"\0").decode(errors="replace")
        return index, ""


class _StrictSocket(NetlinkSocket):
    """An rtnetlink socket whose dumps the kernel filters by what the request says, where it knows how (Linux 4.20)."""

    def __init__(self) -> None:
        super().__init__(NETLINK_ROUTE)
        try:
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                raise


def _name(name: str) -> bytes:
    raw = name.encode()
    if not 0 < len(raw) <= _MAX_NAME or b"\0" in raw:
        raise ValueError(f"not the name of an interface: {name!r} (1 to {_MAX_NAME} bytes, no NUL)")
    return attribute(_IFLA_IFNAME, raw + b"\0")
