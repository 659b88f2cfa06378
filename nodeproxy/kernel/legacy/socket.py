"""Owns the socket options by which legacy tables are read and replaced. Thin: what is in them is for others.

Sources: include/uapi/linux/netfilter_ipv4/ip_tables.h, netfilter_ipv6/ip6_tables.h, netfilter/x_tables.h.
"""

import ctypes
import errno
import mmap
import os
import socket
import struct
from dataclasses import dataclass
from typing import Final, Self

from nodeproxy.kernel.errors import FeatureMissing, PermissionMissing, RequestRefused
from nodeproxy.kernel.legacy.layout import LAYOUTS

# The same numbers for both families.
_SO_SET_REPLACE: Final = 64
_SO_SET_ADD_COUNTERS: Final = 65
_SO_GET_INFO: Final = 64
_SO_GET_ENTRIES: Final = 65

# ipt_getinfo: name[32], valid_hooks, hook_entry[5], underflow[5], num_entries, size
_GETINFO: Final = struct.Struct("=32s11I2I")
_GET_ENTRIES: Final = struct.Struct("=32sI4x")  # name, size
# ipt_replace: name, valid_hooks, num_entries, size, hook_entry[5], underflow[5], num_counters, counters
_REPLACE: Final = struct.Struct("=32s3I10IIQ")
_COUNTERS_INFO: Final = struct.Struct("=32sI4x")  # name, num_counters
COUNTER_SIZE: Final = 16
COUNTERS_HEAD: Final = _COUNTERS_INFO.size
ENTRIES_HEAD: Final = _REPLACE.size
"""Bytes to leave free before the entries of a table that is to be replaced."""
_FROM_HEAD: Final = ENTRIES_HEAD - _GET_ENTRIES.size
_PROT_NONE: Final = 0


@dataclass(frozen=True, slots=True)
class TableInfo:
    """A table as a whole: `layout` is where its built-in chains begin (five) and where their policies are (five)."""

    hooks: int
    layout: tuple[int, ...]
    entries: int
    size: int


