"""Owns how many rules are in force, by table: kept up with each change, for metrics."""

from __future__ import annotations

from collections.abc import Mapping

from nodeproxy.programmer.base import RuleCount
from nodeproxy.programmer.rules.chains import Chains, TableChange


class RuleCounter:
    """Counts the rules of one family."""

    def __init__(self) -> None:
        self.counts: Mapping[str, RuleCount] = {}
        self._lengths: dict[str, dict[str, int]] = {}

    def all(self, chains: Chains, written: Mapping[str, TableChange]) -> None:
        """These chains are in force, and `written` was changed for that."""
        self._lengths = {table: {name: len(rules) for name, rules in content.items()} for table, content in chains.items()}
        self.counts = {
            table: RuleCount(sum(lengths.values()), _rules(written.get(table))) for table, lengths in self._lengths.items()
        }

    def change(self, written: Mapping[str, TableChange]) -> None:
        """Chains were changed. In proportion to the change."""
        counts = {table: RuleCount(count.in_force, 0) for table, count in self.counts.items()}
        for table, change in written.items():
            lengths = self._lengths.setdefault(table, {})
            total = counts[table].in_force if table in counts else 0
            for name in change.removed:
                total -= lengths.pop(name, 0)
            for name, rules in change.chains.items():
                total += len(rules) - lengths.get(name, 0)
                lengths[name] = len(rules)
            counts[table] = RuleCount(total, _rules(change))
        self.counts = counts


def _rules(change: TableChange | None) -> int:
    return sum(len(rules) for rules in change.chains.values()) if change is not None else 0
