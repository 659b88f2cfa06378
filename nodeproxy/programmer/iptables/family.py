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
from nodeproxy.kernel.errors import KernelError, RestoreRefused, ToolFailed
from nodeproxy.kernel.xtables import XTables
from nodeproxy.kernel.xtables_tools import Variant
from nodeproxy.programmer.base import ProgrammerConfig, ProgrammingError
from nodeproxy.programmer.iptables.affinity import AffinitySets
from nodeproxy.programmer.iptables.base_chains import hairpin_rule, jumps
from nodeproxy.programmer.iptables.ruleset import TABLES, Plan, Ruleset
from nodeproxy.programmer.rules import transaction as tx
from nodeproxy.programmer.rules.chains import Chains, TableChange
from nodeproxy.programmer.rules.common import Features
from nodeproxy.programmer.rules.counting import RuleCounter
from nodeproxy.programmer.rules.kernel_tables import KernelTables
from nodeproxy.programmer.rules.snapshot import TableSnapshot

_log = structlog.get_logger(__name__)

_HASH_IN_CHAIN = re.compile(r"KUBE-(?:SVC|SVL|EXT|FW)-([A-Z2-7]{16})")
_PROBE = "KUBE-PROXY-CANARY"
_OF_OTHER_MODES = ("mangle",)
# A tool that fails with words that no driver knows may have been refused just as well: the search for the row tells.
_REFUSALS = (RestoreRefused, ToolFailed)

_ALL_FEATURES = Features()

Rows = Mapping[ServicePortKey, ServicePort | None]


