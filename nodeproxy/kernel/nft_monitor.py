"""Owns being told by the kernel of every transaction on the nft ruleset, at once and without polling.

The kernel sends one message per changed object, and at the end of each transaction one with the new generation and the
process that made it. A filter on the socket lets only the last one through, so that our own transactions of a hundred
thousand rules do not overrun the buffer.

Sources: include/uapi/linux/netfilter/nfnetlink.h, nf_tables.h (NFTA_GEN_*), linux/filter.h.
"""

import asyncio
import ctypes
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final, Self

from nodeproxy.kernel.errors import FeatureMissing
from nodeproxy.kernel.netlink import NETLINK_NETFILTER, attributes
from nodeproxy.kernel.xtables_stamp import NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWGEN

_SOL_NETLINK: Final = 270
_NETLINK_ADD_MEMBERSHIP: Final = 1
_NFNLGRP_NFTABLES: Final = 7
_SO_ATTACH_FILTER: Final = 26
_BUFFER_BYTES: Final = 1 << 20

_NFTA_GEN_ID: Final = 1
_NFTA_GEN_PROC_PID: Final = 2
_NFTA_GEN_PROC_NAME: Final = 3

_NEWGEN: Final = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWGEN
_INSTRUCTION: Final = struct.Struct("=HBBI")  # sock_filter: code, jump if true, jump if false, operand
_LOAD_HALF, _JUMP_IF_EQUAL, _RETURN = 0x28, 0x15, 0x06


@dataclass(frozen=True, slots=True)
class NftTransaction:
    """One committed transaction. `pid` is in the node's own PID namespace; `process` is cut to 15 characters.

    With `lost` true an unknown number of transactions went by unseen, and the other fields are empty.
    """

    generation: int = 0
    pid: int = 0
    process: str = ""
    lost: bool = False


class NftChangeMonitor:
    """Transactions on the nft ruleset of the network namespace of the thread that makes it, by anybody, all families."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        self._attach_filter()
        self._socket.bind((0, 0))
        try:
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)
        except OSError as error:
            self._socket.close()
            raise FeatureMissing("notification of nft changes", os.strerror(error.errno or 0)) from error

    def _attach_filter(self) -> None:
        """Pass a datagram if its first message is NFT_MSG_NEWGEN: the kernel sends that one by itself."""
        # The filter loads in network byte order, the header's type is in the host's.
        wanted = int.from_bytes(struct.pack("=H", _NEWGEN), "big")
        program = b"".join(
            _INSTRUCTION.pack(*instruction)
            for instruction in (
                (_LOAD_HALF, 0, 0, 4),
                (_JUMP_IF_EQUAL, 0, 1, wanted),
                (_RETURN, 0, 0, 0xFFFFFFFF),
                (_RETURN, 0, 0, 0),
            )
        )
        buffer = ctypes.create_string_buffer(program, len(program))
        header = struct.pack("@HP", len(program) // _INSTRUCTION.size, ctypes.addressof(buffer))  # sock_fprog
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, header)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The socket, readable once a transaction is waiting."""
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def pending(self) -> list[NftTransaction]:
        """The transactions since the last call, in order, without waiting."""
        found: list[NftTransaction] = []
        while True:
            try:
                data = self._socket.recv(4096)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                found.append(NftTransaction(lost=True))
                continue
            found.append(_decode(data))

    async def transactions(self) -> AsyncIterator[NftTransaction]:
        """Every transaction from the making of this object on, waiting for the next one without end."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(self._socket, ready.set)
        try:
            while True:
                await ready.wait()
                ready.clear()
                for transaction in self.pending():
                    yield transaction
        finally:
            loop.remove_reader(self._socket)


def _decode(data: bytes) -> NftTransaction:
    """nlmsghdr (16 bytes), nfgenmsg (4), attributes; numbers are in network order."""
    generation = pid = 0
    process = ""
    for kind, start, end in attributes(data, 20, len(data)):
        value = data[start:end]
        if kind == _NFTA_GEN_ID:
            generation = int.from_bytes(value, "big")
        elif kind == _NFTA_GEN_PROC_PID:
            pid = int.from_bytes(value, "big")
        elif kind == _NFTA_GEN_PROC_NAME:
            process = value.rstrip(b"\0").decode(errors="replace")
    return NftTransaction(generation, pid, process)
