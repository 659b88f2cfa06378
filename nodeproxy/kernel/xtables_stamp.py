"""Owns the cheap marks that tell whether anybody changed the packet filter since the last look.

Legacy: entries, size and layout of each table, by getsockopt IPT_SO_GET_INFO, which takes the same time for every size. It
notices every added, removed or resized rule, not the exchange of a rule for one of the same size.
Nft: the generation number of the ruleset, which counts every transaction of every program and family in the namespace.

Sources: include/uapi/linux/netfilter/nf_tables.h, nfnetlink.h; of the legacy tables see `legacy.socket`.
"""

import errno
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from nodeproxy.kernel.errors import FeatureMissing, PermissionMissing, RequestRefused
from nodeproxy.kernel.legacy.socket import LegacySocket
from nodeproxy.kernel.netlink import NETLINK_NETFILTER, NetlinkSocket, attributes

NFNL_SUBSYS_NFTABLES: Final = 10
NFT_MSG_NEWGEN: Final = 15
_NFT_MSG_GETGEN: Final = 16
_NFTA_GEN_ID: Final = 1
_GENMSG: Final = struct.pack("=BBH", 0, 0, 0)  # nfgenmsg: family unspecified, version 0, resource id 0


@dataclass(frozen=True, slots=True)
class TableStamp:
    """One legacy table: `entries` counts rules, chain heads and policies; `size` is in bytes; `layout` is where the
    built-in chains begin and end."""

    table: str
    entries: int
    size: int
    layout: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LegacyStamp:
    """The legacy tables of one family that exist in this network namespace, by name in order."""

    tables: tuple[TableStamp, ...]


@dataclass(frozen=True, slots=True)
class NftStamp:
    """`generation` of the namespace's ruleset."""

    generation: int


ChangeStamp = LegacyStamp | NftStamp


def legacy_tables(family: int) -> tuple[str, ...]:
    """The legacy tables that exist in the network namespace of this thread, sorted. Looking does not create any.

    Reads the thread's own /proc entry: /proc/net is the main thread's namespace.
    """
    name = "ip_tables_names" if family == 4 else "ip6_tables_names"
    try:
        text = Path(f"/proc/thread-self/net/{name}").read_text(encoding="ascii")
    except FileNotFoundError:  # the module is not loaded: no tables in any namespace
        return ()
    except PermissionError as error:
        raise PermissionMissing("list the legacy tables", str(error)) from error
    return tuple(sorted(text.split()))


class LegacyStamps:
    """Reads the stamps of one family's legacy tables, in the network namespace of the thread that makes it."""

    def __init__(self, family: int) -> None:
        self._family = family
        self._socket = LegacySocket(family)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def read(self) -> LegacyStamp:
        """Stamps of the tables that exist. Raises PermissionMissing, RequestRefused.

        Asking the kernel for a table creates it, so the names are looked up first. Call it in the thread (or at least the
        network namespace) that made this object.
        """
        found = []
        for table in legacy_tables(self._family):
            info = self._socket.info(table)
            if info is not None:  # else it went away since its name was read
                found.append(TableStamp(table, info.entries, info.size, info.layout))
        return LegacyStamp(tuple(found))


class NftStamps:
    """Reads the generation of the nft ruleset, in the network namespace of the thread that makes it."""

    def __init__(self) -> None:
        self._socket = NetlinkSocket(NETLINK_NETFILTER)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def read(self) -> NftStamp:
        """The current generation. Raises FeatureMissing where the kernel has no nf_tables, PermissionMissing."""
        kind = NFNL_SUBSYS_NFTABLES << 8 | _NFT_MSG_GETGEN
        try:
            answer = b"".join(self._socket.dump(kind, _GENMSG, flags=0, request="nft generation"))
        except RequestRefused as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # nfnetlink without the subsystem
                raise FeatureMissing("nf_tables", "the module nf_tables is not there") from error
            raise
        for kind, start, end in attributes(answer, 4, len(answer)):
            if kind == _NFTA_GEN_ID:
                return NftStamp(int.from_bytes(answer[start:end], "big"))
        raise RequestRefused("nft generation", errno.EPROTO, "no generation in the answer")
