"""Owns changing chains of a legacy table without iptables, which takes and gives the kernel the whole table twice for it.

The kernel only replaces tables as a whole. Here the last one that we put there is kept, so that only what somebody else may
have changed is read again, under the xtables lock: the entries before our chains, and the size of everything. Where that is
not as it was, or others have chains behind ours, the whole table is read. The kernel refuses the replacement of a table that
by then has another number of entries.

Nothing is guessed. Forms of rules are used once a rule that iptables wrote was found to be encoded alike; for everything
else, and in any doubt, PatchImpossible is raised before anything was changed, for iptables to do it.
"""

import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from nodeproxy.kernel.errors import FeatureMissing, PatchImpossible, PermissionMissing, RequestRefused
from nodeproxy.kernel.legacy.blob import NotUnderstood, TableBlob
from nodeproxy.kernel.legacy.edits import change
from nodeproxy.kernel.legacy.encoder import EncodedRule, NotEncodable, RuleEncoder
from nodeproxy.kernel.legacy.socket import LegacySocket, TableInfo

Rules = Sequence[str]
_MAX_EXAMPLES: Final = 5000
"""Rules that are compared with what iptables wrote, at most, in one search: about 0.15 s, while others wait for the lock."""
_MAX_CHAINS: Final = 1000
_NEW_CHAIN: Final = "new chain"
_MAX_DISAGREEMENTS: Final = 3
"""How often iptables may be found to write a form otherwise, before the form is given up."""


class ChainChanges(NamedTuple):
    """What is to change in a table: chains with all their rules, and chains that go.

    `ours` tells by name which chains nobody else writes to. `examples` are chains that iptables wrote, with their rules,
    some of every kind: as many as are needed are looked at.
    """

    chains: Mapping[str, Rules]
    removed: Collection[str]
    ours: Callable[[str], bool]
    examples: Callable[[], Iterable[tuple[str, Rules]]]


