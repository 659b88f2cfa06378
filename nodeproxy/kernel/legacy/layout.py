"""Owns how the two families lay out a legacy table: sizes and offsets of the kernel's structures, in bytes, host order.

Sources: include/uapi/linux/netfilter_ipv4/ip_tables.h, netfilter_ipv6/ip6_tables.h, netfilter/x_tables.h. All of them are
for 64-bit kernels; on others nothing of ours will be found to agree with what iptables wrote, and iptables does everything.
"""

import socket
import struct
from dataclasses import dataclass
from typing import Final

TARGET_HEAD: Final = struct.Struct("=H29sB")
"""xt_entry_target and xt_entry_match: size, name, revision."""
ALIGNMENT: Final = 8
ERROR_TARGET: Final = b"ERROR"
"""Begins a user-defined chain (its name follows) and ends the table."""
_SOL_IPV6: Final = 41
RETURN: Final = -5
"""Verdict of RETURN, and of every user-defined chain's end: -NF_REPEAT - 1."""
VERDICT_SIZE: Final = 4
CHAIN_NAME_SIZE: Final = 30
"""xt_error_target.errorname: XT_FUNCTION_MAXNAMELEN, the final zero included."""


@dataclass(frozen=True, slots=True)
class Layout:
    """An entry is its addresses and interfaces, then from `target_offset_at` on: target_offset, next_offset, comefrom,
    and two counters (packets, bytes); then matches and the target."""

    family: int
    level: int
    domain: int
    entry_size: int
    target_offset_at: int
    comefrom_at: int

    @property
    def head_size(self) -> int:
        """The entry that begins a user-defined chain."""
        return self.entry_size + aligned(TARGET_HEAD.size + CHAIN_NAME_SIZE)

    @property
    def foot_size(self) -> int:
        """The entry that ends a user-defined chain."""
        return self.entry_size + aligned(TARGET_HEAD.size + VERDICT_SIZE)


def aligned(size: int) -> int:
    """XT_ALIGN."""
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


LAYOUTS: Final = {
    4: Layout(4, socket.SOL_IP, socket.AF_INET, entry_size=112, target_offset_at=88, comefrom_at=92),
    6: Layout(6, _SOL_IPV6, socket.AF_INET6, entry_size=168, target_offset_at=140, comefrom_at=144),
}


def extension(name: bytes, revision: int, data: bytes) -> bytes:
    """A match or target with its data."""
    size = aligned(TARGET_HEAD.size + len(data))
    return TARGET_HEAD.pack(size, name, revision) + data.ljust(size - TARGET_HEAD.size, b"\0")
