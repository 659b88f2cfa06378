"""Owns the entries of one legacy table as the kernel gives and takes them: which chain is where, and changing some chains.

A table is: built-in chains; user-defined ones in order of name, each begun by an entry with its name and ended by one that
returns; and an entry that ends the table. Jumps hold the offset of the first rule of a chain, so a chain that changes its
size moves the targets of all that jump to chains behind it. Offsets are in bytes from the first entry.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from typing import Final

from nodeproxy.kernel.legacy.layout import CHAIN_NAME_SIZE, ERROR_TARGET, LAYOUTS, TARGET_HEAD, VERDICT_SIZE, Layout
from nodeproxy.kernel.legacy.socket import ENTRIES_HEAD, TableInfo

WORD: Final = VERDICT_SIZE
"""Verdicts are aligned to their size."""


class NotUnderstood(Exception):
    """Entries that are not laid out as described here, or a change that cannot be made to them."""


class TableBlob:
    """One table: `buffer` is its entries after `ENTRIES_HEAD` bytes; `names` its user-defined chains, sorted.

    `starts` and `first_entries` tell the offset and the number of the entry that begins each of them, and in one item more
    those of the entry that ends the table. `jumps` are the offsets of all verdicts that hold an offset, sorted.
    """

    def __init__(self, family: int, info: TableInfo, buffer: bytearray) -> None:
        """Raises NotUnderstood."""
        self.layout: Layout = LAYOUTS[family]
        self.info = info
        self.buffer = buffer
        self.names: list[str] = []
        self.starts: list[int] = []
        self.first_entries: list[int] = []
        self.jumps = array("I")
        self._read()

    def __contains__(self, chain: str) -> bool:
        at = bisect_left(self.names, chain)
        return at < len(self.names) and self.names[at] == chain

    def position(self, chain: str) -> int:
        """Which of `names` a chain is. Raises NotUnderstood where there is none."""
        at = bisect_left(self.names, chain)
        if at == len(self.names) or self.names[at] != chain:
            raise NotUnderstood(f"no chain {chain}")
        return at

    def rules(self, chain: str) -> Iterator[tuple[bytes, str | None]]:
        """The rules of a chain, without counters: for each its entry, and the chain that it jumps to.

        The verdict of one that jumps is 0. Raises NotUnderstood.
        """
        at, layout = self.position(chain), self.layout
        start, end = self.starts[at] + layout.head_size, self.starts[at + 1] - layout.foot_size
        while start < end:
            target_offset, size = self._sizes(start)
            entry = bytearray(self.bare(start, size))
            place = target_offset + TARGET_HEAD.size
            target = None
            if not entry[target_offset + 2]:
                verdict = int.from_bytes(entry[place : place + WORD], "little", signed=True)
                if verdict >= 0:
                    target = self._chain_at(verdict)
                    entry[place : place + WORD] = bytes(WORD)
            yield bytes(entry), target
            start += size

    def ends(self, chain: str) -> tuple[bytes, bytes]:
        """The entries that begin and end a chain, without counters. Raises NotUnderstood."""
        at, layout = self.position(chain), self.layout
        return (
            self.bare(self.starts[at], layout.head_size),
            self.bare(self.starts[at + 1] - layout.foot_size, layout.foot_size),
        )

    def bare(self, start: int, size: int) -> bytes:
        """An entry without its counters and what the kernel notes in it."""
        entry = self.buffer[ENTRIES_HEAD + start : ENTRIES_HEAD + start + size]
        self._blank(entry, 0)
        return bytes(entry)

    def agrees_with(self, others: bytes) -> bool:
        """Whether `others`, the first entries of a table, are those of this one, counters aside."""
        mine = self.buffer[ENTRIES_HEAD : ENTRIES_HEAD + len(others)]
        theirs = bytearray(others)
        start = 0
        while start < len(mine):
            _, size = self._sizes(start)
            self._blank(mine, start)
            self._blank(theirs, start)
            start += size
        return mine == theirs

    def _blank(self, entries: bytearray, start: int) -> None:
        first, end = start + self.layout.comefrom_at, start + self.layout.entry_size
        entries[first:end] = bytes(end - first)

    def _sizes(self, start: int) -> tuple[int, int]:
        """Offset of the target and size of an entry."""
        at = ENTRIES_HEAD + start + self.layout.target_offset_at
        data = self.buffer
        return data[at] | data[at + 1] << 8, data[at + 2] | data[at + 3] << 8

    def _chain_at(self, verdict: int) -> str:
        head = verdict - self.layout.head_size
        at = bisect_left(self.starts, head)
        if at >= len(self.names) or self.starts[at] != head:
            raise NotUnderstood("a jump that leads to no chain")
        return self.names[at]

    def _read(self) -> None:
        words = memoryview(self.buffer).cast("i")
        data, end = self.buffer, len(self.buffer)
        sizes_at, word_at = self.layout.target_offset_at, TARGET_HEAD.size
        start, number = ENTRIES_HEAD, 0
        while start < end:
            at = start + sizes_at
            target = start + (data[at] | data[at + 1] << 8)
            size = data[at + 2] | data[at + 3] << 8
            kind = data[target + 2]
            if not kind:
                place = target + word_at
                if words[place // WORD] >= 0:
                    self.jumps.append(place - ENTRIES_HEAD)
            elif kind == ERROR_TARGET[0] and data[target + 2 : target + 8] == ERROR_TARGET + b"\0":
                name = bytes(data[target + word_at : target + word_at + CHAIN_NAME_SIZE])
                self.names.append(name.partition(b"\0")[0].decode("ascii", "replace"))
                self.starts.append(start - ENTRIES_HEAD)
                self.first_entries.append(number)
            if size < self.layout.entry_size:
                raise NotUnderstood("an entry of no size")
            start += size
            number += 1
        self._check(number, start)

    def _check(self, entries: int, end: int) -> None:
        if not self.names or self.names.pop() != ERROR_TARGET.decode() or end != len(self.buffer):
            raise NotUnderstood("the table's end is not where it should be")
        if entries != self.info.entries or end != ENTRIES_HEAD + self.info.size:
            raise NotUnderstood("another size than the kernel tells")
        if any(a >= b for a, b in zip(self.names, self.names[1:], strict=False)):
            raise NotUnderstood("chains that are not in order of name")
        if any(offset >= self.starts[0] for offset in self.info.layout if offset != 0xFFFFFFFF):
            raise NotUnderstood("built-in chains behind others")
