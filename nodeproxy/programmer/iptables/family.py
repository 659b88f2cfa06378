"""Owns one family in iptables mode: full passes, incremental changes, finding refused rows, and the audit.

What the kernel is believed to hold is the `Ruleset` of the last successful transaction. After any failure or drift the next
pass is a full one, which reads the kernel and rewrites only what differs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Self

import structlog

from nodeproxy.forwarding.table import Family, ServicePort, ServicePortKey
from nodeproxy.kernel.errors import KernelError, RestoreRefused
from nodeproxy.kernel.xtables import XTables
from nodeproxy.kernel.xtables_tools import Variant
from nodeproxy.programmer.base import ProgrammerConfig, ProgrammingError
from nodeproxy.programmer.iptables import transaction as tx
from nodeproxy.programmer.iptables.affinity import AffinitySets
from nodeproxy.programmer.iptables.base_chains import jumps
from nodeproxy.programmer.iptables.ruleset import TABLES, Plan, Ruleset
from nodeproxy.programmer.iptables.service_rules import AffinitySet
from nodeproxy.programmer.iptables.snapshot import TableSnapshot, parse_save

_log = structlog.get_logger(__name__)

_HASH_IN_CHAIN = re.compile(r"KUBE-(?:SVC|SVL|EXT|FW)-([A-Z2-7]{16})")
_PROBE = "KUBE-PROXY-CANARY"

Rows = Mapping[ServicePortKey, ServicePort | None]


class FamilyProgrammer:
    """Programs the rows of one family. One call at a time."""

    def __init__(
        self, family: Family, config: ProgrammerConfig, xtables: XTables, sets: AffinitySets, random_fully: bool = True
    ) -> None:
        self.family = family
        self._config = config
        self._xtables = xtables
        self._sets = sets
        self._random_fully = random_fully
        self._ruleset: Ruleset | None = None
        self._health_ports: frozenset[int] = frozenset()
        self._stamp: object = None

    @classmethod
    async def open(cls, family: Family, config: ProgrammerConfig, variant: Variant, sets: AffinitySets) -> Self:
        """Find the tools, and what they and the kernel can do. Raises `ProgrammingError`."""
        try:
            xtables = XTables(variant, family.value)
            return cls(family, config, xtables, sets, await xtables.random_fully_supported())
        except KernelError as error:
            raise ProgrammingError(f"IPv{int(family)}: {error}") from error

    def configure(self, config: ProgrammerConfig) -> None:
        """Take a new configuration; the next apply is a full pass."""
        self._config = config
        self._ruleset = None

    @property
    def needs_full_pass(self) -> bool:
        """Whether what the kernel holds is unknown: at start, after drift, after failure."""
        return self._ruleset is None

    async def full_pass(
        self, rows: Mapping[ServicePortKey, ServicePort], health_ports: frozenset[int], first: Iterable[ServicePortKey] = ()
    ) -> dict[ServicePortKey, str]:
        """Make the kernel match `rows`, and return those that it refuses with the reason.

        On a node that serves nothing yet, the rows in `first` are programmed in a transaction of their own beforehand.
        """
        self._ruleset = None
        try:
            kernel = await self._read()
            early = {key: rows[key] for key in first}
            if early and len(rows) > len(early) and not tx.serves(kernel["nat"]):
                await self._commit_full(early, health_ports, kernel)
                kernel = await self._read()
            return await self._commit_full(rows, health_ports, kernel)
        except KernelError as error:
            raise ProgrammingError(f"IPv{int(self.family)}: {error}") from error

    async def change(self, rows: Rows, health_ports: frozenset[int]) -> dict[ServicePortKey, str] | None:
        """Program changed rows on top of what is there. None where the kernel refused: a full pass must follow."""
        ruleset = self._ruleset
        if ruleset is None:
            return None
        refused = await self._sets.create(self._new_sets(ruleset, rows))
        plan = ruleset.change({key: row for key, row in rows.items() if key not in refused})
        self._change_health_ports(ruleset, plan, health_ports)
        try:
            if plan:
                await self._restore(tx.render(tx.incremental(plan)))
        except RestoreRefused as error:
            ruleset.undo(plan)
            self._ruleset = None
            _log.warning("transaction refused", family=int(self.family), rows=len(rows), error=str(error))
            return None
        except KernelError as error:
            ruleset.undo(plan)
            self._ruleset = None
            raise ProgrammingError(f"IPv{int(self.family)}: {error}") from error
        await self._sets.destroy(plan.old_sets)
        return refused

    async def audit(self) -> bool:
        """True where the kernel's rules differ from what was programmed. Reads the rules only if some tables changed."""
        ruleset = self._ruleset
        if ruleset is None:
            return False
        stamp = await self._xtables.stamp()
        if stamp == self._stamp:
            return False
        kernel = await self._read()
        if any(tx.full(ruleset.chains(), jumps(self.family, self._config), kernel).values()):
            self._ruleset = None
            return True
        self._stamp = stamp
        return False

    async def cleanup(self) -> None:
        """Remove chains, jumps and sets of ours."""
        self._ruleset = None
        try:
            kernel = await self._read()
            text = tx.render(tx.cleanup(jumps(self.family, self._config), kernel))
            if text:
                await self._restore(text)
            await self._sets.keep_only(())
        except KernelError as error:
            raise ProgrammingError(f"IPv{int(self.family)}: {error}") from error

    async def _commit_full(
        self, rows: Mapping[ServicePortKey, ServicePort], health_ports: frozenset[int], kernel: Mapping[str, TableSnapshot]
    ) -> dict[ServicePortKey, str]:
        ruleset = Ruleset(self.family, self._config, self._random_fully)
        plan = ruleset.change(rows)
        self._health_ports = frozenset()
        self._change_health_ports(ruleset, plan, health_ports)
        refused = await self._sets.create(plan.new_sets)
        try:
            if refused:
                ruleset.change(dict.fromkeys(refused))
                await self._restore_full(ruleset.chains(), kernel)
            else:
                frame = ruleset.frame()
                await self._restore_full({table: frame[table] | plan.tables[table].chains for table in TABLES}, kernel)
        except RestoreRefused as error:
            found = await self._find_refused(ruleset, error)
            if not found:
                raise
            refused |= found
            ruleset.change(dict.fromkeys(found))
            await self._restore_full(ruleset.chains(), await self._read())
        self._ruleset = ruleset
        await self._sets.keep_only(item.name for item in ruleset.sets())
        return refused

    async def _restore_full(self, wanted: tx.Chains, kernel: Mapping[str, TableSnapshot]) -> None:
        text = tx.render(tx.full(wanted, jumps(self.family, self._config), kernel))
        if text:
            await self._restore(text)
        else:
            self._stamp = await self._xtables.stamp()

    async def _find_refused(self, ruleset: Ruleset, error: RestoreRefused) -> dict[ServicePortKey, str]:
        """Which rows the kernel refuses: the one that the error names, and by bisection those it does not name."""
        named = _HASH_IN_CHAIN.search(f"{error.chain or ''} {error}")
        suspect = ruleset.row_by_hash(named.group(1)) if named else None
        found: dict[ServicePortKey, str] = {}
        if suspect is not None:
            found |= await self._probe(ruleset, [suspect])
        rest = [key for key in ruleset.rows if key not in found]
        found |= await self._probe(ruleset, rest)
        try:
            await self._xtables.restore(f"*nat\n:{_PROBE} - [0:0]\n-X {_PROBE}\nCOMMIT\n")
        except RestoreRefused:
            _log.debug("scratch chain stays until the next full pass", chain=_PROBE)
        return found

    async def _probe(self, ruleset: Ruleset, keys: list[ServicePortKey]) -> dict[ServicePortKey, str]:
        """Load the chains of rows without anything that leads to them; halve until the refused ones are alone."""
        if not keys:
            return {}
        lines: list[str] = []
        chains: list[str] = [_PROBE]
        for key in keys:
            rules = ruleset.translate(ruleset.rows[key])
            chains += rules.chains
            lines += [f"-A {name} {rule}" for name, chain in rules.chains.items() for rule in chain]
            lines += [f"-A {_PROBE} -p {key.protocol} -m {key.protocol} --dport 1 {leaf.target}" for _, leaf in rules.nat]
        text = "\n".join(["*nat", *(f":{name} - [0:0]" for name in chains), *lines, "COMMIT", ""])
        try:
            await self._xtables.restore(text)
        except RestoreRefused as error:
            if len(keys) == 1:
                return {keys[0]: str(error)}
            middle = len(keys) // 2
            return await self._probe(ruleset, keys[:middle]) | await self._probe(ruleset, keys[middle:])
        return {}

    async def _restore(self, text: str) -> None:
        undisturbed = (await self._xtables.stamp()) == self._stamp
        await self._xtables.restore(text)
        # Where somebody else changed the tables since our last look, the next audit must read them.
        self._stamp = await self._xtables.stamp() if undisturbed or self._ruleset is None else None

    async def _read(self) -> dict[str, TableSnapshot]:
        return {table: parse_save(await self._xtables.save(table), table) for table in TABLES}

    def _new_sets(self, ruleset: Ruleset, rows: Rows) -> list[AffinitySet]:
        return [
            item
            for key, row in rows.items()
            if row is not None and row.affinity_seconds is not None and ruleset.rows.get(key) != row
            for item in ruleset.translate(row).sets
        ]

    def _change_health_ports(self, ruleset: Ruleset, plan: Plan, ports: frozenset[int]) -> None:
        changes = dict.fromkeys(ports - self._health_ports, True) | dict.fromkeys(self._health_ports - ports, False)
        ruleset.change_health_ports(changes, plan)
        self._health_ports = ports
