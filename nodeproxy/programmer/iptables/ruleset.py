"""Owns the wanted rules of one family: rows that are (to be) programmed, the dispatch trees over them, and plans.

A plan says which chains have new content and which go, in proportion to the rows that change; it can be undone when the
kernel refuses it. Nothing here touches the kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

from msgspec import Struct, field

from nodeproxy.forwarding.table import Family, FrontendKind, IPProtocol, ServicePort, ServicePortKey
from nodeproxy.programmer.base import ProgrammerConfig
from nodeproxy.programmer.iptables.base_chains import NODE_PORT_CHAIN, fixed_chains, node_port_entry
from nodeproxy.programmer.iptables.dispatch import AddressSpace, DispatchTree, Leaf, PortSpace
from nodeproxy.programmer.iptables.draining import masquerade_service_addresses
from nodeproxy.programmer.iptables.service_rules import AffinitySet, ServiceRules, Translator
from nodeproxy.programmer.rules.chains import TableChange
from nodeproxy.programmer.rules.common import Features
from nodeproxy.programmer.rules.names import (
    HEALTH_PORT_TREE,
    MARK_MASQ,
    NODE_PORTS,
    SERVICES,
    TREE,
    service_hash,
)

TABLES = ("nat", "filter")
_MAX_EXAMPLES = 200


class Plan(Struct):
    """What a change of rows means for the kernel, and how to take it back."""

    tables: dict[str, TableChange] = field(default_factory=lambda: {table: TableChange() for table in TABLES})
    new_sets: list[AffinitySet] = field(default_factory=list)
    old_sets: list[str] = field(default_factory=list)
    rows_before: dict[ServicePortKey, ServicePort | None] = field(default_factory=dict)
    leaves_before: list[tuple[DispatchTree, dict[int, Leaf | None]]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(self.tables.values())


class Ruleset:
    """All wanted chains of one family."""

    def __init__(self, family: Family, config: ProgrammerConfig, features: Features) -> None:
        self.rows: dict[ServicePortKey, ServicePort] = {}
        self._with_affinity = 0
        self._translator = Translator(family, config.local_detector, hairpin_chains=not features.bpf)
        self._addresses = AddressSpace(family, TREE)
        self._ports = PortSpace(TREE)
        self._health_ports = PortSpace(HEALTH_PORT_TREE)
        self._fixed = fixed_chains(family, config, features)
        self._address_trees = {table: DispatchTree(SERVICES, self._addresses) for table in TABLES}
        self._port_trees = {table: DispatchTree(NODE_PORT_CHAIN[table], self._ports) for table in TABLES}
        self._health_tree = DispatchTree(NODE_PORTS, self._health_ports)
        entries = config.node_port_addresses[family]
        self._entry = {table: node_port_entry(family, entries, NODE_PORT_CHAIN[table]) for table in TABLES}
        self._first = {"nat": [masquerade_service_addresses(family)] if config.draining_addresses else [], "filter": []}

    def translate(self, row: ServicePort) -> ServiceRules:
        """Rules of one row."""
        return self._translator.translate(row)

    def chains(self) -> dict[str, dict[str, list[str]]]:
        """Every wanted chain with its rules, by table. Translates all rows: for full passes and audits only."""
        chains = self.frame()
        chains["nat"].update(self.service_chains())
        return chains

    def service_chains(self) -> dict[str, list[str]]:
        """The chains of all rows, which are in the nat table."""
        return {name: rules for row in self.rows.values() for name, rules in self.translate(row).chains.items()}

    def examples(self, table: str) -> Iterator[tuple[str, list[str]]]:
        """Wanted chains of a table, some of every kind, without work for all."""
        if table == "nat":
            for row in islice(self.rows.values(), _MAX_EXAMPLES):
                yield from self.translate(row).chains.items()
        for tree in self._trees(table):
            for name, rules in islice(tree.chains(), _MAX_EXAMPLES):
                yield name, self._complete(table, name, rules)

    def shared_chains(self) -> dict[str, list[str]]:
        """Chains of the nat table that the chains of rows jump to."""
        return {MARK_MASQ: self._fixed["nat"][MARK_MASQ]}

    def frame(self) -> dict[str, dict[str, list[str]]]:
        """The wanted chains that belong to no row: fixed ones, and the dispatch trees. By table."""
        return {
            table: {
                **self._fixed[table],
                **{name: self._complete(table, name, rules) for tree in self._trees(table) for name, rules in tree.chains()},
            }
            for table in TABLES
        }

    def sets(self) -> Iterator[AffinitySet]:
        """Every wanted set."""
        for row in self.rows.values():
            if row.affinity_seconds is not None:
                yield from self.translate(row).sets

    def row_by_hash(self, name_hash: str) -> ServicePortKey | None:
        """The row whose chains carry this hash. Walks all rows: for error reports only."""
        return next((key for key in self.rows if service_hash(key) == name_hash), None)

    def change(self, rows: Mapping[ServicePortKey, ServicePort | None]) -> Plan:
        """Set rows (None removes)."""
        plan = Plan()
        leaves: dict[int, tuple[DispatchTree, dict[int, Leaf | None]]] = {
            id(tree): (tree, {}) for table in TABLES for tree in (self._address_trees[table], self._port_trees[table])
        }
        translated = []
        for key, after in rows.items():
            before = self.rows.get(key)
            plan.rows_before[key] = before
            translated.append((self.translate(before) if before else None, self.translate(after) if after else None))
        for old, _ in translated:
            for tree, position, leaf in self._leaves(old):
                if tree.get(position) == leaf:
                    leaves[id(tree)][1][position] = None
        for old, new in translated:
            for tree, position, leaf in self._leaves(new):
                leaves[id(tree)][1][position] = leaf
            self._change_chains(plan, old, new)
        for key, after in rows.items():
            self._set_row(key, after)
        for table in TABLES:
            for tree in (self._address_trees[table], self._port_trees[table]):
                self._change_tree(plan, table, tree, leaves[id(tree)][1])
        return plan

    def change_health_ports(self, ports: Mapping[int, bool], plan: Plan) -> None:
        """Accept (True) or stop accepting (False) health-check node ports, as part of a plan."""
        leaf = Leaf("kubernetes health check node port", "-j ACCEPT")
        changes = {self._health_ports.key(IPProtocol.TCP, port): leaf if on else None for port, on in ports.items()}
        self._change_tree(plan, "filter", self._health_tree, changes)

    def undo(self, plan: Plan) -> None:
        """Take a plan back that the kernel refused."""
        for tree, leaves in reversed(plan.leaves_before):
            tree.update(leaves)
        for key, before in plan.rows_before.items():
            self._set_row(key, before)

    @property
    def has_affinity(self) -> bool:
        """Whether any row has session affinity."""
        return self._with_affinity > 0

    def _set_row(self, key: ServicePortKey, row: ServicePort | None) -> None:
        before = self.rows.pop(key, None)
        self._with_affinity -= before is not None and before.affinity_seconds is not None
        if row is not None:
            self.rows[key] = row
            self._with_affinity += row.affinity_seconds is not None

    def _trees(self, table: str) -> Iterable[DispatchTree]:
        yield self._address_trees[table]
        yield self._port_trees[table]
        if table == "filter":
            yield self._health_tree

    def _complete(self, table: str, chain: str, rules: list[str]) -> list[str]:
        return [*self._first[table], *rules, *self._entry[table]] if chain == SERVICES else rules

    def _leaves(self, rules: ServiceRules | None) -> Iterator[tuple[DispatchTree, int, Leaf]]:
        """Where the leaves of a row go."""
        if rules is None:
            return
        protocol = rules.protocol
        for table, entries in (("nat", rules.nat), ("filter", rules.filter)):
            for frontend, leaf in entries:
                if frontend.kind is FrontendKind.NODE_PORT:
                    yield self._port_trees[table], self._ports.key(protocol, frontend.port), leaf
                else:
                    assert frontend.address is not None
                    yield self._address_trees[table], self._addresses.key(frontend.address, protocol, frontend.port), leaf

    @staticmethod
    def _change_chains(plan: Plan, old: ServiceRules | None, new: ServiceRules | None) -> None:
        old_chains = old.chains if old else {}
        new_chains = new.chains if new else {}
        nat = plan.tables["nat"]
        nat.chains.update({name: rules for name, rules in new_chains.items() if old_chains.get(name) != rules})
        nat.removed.update(name for name in old_chains if name not in new_chains)
        old_sets = {item.name for item in old.sets} if old else set()
        new_sets = {item.name: item for item in new.sets} if new else {}
        plan.new_sets += [item for name, item in new_sets.items() if name not in old_sets]
        plan.old_sets += [name for name in old_sets if name not in new_sets]

    def _change_tree(self, plan: Plan, table: str, tree: DispatchTree, leaves: Mapping[int, Leaf | None]) -> None:
        if not leaves:
            return
        plan.leaves_before.append((tree, {key: tree.get(key) for key in leaves}))
        change = tree.update(leaves)
        into = plan.tables[table]
        into.chains.update({name: self._complete(table, name, rules) for name, rules in change.changed.items()})
        into.removed |= change.removed
