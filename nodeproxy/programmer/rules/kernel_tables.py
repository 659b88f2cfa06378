"""Owns the packet filter's tables of one family in the kernel: reading them, changing them, and noticing others' changes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager

import structlog
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential_jitter

from nodeproxy.kernel.errors import LockHeld, PatchImpossible
from nodeproxy.kernel.xtables import ChainChanges, ChangeStamp, Variant, XTables
from nodeproxy.programmer.rules import transaction as tx
from nodeproxy.programmer.rules.chains import TableChange
from nodeproxy.programmer.rules.common import RANDOM_FULLY, Features
from nodeproxy.programmer.rules.names import is_ours
from nodeproxy.programmer.rules.snapshot import TableSnapshot, parse_tables

_log = structlog.get_logger(__name__)

# Others may change the tables all the time (a CNI plugin with every pod). Reading large ones back costs a second of CPU, so
# after each look there is a rest of this many times as long. The first change after a quiet time is looked at right away.
_REST_PER_LOOK = 10

# The stamps of legacy tables do not tell of a rule that was exchanged for one of the same size.
_LOOK_ANYWAY_SECONDS = 600.0

Snapshots = dict[str, TableSnapshot]

Examples = Callable[[str], Iterable[tuple[str, Sequence[str]]]]
"""Chains of a table that are in the kernel, with their rules."""


class KernelTables:
    """Tables (nat, filter, …) of one family and variant. One call at a time. Methods raise `KernelError`.

    `tables` are needed; `others` are looked into for what does not belong there any more.
    """

    def __init__(self, xtables: XTables, tables: Sequence[str], others: Sequence[str] = ()) -> None:
        self.xtables = xtables
        self._tables = tuple(tables)
        self._others = tuple(others)
        self._stamp: ChangeStamp | None = None
        self._seen: ChangeStamp | None = None
        self._look_again_at = 0.0
        self._look_anyway_at = 0.0
        self.left_to_iptables = 0

    async def probe(self, hairpin: str) -> Features:
        """Make sure that the tables can be had, waiting for the lock, and find what they take. `hairpin` is a match."""
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(LockHeld),
            wait=wait_exponential_jitter(multiplier=0.5, max=10),
            before_sleep=_say_waiting,
        ):
            with attempt:
                if await self.xtables.accepts(RANDOM_FULLY, hairpin):
                    return Features()
                await self.xtables.restore("".join(f"*{table}\nCOMMIT\n" for table in self._tables))
                return Features(
                    random_fully=await self.xtables.accepts(RANDOM_FULLY), bpf=await self.xtables.accepts(hairpin)
                )
        raise AssertionError("the last attempt returns or raises")

    async def read(self) -> Snapshots:
        """The tables as they are."""
        self._seen = await self.xtables.stamp()
        self._look_anyway_at = time.monotonic() + _LOOK_ANYWAY_SECONDS
        found = parse_tables(await self.xtables.save_all())
        return {table: found.get(table, TableSnapshot({}, frozenset())) for table in (*self._tables, *self._others)}

    async def restore(self, text: str, *, after_read: bool) -> None:
        """Carry out a transaction. `after_read`: it takes into account all that was there when the tables were read."""
        async with self._changing(self._seen if after_read else self._stamp):
            await self.xtables.restore(text)

    async def change(self, changes: Mapping[str, TableChange], examples: Examples) -> None:
        """Carry out changes of our chains, table by table. Those of legacy tables without iptables where that can be."""
        left = dict(changes)
        async with self._changing(self._stamp):
            if self.xtables.variant is Variant.LEGACY:
                for table, change in changes.items():
                    if change and not await self._patched(table, change, examples):
                        break
                    del left[table]
            if text := tx.render(tx.incremental(left)):
                await self.xtables.restore(text)

    @asynccontextmanager
    async def _changing(self, known: ChangeStamp | None) -> AsyncIterator[None]:
        """Where somebody else changed the tables since they had the stamp `known`, the next audit must read them."""
        self._stamp = None
        async with self.xtables.turn() as turn:
            yield
        if turn.begin == known:
            self._stamp = turn.end

    async def _patched(self, table: str, change: TableChange, examples: Examples) -> bool:
        changes = ChainChanges(change.chains, change.removed, is_ours, lambda: examples(table))
        try:
            await self.xtables.patch(table, changes)
        except PatchImpossible as error:
            self.left_to_iptables += 1
            _log.debug("changing a table by iptables", table=table, why=str(error), times=self.left_to_iptables)
            return False
        return True

    def confirm(self) -> None:
        """What `read` returned is as wanted."""
        self._stamp = self._seen

    async def look(self, anyway: bool = False) -> Snapshots | None:
        """The tables, if somebody else changed them since they were last confirmed; None if nobody did, or while resting.

        `anyway`: the tables in any case. Those of legacy also from time to time.
        """
        stamp = await self.xtables.stamp()
        start = time.monotonic()
        anyway = anyway or (self.xtables.variant is Variant.LEGACY and start >= self._look_anyway_at)
        if not anyway and (stamp == self._stamp or start < self._look_again_at):
            return None
        kernel = await self.read()
        self._look_again_at = time.monotonic() + _REST_PER_LOOK * (time.monotonic() - start)
        return kernel


def _say_waiting(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    _log.warning("waiting for the packet filter", error=str(error))
