"""Owns changing chains of a `TableBlob`: new rules for some, new chains, chains that go.

What iptables would have made of the same change comes out, byte for byte.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

from nodeproxy.kernel.legacy.blob import WORD, NotUnderstood, TableBlob
from nodeproxy.kernel.legacy.encoder import EncodedRule, RuleEncoder
from nodeproxy.kernel.legacy.socket import COUNTER_SIZE, COUNTERS_HEAD, ENTRIES_HEAD

_FEW: Final = 8


class _Edit(NamedTuple):
    """Bytes from `start` to `end` become `new`, and `old_entries` entries from `first_entry` on become `new_entries`.

    `jumps` are where its verdicts are, from its first rule (at `rules_at` in `new`) on, and the chains that they lead to.
    """

    start: int
    end: int
    chain: str
    new: bytes
    rules_at: int
    jumps: Sequence[tuple[int, str]]
    first_entry: int
    old_entries: int
    new_entries: int

    @property
    def growth(self) -> int:
        return len(self.new) - (self.end - self.start)


class CountersCarried:
    """How the counters of a table that was changed become those of the new one: what changed begins at 0."""

    def __init__(self, edits: Sequence[_Edit]) -> None:
        self._edits = edits

    def of(self, old: bytearray) -> bytearray:
        """The counters to add, from the old ones; both after `COUNTERS_HEAD` bytes."""
        counters = memoryview(old)
        parts: list[memoryview | bytes] = []
        copied = 0
        for edit in self._edits:
            at = COUNTERS_HEAD + edit.first_entry * COUNTER_SIZE
            parts += [counters[copied:at], bytes(edit.new_entries * COUNTER_SIZE)]
            copied = at + edit.old_entries * COUNTER_SIZE
        return bytearray().join([*parts, counters[copied:]])


def change(
    blob: TableBlob, encoder: RuleEncoder, chains: Mapping[str, Sequence[EncodedRule]], removed: Collection[str]
) -> CountersCarried:
    """Give chains new rules (making those that are not there) and remove others, in `blob` itself.

    Raises NotUnderstood for a jump to a chain that is not there or goes, and NotEncodable; `blob` is then of no use.
    """
    if not chains.keys().isdisjoint(removed):
        raise NotUnderstood("a chain that is to change and to go")
    edits = sorted([*(_put(blob, encoder, *item) for item in chains.items()), *(_remove(blob, name) for name in removed)])
    if any(edit.growth or edit.old_entries != edit.new_entries for edit in edits):
        _move(blob, edits, frozenset(removed))
    else:
        for edit in edits:
            blob.buffer[ENTRIES_HEAD + edit.start : ENTRIES_HEAD + edit.end] = edit.new
            low, high = bisect_left(blob.jumps, edit.start), bisect_left(blob.jumps, edit.end)
            blob.jumps[low:high] = array("I", [edit.start + place for place, _ in edit.jumps])
    _lead(blob, edits)
    return CountersCarried(edits)


def _put(blob: TableBlob, encoder: RuleEncoder, chain: str, rules: Sequence[EncodedRule]) -> _Edit:
    entries = b"".join([rule.entry for rule in rules])
    begins = accumulate([len(rule.entry) for rule in rules], initial=0)
    jumps = [(begin + rule.verdict_at, rule.chain) for begin, rule in zip(begins, rules, strict=False) if rule.chain]
    at = bisect_left(blob.names, chain)
    start, first = blob.starts[at], blob.first_entries[at]
    if chain not in blob:
        head = encoder.chain_head(chain)
        return _Edit(start, start, chain, head + entries + encoder.chain_foot(), len(head), jumps, first, 0, len(rules) + 2)
    end = blob.starts[at + 1] - blob.layout.foot_size
    count = blob.first_entries[at + 1] - first - 2
    return _Edit(start + blob.layout.head_size, end, chain, entries, 0, jumps, first + 1, count, len(rules))


def _remove(blob: TableBlob, chain: str) -> _Edit:
    at = blob.position(chain)
    first, after = blob.first_entries[at : at + 2]
    return _Edit(blob.starts[at], blob.starts[at + 1], chain, b"", 0, (), first, after - first, 0)


def _put_together(blob: TableBlob, edits: Sequence[_Edit]) -> None:
    """Put what is new in the place of what was. A few edits are made in place: new memory costs more than moving the old."""
    if len(edits) <= _FEW:
        for edit in reversed(edits):
            blob.buffer[ENTRIES_HEAD + edit.start : ENTRIES_HEAD + edit.end] = edit.new
        return
    old = memoryview(blob.buffer)
    parts: list[memoryview | bytes] = []
    copied = 0
    for edit in edits:
        parts += [old[copied : ENTRIES_HEAD + edit.start], edit.new]
        copied = ENTRIES_HEAD + edit.end
    blob.buffer = bytearray().join([*parts, old[copied:]])


def _move(blob: TableBlob, edits: Sequence[_Edit], removed: frozenset[str]) -> None:
    """Change the entries, and bring up to date where everything is and where kept jumps lead."""
    end_of_old = len(blob.buffer)
    _put_together(blob, edits)
    ends = [edit.end for edit in edits]
    shifts = list(accumulate([edit.growth for edit in edits], initial=0))
    gone = {blob.starts[blob.position(chain)] for chain in removed}
    words, head_size = memoryview(blob.buffer).cast("i"), blob.layout.head_size
    jumps = array("I")
    bounds = [0, *(edge for edit in edits for edge in (edit.start, edit.end)), end_of_old]
    for number, shift in enumerate(shifts):
        low, high = (bisect_left(blob.jumps, bound) for bound in bounds[2 * number : 2 * number + 2])
        places = [place + shift for place in blob.jumps[low:high]]
        for place in places:
            word = (ENTRIES_HEAD + place) // WORD
            head = words[word] - head_size
            if head in gone:
                raise NotUnderstood("a jump to a chain that goes")
            words[word] += shifts[bisect_right(ends, head)]  # a chain moves with all that ends before its head
        jumps.extend(places)
        if number < len(edits):
            edit = edits[number]
            begin = edit.start + shift + edit.rules_at
            jumps.extend([begin + place for place, _ in edit.jumps])
    _renumber(blob, edits, removed, ends, shifts)
    entries = blob.info.entries + sum(edit.new_entries - edit.old_entries for edit in edits)
    blob.info = replace(blob.info, entries=entries, size=blob.info.size + shifts[-1])
    blob.jumps = jumps


def _renumber(
    blob: TableBlob, edits: Sequence[_Edit], removed: frozenset[str], ends: Sequence[int], shifts: Sequence[int]
) -> None:
    """Where chains begin now."""
    grown = list(accumulate([edit.new_entries - edit.old_entries for edit in edits], initial=0))
    starts: list[int] = []
    first_entries: list[int] = []
    bounds = [0, *(bisect_left(blob.starts, end) for end in ends), len(blob.starts)]
    for shift, more, (low, high) in zip(shifts, grown, pairwise(bounds), strict=True):
        starts += [start + shift for start in blob.starts[low:high]]
        first_entries += [first + more for first in blob.first_entries[low:high]]
    for chain in removed:
        at = blob.position(chain)
        del blob.names[at], starts[at], first_entries[at]
    made = [(edit, shift, more) for edit, shift, more in zip(edits, shifts, grown, strict=False) if edit.chain not in blob]
    for edit, shift, more in made:
        if edit.chain not in removed:
            at = bisect_left(blob.names, edit.chain)
            blob.names.insert(at, edit.chain)
            starts.insert(at, edit.start + shift)
            first_entries.insert(at, edit.first_entry + more)
    blob.starts, blob.first_entries = starts, first_entries


def _lead(blob: TableBlob, edits: Sequence[_Edit]) -> None:
    """Set the verdicts of new rules that jump. Chains are already where they will be."""
    words, head_size = memoryview(blob.buffer).cast("i"), blob.layout.head_size
    for edit in edits:
        if edit.jumps:
            at = blob.position(edit.chain)
            begin = blob.starts[at] + head_size
            for place, target in edit.jumps:
                words[(ENTRIES_HEAD + begin + place) // WORD] = blob.starts[blob.position(target)] + head_size
