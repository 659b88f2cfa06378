"""Owns the forwarding table and keeps it up to date: recomputes the Services that changed, and says which rows differ.

What it holds after any sequence of changes equals what a new tracker would compute from the last state alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from nodeproxy.cluster.checked import CheckedService
from nodeproxy.cluster.state import ClusterChanges, ClusterState
from nodeproxy.forwarding.claims import Claimed, ClaimIndex, claims_of
from nodeproxy.forwarding.node import NodeFacts
from nodeproxy.forwarding.services import build_rows, health_check
from nodeproxy.forwarding.table import (
    Delta,
    ForwardingTable,
    HealthCheck,
    Problem,
    RowChange,
    ServiceName,
    ServicePort,
    ServicePortKey,
)


class ForwardingTracker:
    """Turns changes of the cluster state into deltas of the forwarding table.

    `facts` is what the agent knows of the node itself. Zone and addresses come from the Node object once there is one. The
    agent may replace `facts`; the next `update` takes that into account.
    """

    def __init__(self, facts: NodeFacts) -> None:
        self.facts = facts
        self.table = ForwardingTable(rows={}, health_checks={})
        self._in_force: NodeFacts | None = None
        self._index = ClaimIndex()
        self._claims: dict[ServiceName, tuple[CheckedService, tuple[Claimed, ...], tuple[Problem, ...]]] = {}
        self._keys: dict[ServiceName, tuple[ServicePortKey, ...]] = {}
        self._problems: dict[ServiceName, tuple[Problem, ...]] = {}

    @property
    def problems(self) -> Mapping[ServiceName, tuple[Problem, ...]]:
        """All present problems, by Service."""
        return MappingProxyType(self._problems)

    @property
    def facts_in_force(self) -> NodeFacts:
        """The facts that the table was computed with, or that the first table will be."""
        return self._in_force or self.facts

    def update(self, state: ClusterState, changes: ClusterChanges) -> Delta:
        """Bring the table up to date with `state`, of which `changes` are new since the last call."""
        facts = self.facts.with_node(state.node)
        dirty: set[ServiceName] = set(changes.services)
        reclaim = False
        if facts != self._in_force:
            # Almost everything may depend on these facts, they hardly ever change, and only rows that differ get out.
            reclaim = self._in_force is not None and self._in_force.families != facts.families
            dirty.update(state.services, self._claims)
        self._in_force = facts
        for name in dirty:
            self._claim(name, state.services.get(name), facts, force=reclaim)
        dirty |= self._index.settle()
        return self._rebuild(sorted(dirty), state, facts)

    def _claim(self, name: ServiceName, service: CheckedService | None, facts: NodeFacts, *, force: bool) -> None:
        """Bring the index up to date with what one Service claims. Nothing to do where only its endpoints changed."""
        old = self._claims.get(name)
        if old is not None:
            if old[0] is service and not force:
                return
            self._index.remove(old[0], old[1])
            del self._claims[name]
        if service is not None:
            claims, problems = claims_of(service, facts.families)
            self._index.add(service, claims)
            self._claims[name] = (service, claims, problems)

    def _rebuild(self, names: Iterable[ServiceName], state: ClusterState, facts: NodeFacts) -> Delta:
        rows: dict[ServicePortKey, RowChange] = {}
        checks: dict[ServiceName, HealthCheck | None] = {}
        problems: list[Problem] = []
        for name in names:
            new_rows: list[ServicePort] = []
            check: HealthCheck | None = None
            found: tuple[Problem, ...] = ()
            entry = self._claims.get(name)
            if entry is not None:
                service, slices = entry[0], state.slices(name)
                won, quarrels = self._won(name, entry[1])
                new_rows = build_rows(service, slices, won, facts)
                check = health_check(service, slices, facts)
                of_slices = [problem for slice_name in sorted(slices) for problem in slices[slice_name].problems]
                found = tuple(dict.fromkeys((*service.problems, *entry[2], *quarrels, *of_slices)))
            self._put_rows(name, new_rows, rows)
            self._put_check(name, check, checks)
            problems += self._put_problems(name, found)
        return Delta(rows=rows, health_checks=checks, problems=tuple(problems))

    def _won(self, name: ServiceName, claims: tuple[Claimed, ...]) -> tuple[tuple[Claimed, ...], list[Problem]]:
        """The claims that the Service gets, and for the others who has them."""
        lost = [(claimed, winner) for claimed in claims if (winner := self._index.winner(claimed.claim)) != name]
        if not lost:
            return claims, []
        without = {claimed.claim for claimed, _ in lost}
        quarrels = [Problem(name, claimed.field, f"{claimed.claim} belongs to Service {winner}") for claimed, winner in lost]
        return tuple(claimed for claimed in claims if claimed.claim not in without), quarrels

    def _put_rows(self, name: ServiceName, new: list[ServicePort], changes: dict[ServicePortKey, RowChange]) -> None:
        table = self.table.rows
        keys = tuple([row.key for row in new])
        old_keys = self._keys.get(name, ())
        if old_keys != keys:
            for key in set(old_keys).difference(keys):
                changes[key] = RowChange(table.pop(key), None)
        for row in new:
            before = table.get(row.key)
            if before != row:
                table[row.key] = row
                changes[row.key] = RowChange(before, row)
        if keys:
            self._keys[name] = keys
        else:
            self._keys.pop(name, None)

    def _put_check(self, name: ServiceName, new: HealthCheck | None, changes: dict[ServiceName, HealthCheck | None]) -> None:
        checks = self.table.health_checks
        if checks.get(name) == new:
            return
        changes[name] = new
        if new is None:
            del checks[name]
        else:
            checks[name] = new

    def _put_problems(self, name: ServiceName, new: tuple[Problem, ...]) -> list[Problem]:
        """Replace the problems of a Service, and tell those that it did not have before."""
        old = frozenset(self._problems.pop(name, ()))
        if new:
            self._problems[name] = new
        return [problem for problem in new if problem not in old]