class LegacyPatcher:
    """Changes tables of one family (4 or 6). One call at a time, in any thread of one network namespace."""

    def __init__(self, family: int) -> None:
        self._family = family
        self._encoder = RuleEncoder(family)
        self._socket: LegacySocket | None = None
        self._tables: dict[str, TableBlob] = {}
        self._first_of_ours: dict[str, str] = {}
        self._known: set[str] = set()
        self._disagreements: Counter[str] = Counter()
        self._left_to_iptables: dict[str, Mapping[str, Rules]] = {}

    def close(self) -> None:
        """Close the socket, and forget the tables."""
        self.forget()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def forget(self) -> None:
        """The tables are no longer as they were left here."""
        self._tables.clear()
        self._first_of_ours.clear()

    def patch(self, table: str, changes: ChainChanges) -> None:
        """Make the changes: all of them or none. Blocks for as long as the kernel takes. Hold the xtables lock.

        Raises PatchImpossible.
        """
        try:
            self._patch(table, changes, self._encoded(changes))
        except (
            RequestRefused,
            PermissionMissing,
            FeatureMissing,
            NotUnderstood,
            NotEncodable,
            ValueError,
            LookupError,
            struct.error,
            OSError,
        ) as error:
            self._tables.pop(table, None)
            if len(changes.chains) <= _MAX_CHAINS:
                self._left_to_iptables[table] = changes.chains
            raise PatchImpossible(str(error)) from error
        except BaseException:
            self._tables.pop(table, None)
            raise

    def _encoded(self, changes: ChainChanges) -> dict[str, list[EncodedRule]]:
        if len(changes.chains) + len(changes.removed) > _MAX_CHAINS:
            raise NotEncodable("more than iptables does as fast")
        encoded = {chain: [self._encoder.encode(rule) for rule in rules] for chain, rules in changes.chains.items()}
        given_up = {part for part in _parts(encoded) - self._known if self._disagreements[part] >= _MAX_DISAGREEMENTS}
        if given_up:
            raise NotEncodable(f"not as iptables writes it: {', '.join(sorted(given_up))}")
        return encoded

    def _patch(self, table: str, changes: ChainChanges, rules: Mapping[str, Sequence[EncodedRule]]) -> None:
        sock = self._socket = self._socket or LegacySocket(self._family)
        info = sock.info(table)
        if info is None:
            raise NotUnderstood(f"no table {table}")
        blob = self._current(sock, table, info, changes.ours)
        self._require(blob, table, changes, rules)
        counters = change(blob, self._encoder, rules, changes.removed)
        del self._tables[table]  # until the kernel has it
        old_counters = sock.replace(table, info, blob.info, blob.buffer)
        self._tables[table] = blob
        try:
            sock.add_counters(table, counters.of(old_counters))
        except RequestRefused:
            self.forget()  # somebody without the lock: what was to be done is done, and counters are lost

    def _current(self, sock: LegacySocket, table: str, info: TableInfo, ours: Callable[[str], bool]) -> TableBlob:
        """The table as it is: the one that is kept, if nobody else changed it, else a new one."""
        blob = self._tables.get(table)
        if blob is not None and blob.info == info:
            before_ours = blob.starts[self._ours_begin(table, blob, ours)]
            if before_ours * 2 < info.size and blob.agrees_with(sock.first_entries(table, info, before_ours)):
                return blob
        self._tables.pop(table, None)
        self._first_of_ours.pop(table, None)
        del blob  # two of them are never needed
        blob = self._tables[table] = TableBlob(self._family, info, sock.entries(table, info))
        return blob

    def _ours_begin(self, table: str, blob: TableBlob, ours: Callable[[str], bool]) -> int:
        """Which chain is the first behind which there are only such of ours: what follows is as we left it."""
        known = self._first_of_ours.get(table)
        if known is not None and known in blob:
            return blob.position(known)
        others = (at for at in range(len(blob.names) - 1, -1, -1) if not ours(blob.names[at]))
        begin = next(others, -1) + 1
        if begin < len(blob.names):
            self._first_of_ours[table] = blob.names[begin]
        return begin

    def _require(
        self, blob: TableBlob, table: str, changes: ChainChanges, rules: Mapping[str, Sequence[EncodedRule]]
    ) -> None:
        """Make sure that all forms of rules in use are known to be encoded as iptables does. Raises NotEncodable."""
        left = _MAX_EXAMPLES
        for chain, texts in self._left_to_iptables.pop(table, {}).items():
            if len(texts) <= left:
                left -= len(texts)
                self._learn(blob, chain, texts)
        needed = _parts(rules)
        if any(chain not in blob for chain in rules):
            needed.add(_NEW_CHAIN)
        if needed <= self._known:
            return
        name = blob.names[0] if blob.names else ""
        if name and blob.ends(name) == (self._encoder.chain_head(name), self._encoder.chain_foot()):
            self._known.add(_NEW_CHAIN)
        unlike = set[str]()
        for chain, texts in changes.examples():
            if needed <= self._known:
                return
            if len(texts) <= left and chain not in changes.chains:  # else it is not yet as the example says
                left -= len(texts)
                unlike |= self._learn(blob, chain, texts)
        if missing := needed - self._known:
            self._disagreements.update(missing & unlike)
            raise NotEncodable(f"not seen from iptables yet: {', '.join(sorted(missing))}")

    def _learn(self, blob: TableBlob, chain: str, texts: Rules) -> set[str]:
        """Compare the rules of a chain with the kernel's. Returns the forms of those that iptables wrote otherwise."""
        unlike = set[str]()
        present = list(blob.rules(chain)) if chain in blob else []
        if len(present) != len(texts):
            return unlike  # somebody else wrote to it
        for text, rule in zip(texts, present, strict=True):
            try:
                encoded = self._encoder.encode(text)
            except (NotEncodable, ValueError):
                continue
            if (encoded.entry, encoded.chain) == rule:
                self._known |= encoded.parts
            else:
                unlike |= encoded.parts
        return unlike


def _parts(rules: Mapping[str, Sequence[EncodedRule]]) -> set[str]:
    return {part for encoded in rules.values() for rule in encoded for part in rule.parts}
