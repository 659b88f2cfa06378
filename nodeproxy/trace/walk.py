"""Owns the walk of a packet through one table's chains: every way that it may take, each with its chance.

A rule that matches by chance parts the walk in two. Where a match or target is not understood the walk ends as unknown,
at that rule: what comes after it would be a guess.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from nodeproxy.trace.kernel_view import KernelView, KernelViewError
from nodeproxy.trace.matches import Matcher
from nodeproxy.trace.packet import PacketState
from nodeproxy.trace.rule_text import Rule
from nodeproxy.trace.saved_tables import Chain, SavedTables
from nodeproxy.trace.targets import Done, Effect, apply

_DEEPEST: Final = 64  # jumps; the kernel refuses loops, a file may hold one
_MOST_WAYS: Final = 50_000


class End(enum.StrEnum):
    """How a packet's way ends, as far as this node goes."""

    DELIVERED = "delivered on this node"
    SENT = "sent out"
    DROPPED = "dropped"
    REJECTED = "rejected"
    UNROUTABLE = "not routed"
    UNKNOWN = "unknown"


class Step(Struct, frozen=True, omit_defaults=True):
    """A rule that a packet passed (it matched), or something else that happened to it (`table` "" then).

    `remark` says in words what the text does not. Counters are those of the rule, before this packet.
    """

    text: str
    table: str = ""
    chain: str = ""
    number: int = 0
    remark: str = ""
    packets: int | None = None
    bytes: int | None = None

    @property
    def where(self) -> str:
        """The rule, in words."""
        return f"rule {self.number} of chain {self.chain} ({self.table} table)" if self.number else self.text


class Trail(Struct, frozen=True, gc=False):
    """Steps, the last one first. Ways that part share what lies before."""

    step: Step
    before: Trail | None = None


class Way(Struct, frozen=True):
    """One way a packet may take: its chance, the packet now, what it passed; `end` is None while it is under way.

    `destination_decided`, `source_decided`: the nat table has been asked about them; it is asked once for a connection.
    """

    chance: float
    packet: PacketState
    trail: Trail | None = None
    end: End | None = None
    reason: str = ""
    destination_decided: bool = False
    source_decided: bool = False

    def passed(self, step: Step) -> Way:
        """This way, one step further."""
        return replace(self, trail=Trail(step, self.trail))

    def ended(self, end: End, reason: str = "") -> Way:
        """This way, at its end."""
        return replace(self, end=end, reason=reason)

    def steps(self) -> list[Step]:
        """All steps, from the first."""
        found = []
        at = self.trail
        while at is not None:
            found.append(at.step)
            at = at.before
        return found[::-1]


class _Left(enum.Enum):
    """How a way left a chain, where it did not end there."""

    FELL_THROUGH = 1
    ACCEPTED = 2


_Leaving = tuple[Way, _Left]


class ChainWalk:
    """Walks chains of one kernel's tables."""

    def __init__(self, kernel: KernelView, tables: SavedTables, suffix: str = "") -> None:
        """`suffix` is put behind the names of tables, where there are those of two variants.

        A walk raises KernelViewError where the kernel cannot be read, or where there are too many ways to follow.
        """
        self._tables = tables
        self._suffix = suffix
        self.matcher = Matcher(kernel)
        self._parted = 0

    def table(self, way: Way, table: str, hook: str) -> Iterator[Way]:
        """Pass a table's built-in chain; the ways that it leads to, ended ones among them."""
        chain = self._tables.chain(table, hook)
        if chain is None:
            yield way
            return
        for found, left in self._chain(way, table, chain, 0):
            if found.end is None and left is _Left.FELL_THROUGH and chain.policy == "DROP":
                step = Step(f"policy of chain {hook}: DROP", f"{table}{self._suffix}", hook)
                yield found.passed(step).ended(End.DROPPED, f"policy of chain {hook} ({step.table} table)")
            else:
                yield found

    def _chain(self, way: Way, table: str, chain: Chain, depth: int) -> Iterator[_Leaving]:
        """Every way out of a chain."""
        under_way = [way]
        for rule in chain.rules():
            still: list[Way] = []
            for at in under_way:
                if not isinstance(rule, Rule):
                    number = chain.rules().index(rule) + 1
                    yield (
                        self._lost(at, Step(str(rule), f"{table}{self._suffix}", chain.name, number), str(rule)),
                        _Left.ACCEPTED,
                    )
                    continue
                for found, left in self._rule(at, table, rule, depth):
                    if left is _Left.FELL_THROUGH and found.end is None:
                        still.append(found)
                    else:
                        yield found, left if left is not None else _Left.FELL_THROUGH
            under_way = still
            if not under_way:
                return
        for at in under_way:
            yield at, _Left.FELL_THROUGH

    def _rule(self, way: Way, table: str, rule: Rule, depth: int) -> Iterator[tuple[Way, _Left | None]]:
        """The ways after one rule. FELL_THROUGH: on to the next rule; None: back to the calling chain."""
        chance, unknown = self.matcher.evaluate(rule, way.packet)
        if chance == 0.0:
            yield way, _Left.FELL_THROUGH
            return
        step = Step(rule.text, f"{table}{self._suffix}", rule.chain, rule.number, "", rule.packets, rule.bytes)
        if chance is None:
            done = apply(rule, way.packet)
            if done.effect is Effect.NEXT and done.packet == way.packet:
                yield way, _Left.FELL_THROUGH  # whether or not it matches, nothing comes of it
            else:
                yield self._lost(way, step, f"{unknown} is not understood"), _Left.ACCEPTED
            return
        if chance < 1.0:
            self._parted += 1
            if self._parted > _MOST_WAYS:
                raise KernelViewError(f"{step.where}: matches by chance lead to more than {_MOST_WAYS} ways")
            yield replace(way, chance=way.chance * (1.0 - chance)), _Left.FELL_THROUGH
            way = replace(way, chance=way.chance * chance)
        target = self._tables.chain(table, rule.target) if rule.target else None
        if target is None:
            yield self._applied(way, step, apply(rule, way.packet))
        elif depth >= _DEEPEST:
            yield self._lost(way, step, "jumps go too deep"), _Left.ACCEPTED
        else:
            for found, left in self._chain(way.passed(step), table, target, depth + 1):
                yield found, None if rule.goto and left is _Left.FELL_THROUGH else left

    def _applied(self, way: Way, step: Step, done: Done) -> tuple[Way, _Left | None]:
        if done.effect is Effect.UNKNOWN:
            return self._lost(way, step, done.remark), _Left.ACCEPTED
        found = replace(way, packet=done.packet).passed(replace(step, remark=done.remark) if done.remark else step)
        if done.effect is Effect.NEXT:
            return found, _Left.FELL_THROUGH
        if done.effect is Effect.RETURN:
            return found, None
        if done.effect is Effect.DROP:
            return found.ended(End.DROPPED, step.where), _Left.ACCEPTED
        if done.effect is Effect.REJECT:
            return found.ended(End.REJECTED, step.where), _Left.ACCEPTED
        return found, _Left.ACCEPTED

    @staticmethod
    def _lost(way: Way, step: Step, why: str) -> Way:
        lost = replace(step, remark=f"unknown from here: {why}")
        return way.passed(lost).ended(End.UNKNOWN, f"unknown from {step.where} on: {why}")