class LegacySocket:
    """The legacy tables of one family (4 or 6), in the network namespace of the thread that makes this."""

    def __init__(self, family: int) -> None:
        """Raises PermissionMissing, FeatureMissing."""
        layout = LAYOUTS[family]
        self._level = layout.level
        try:
            self._socket = socket.socket(layout.domain, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW)
        except PermissionError as error:
            raise PermissionMissing("open a raw socket", "CAP_NET_RAW is needed") from error
        except OSError as error:
            raise FeatureMissing(f"IPv{family}", str(error)) from error
        self._libc = ctypes.CDLL(None, use_errno=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def info(self, table: str) -> TableInfo | None:
        """The table's size and layout; None if there is none. Asking for one that can be had creates it.

        Raises PermissionMissing, RequestRefused.
        """
        buffer = bytearray(_GETINFO.pack(table.encode(), *(0,) * 13))
        number = self._get(_SO_GET_INFO, buffer, 0, len(buffer))
        if number == errno.ENOENT:
            return None
        self._check(number, f"IPT_SO_GET_INFO {table}")
        _, hooks, *layout, entries, size = _GETINFO.unpack(buffer)
        return TableInfo(hooks, tuple(layout), entries, size)

    def entries(self, table: str, info: TableInfo) -> bytearray:
        """All entries with their counters, after `ENTRIES_HEAD` bytes for the head of a replacement.

        Raises PermissionMissing, RequestRefused: EAGAIN where the table is no longer of the size that `info` tells.
        """
        buffer = bytearray(ENTRIES_HEAD + info.size)
        _GET_ENTRIES.pack_into(buffer, _FROM_HEAD, table.encode(), info.size)
        number = self._get(_SO_GET_ENTRIES, buffer, _FROM_HEAD, len(buffer) - _FROM_HEAD)
        self._check(number, f"IPT_SO_GET_ENTRIES {table}")
        return buffer

    def first_entries(self, table: str, info: TableInfo, length: int) -> bytes:
        """The first `length` bytes of the entries, in proportion to them.

        The kernel copies entries one after the other, and ends with EFAULT where the memory does. One that copies otherwise
        leaves something else than the entries here, so this is only for comparing with what is known. Raises as `entries`.
        """
        page = mmap.PAGESIZE
        readable = -(-(_GET_ENTRIES.size + length) // page) * page
        with mmap.mmap(-1, readable + page) as memory:
            start = ctypes.c_char.from_buffer(memory)
            try:
                address = ctypes.addressof(start)
                if self._libc.mprotect(ctypes.c_void_p(address + readable), ctypes.c_size_t(page), _PROT_NONE) != 0:
                    raise RequestRefused("mprotect", ctypes.get_errno())
                _GET_ENTRIES.pack_into(memory, 0, table.encode(), info.size)
                size = ctypes.c_uint32(_GET_ENTRIES.size + info.size)
                number = self._getsockopt(_SO_GET_ENTRIES, address, size)
            finally:
                del start
            if number not in (0, errno.EFAULT):
                self._check(number, f"IPT_SO_GET_ENTRIES {table}")
            return memory[_GET_ENTRIES.size : _GET_ENTRIES.size + length]

    def replace(self, table: str, old: TableInfo, new: TableInfo, entries: bytearray) -> bytearray:
        """Put entries (after `ENTRIES_HEAD` bytes, which are overwritten) in the place of a table that looks like `old`.

        Returns the old counters, by entry, after `COUNTERS_HEAD` bytes. Raises PermissionMissing, RequestRefused: EAGAIN
        where the table has another number of entries than `old`, and is left as it is.
        """
        counters = bytearray(COUNTERS_HEAD + old.entries * COUNTER_SIZE)
        into = (ctypes.c_char * len(counters)).from_buffer(counters)
        address = ctypes.addressof(into) + COUNTERS_HEAD
        numbers = (new.hooks, new.entries, new.size, *new.layout, old.entries)
        _REPLACE.pack_into(entries, 0, table.encode(), *numbers, address)
        self._check(self._set(_SO_SET_REPLACE, entries), f"IPT_SO_SET_REPLACE {table}")
        del into
        return counters

    def add_counters(self, table: str, counters: bytearray) -> None:
        """Add counters to those of all entries, in order. `COUNTERS_HEAD` bytes before them are overwritten.

        Raises PermissionMissing, RequestRefused.
        """
        number = (len(counters) - COUNTERS_HEAD) // COUNTER_SIZE
        _COUNTERS_INFO.pack_into(counters, 0, table.encode(), number)
        self._check(self._set(_SO_SET_ADD_COUNTERS, counters), f"IPT_SO_SET_ADD_COUNTERS {table}")

    def _get(self, option: int, buffer: bytearray, start: int, length: int) -> int:
        # socket.getsockopt cannot pass anything in, and these options are read and written.
        memory = (ctypes.c_char * length).from_buffer(buffer, start)
        return self._getsockopt(option, ctypes.addressof(memory), ctypes.c_uint32(length))

    def _getsockopt(self, option: int, address: int, length: ctypes.c_uint32) -> int:
        status = self._libc.getsockopt(
            self._socket.fileno(), self._level, option, ctypes.c_void_p(address), ctypes.byref(length)
        )
        return ctypes.get_errno() if status != 0 else 0

    def _set(self, option: int, buffer: bytearray) -> int:
        memory = (ctypes.c_char * len(buffer)).from_buffer(buffer)
        arguments = (ctypes.c_void_p(ctypes.addressof(memory)), ctypes.c_uint32(len(buffer)))
        status = self._libc.setsockopt(self._socket.fileno(), self._level, option, *arguments)
        return ctypes.get_errno() if status != 0 else 0

    @staticmethod
    def _check(number: int, request: str) -> None:
        if number in (errno.EPERM, errno.EACCES):
            raise PermissionMissing("use the legacy tables", os.strerror(number))
        if number:
            raise RequestRefused(request, number)
