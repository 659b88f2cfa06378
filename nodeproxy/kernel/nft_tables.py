"""Owns tables of nf_tables as wholes: listing those of a family, and deleting one with everything in it.

What is in a table is not looked at. One call is one or two netlink messages, no process is started.

Sources: include/uapi/linux/netfilter/nfnetlink.h, nf_tables.h (NFT_MSG_*TABLE, NFTA_TABLE_*), net/netfilter/nfnetlink.c.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Final, Self

from nodeproxy.kernel.errors import AnswerLost, FeatureMissing, ItemRefused, PermissionMissing, RequestRefused
from nodeproxy.kernel.netlink import NETLINK_NETFILTER, NLM_F_ACK, NLM_F_REQUEST, NetlinkSocket, attribute, attributes
from nodeproxy.kernel.xtables_stamp import NFNL_SUBSYS_NFTABLES

_NFT_MSG_GETTABLE: Final = 1
_NFT_MSG_DELTABLE: Final = 2
_NFNL_MSG_BATCH_BEGIN: Final = 16
_NFNL_MSG_BATCH_END: Final = 17
_NFTA_TABLE_NAME: Final = 1
_NLMSG_ERROR: Final = 2
_NFPROTO: Final = {4: 2, 6: 10}  # NFPROTO_IPV4, NFPROTO_IPV6

_HEADER: Final = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port id
_GENMSG: Final = struct.Struct(">BBH")  # nfgenmsg: family, version 0, resource id
_ERROR: Final = struct.Struct("=i")
_TIMEOUT_SECONDS: Final = 10.0


class NftTables:
    """The nf_tables tables of the network namespace of the thread that makes this object. `family` is 4 or 6.

    Blocking. Methods raise FeatureMissing where the kernel has no nf_tables, PermissionMissing without CAP_NET_ADMIN,
    AnswerLost where the kernel does not answer.
    """

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(NETLINK_NETFILTER)
        # A batch is acknowledged otherwise than other messages (not at its end before Linux 6.10): it has its own socket.
        self._batches = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        self._batches.settimeout(_TIMEOUT_SECONDS)
        self._batches.bind((0, 0))
        self._sequence = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._netlink.close()
        self._batches.close()

    def list_names(self, family: int) -> list[str]:
        """Names of the tables of a family (those of `inet` are of neither), sorted. Raises RequestRefused."""
        kind = NFNL_SUBSYS_NFTABLES << 8 | _NFT_MSG_GETTABLE
        names = []
        try:
            for message in self._netlink.dump(kind, _GENMSG.pack(_NFPROTO[family], 0, 0), request="list nft tables"):
                for attribute_kind, start, end in attributes(message, _GENMSG.size, len(message)):
                    if attribute_kind == _NFTA_TABLE_NAME:
                        names.append(message[start:end].rstrip(b"\0").decode(errors="replace"))
        except RequestRefused as error:
            _raise_if_missing(error.errno)
            raise
        return sorted(names)

    def delete(self, family: int, name: str) -> bool:
        """Delete a table with its chains, rules, sets and maps, in one transaction; False where there is none.

        Raises ItemRefused, for instance EPERM (1) where a running process owns the table.
        """
        table = attribute(_NFTA_TABLE_NAME, name.encode() + b"\0")
        subsystem = _GENMSG.pack(0, 0, NFNL_SUBSYS_NFTABLES)
        kind = NFNL_SUBSYS_NFTABLES << 8 | _NFT_MSG_DELTABLE
        begin, self._sequence = self._sequence, self._sequence + 3
        batch = (
            _message(_NFNL_MSG_BATCH_BEGIN, 0, begin, subsystem)
            + _message(kind, NLM_F_ACK, begin + 1, _GENMSG.pack(_NFPROTO[family], 0, 0) + table)
            + _message(_NFNL_MSG_BATCH_END, 0, begin + 2, subsystem)
        )
        number = self._outcome(batch, begin, f"delete nft table {name}")
        if number == errno.ENOENT:
            return False
        if number:
            raise ItemRefused("delete nft table", name, number)
        return True

    def _outcome(self, batch: bytes, begin: int, request: str) -> int:
        """Send it, and wait for the word on its deletion, or on the whole: 0 or a positive errno."""
        try:
            self._batches.sendto(batch, (0, 0))
            while True:
                data = self._batches.recv(1 << 16)
                _, kind, _, sequence, _ = _HEADER.unpack_from(data)
                if kind != _NLMSG_ERROR or sequence not in (begin, begin + 1):
                    continue  # of a batch that timed out
                number = -int(_ERROR.unpack_from(data, _HEADER.size)[0])
                if sequence == begin and number in (errno.EPERM, errno.EACCES):
                    raise PermissionMissing(request, "CAP_NET_ADMIN is needed")
                if sequence == begin:
                    _raise_if_missing(number)
                return number
        except TimeoutError as error:
            raise AnswerLost(request, f"none in {_TIMEOUT_SECONDS:g} s") from error
        except PermissionError as error:
            raise PermissionMissing(request, "CAP_NET_ADMIN is needed") from error
        except OSError as error:
            raise AnswerLost(request, os.strerror(error.errno or errno.EIO)) from error


def _message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), kind, flags | NLM_F_REQUEST, sequence, 0) + body


def _raise_if_missing(number: int) -> None:
    """nfnetlink without the subsystem says so."""
    if number in (errno.EINVAL, errno.EOPNOTSUPP):
        raise FeatureMissing("nf_tables", "the module nf_tables is not there")