class FamilyProgrammer:
    """Programs the rows of one family. One call at a time."""

    def __init__(
        self,
        family: Family,
        config: ProgrammerConfig,
        tables: KernelTables,
        sets: AffinitySets,
        features: Features = _ALL_FEATURES,
    ) -> None:
        self.family = family
        self._config = config
        self._tables = tables
        self._sets = sets
        self._features = features
        self._ruleset: Ruleset | None = None
        self._previous: dict[ServicePortKey, ServicePort] = {}
        self._health_ports: frozenset[int] = frozenset()
        self.counter = RuleCounter()

    @classmethod
    async def open(cls, family: Family, config: ProgrammerConfig, variant: Variant, sets: AffinitySets) -> Self:
        """Find the tools, and what they and the kernel can do. Raises `ProgrammingError` where this family cannot be had."""
        try:
            tables = KernelTables(XTables(variant, family.value), TABLES, _OF_OTHER_MODES)
            features = await tables.probe(hairpin_rule(family))
            if not features.bpf:
                _log.info("no BPF matches here: a chain for each endpoint recognises hairpin traffic", family=int(family))
            return cls(family, config, tables, sets, features)
        except KernelError as error:
            raise ProgrammingError(f"IPv{int(family)}: {error}") from error

    def configure(self, config: ProgrammerConfig) -> None:
        """Take a new configuration; the next apply is a full pass."""
        self._config = config
        self._forget()

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
        self._forget()
        try:
            kernel = await self._tables.read()
            early = {key: rows[key] for key in first}
            if early and len(rows) > len(early) and not tx.serves(kernel["nat"]):
                await self._commit_full(early, health_ports, kernel)
                kernel = await self._tables.read()
            return await self._commit_full(rows, health_ports, kernel)
        except KernelError as error:
            raise ProgrammingError(f"IPv{int(self.family)}: {error}") from error

    async def change(self, rows: Rows, health_ports: frozenset[int]) -> dict[ServicePortKey, str] | None:
        """Program changed rows on top of what is there. None where the kernel refused: a full pass must follow."""
        ruleset = self._ruleset
        if ruleset is None:
            return None
        plan = ruleset.change(rows)
        refused = await self._sets.create(plan.new_sets)
        if refused:
            ruleset.undo(plan)
            plan = ruleset.change({key: row for key, row in rows.items() if key not in refused})
        self._change_health_ports(ruleset, plan, health_ports)
        try:
            if plan:
                await self._tables.change(plan.tables, ruleset.examples)
        except _REFUSALS as error:
            ruleset.undo(plan)
            self._forget()
            _log.warning("transaction refused", family=int(self.family), rows=len(rows), error=str(error))
            return None
        except KernelError as error:
            ruleset.undo(plan)
            self._forget()
            raise ProgrammingError(f"IPv{int(self.family)}: {error}") from error
        self.counter.change(plan.tables)
        await self._sets.destroy(plan.old_sets)
        return refused

    async def audit(self, whole: bool = False) -> bool:
        """True where the kernel's rules differ from what was programmed. Reads them if some tables changed, or `whole`."""
        ruleset = self._ruleset
        if ruleset is None:
            return False
        if ruleset.has_affinity:
            await self._sets.grow()
        kernel = await self._tables.look(whole)
        if kernel is None:
            return False
        differs = any(tx.full(ruleset.chains(), jumps(self.family, self._config), kernel).values())
        if differs:
            self._forget()
        else:
            self._tables.confirm()
        return differs

    async def cleanup(self) -> None:
        """Remove chains, jumps and sets of ours."""
        self._ruleset = None
        try:
            kernel = await self._tables.read()
            text = tx.render(tx.cleanup(jumps(self.family, self._config), kernel))
            if text:
                await self._tables.restore(text, after_read=True)
            await self._sets.keep_only(())
        except KernelError as error:
            raise ProgrammingError(f"IPv{int(self.family)}: {error}") from error

    def _forget(self) -> None:
        """The kernel may not hold what the ruleset says: a full pass is next. Keep the rows, should new ones be refused."""
        if self._ruleset is not None:
            self._previous = dict(self._ruleset.rows)
            self._ruleset = None

    async def _commit_full(
        self, rows: Mapping[ServicePortKey, ServicePort], health_ports: frozenset[int], kernel: Mapping[str, TableSnapshot]
    ) -> dict[ServicePortKey, str]:
        ruleset = Ruleset(self.family, self._config, self._features)
        plan = ruleset.change(rows)
        self._health_ports = frozenset()
        self._change_health_ports(ruleset, plan, health_ports)
        refused = await self._sets.create(plan.new_sets)
        if refused:
            ruleset = self._without(rows, refused, health_ports)
        try:
            frame = ruleset.frame()
            services = ruleset.service_chains() if refused else plan.tables["nat"].chains
            await self._restore_full({**frame, "nat": services | frame["nat"]}, kernel)
        except _REFUSALS as error:
            found = await self._find_refused(ruleset, error)
            if not found:
                raise
            refused |= found
            ruleset = self._without(rows, refused, health_ports)
            await self._restore_full(ruleset.chains(), await self._tables.read())
        self._ruleset = ruleset
        self._previous = {}
        await self._sets.keep_only(item.name for item in ruleset.sets())
        return refused

    def _without(
        self, rows: Mapping[ServicePortKey, ServicePort], refused: Iterable[ServicePortKey], health_ports: frozenset[int]
    ) -> Ruleset:
        """The ruleset of all rows but the refused ones; of those, what was programmed of them before stays in force."""
        out = set(refused)
        ruleset = Ruleset(self.family, self._config, self._features)
        ruleset.change({key: self._previous[key] for key in out if key in self._previous})
        plan = ruleset.change({key: row for key, row in rows.items() if key not in out})
        self._health_ports = frozenset()
        self._change_health_ports(ruleset, plan, health_ports)
        return ruleset

    async def _restore_full(self, wanted: Chains, kernel: Mapping[str, TableSnapshot]) -> None:
        transaction = tx.full(wanted, jumps(self.family, self._config), kernel)
        if text := tx.render(transaction):
            await self._tables.restore(text, after_read=True)
        else:
            self._tables.confirm()
        self.counter.all(wanted, {table: part.change for table, part in transaction.items()})

    async def _find_refused(self, ruleset: Ruleset, error: RestoreRefused | ToolFailed) -> dict[ServicePortKey, str]:
        """Which rows the kernel refuses: the one that the error names, and by bisection those it does not name."""
        await self._tables.xtables.restore(tx.render({"nat": tx.TableTransaction(TableChange(ruleset.shared_chains()))}))
        named = _HASH_IN_CHAIN.search(str(error))
        suspect = ruleset.row_by_hash(named.group(1)) if named else None
        found = await self._probe(ruleset, [suspect]) if suspect is not None else {}
        return found | await self._probe(ruleset, [key for key in ruleset.rows if key not in found])

    async def _probe(self, ruleset: Ruleset, keys: list[ServicePortKey]) -> dict[ServicePortKey, str]:
        """Load the chains of rows without anything that leads to them; halve until the refused ones are alone.

        What this leaves behind is mended by the full pass that follows.
        """
        if not keys:
            return {}
        nat, scratch = TableChange(), TableChange({_PROBE: []})
        for key in keys:
            rules = ruleset.translate(ruleset.rows[key])
            nat.chains |= rules.chains
            match = f"-p {key.protocol} -m {key.protocol} --dport 1"
            nat.chains.setdefault(_PROBE, []).extend(f"{match} {leaf.target}" for _, leaf in rules.nat)
            scratch.chains[_PROBE] += [f"{match} {leaf.target}" for _, leaf in rules.filter]
        try:
            await self._tables.xtables.restore(
                tx.render({"nat": tx.TableTransaction(nat), "filter": tx.TableTransaction(scratch)})
            )
        except _REFUSALS as error:
            if len(keys) == 1:
                return {keys[0]: str(error)}
            middle = len(keys) // 2
            return await self._probe(ruleset, keys[:middle]) | await self._probe(ruleset, keys[middle:])
        return {}

    def _change_health_ports(self, ruleset: Ruleset, plan: Plan, ports: frozenset[int]) -> None:
        changes = dict.fromkeys(ports - self._health_ports, True) | dict.fromkeys(self._health_ports - ports, False)
        ruleset.change_health_ports(changes, plan)
        self._health_ports = ports
