"""Owns the tables of the packet filter as text of iptables-save: an index of chains, whose rules are read when asked for.

A node has tens of thousands of rules, and a packet passes some tens of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from nodeproxy.trace.rule_text import Rule, RuleTextError, chain_of, open_quote, parse_rule

BUILT_IN: Final = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
_CHAIN_LINE: Final = re.compile(r":(\S+) (\S+)")


class SavedTablesError(ValueError):
    """The text is not what iptables-save prints. The message names the line."""


class Chain:
    """A chain: its rules as lines, and for a built-in one what becomes of a packet at its end (ACCEPT or DROP)."""

    def __init__(self, name: str, policy: str | None) -> None:
        self.name = name
        self.policy = policy
        self.lines: list[str] = []
        self._rules: list[Rule | RuleTextError] | None = None

    def rules(self) -> list[Rule | RuleTextError]:
        """The rules in order; for one that cannot be read, why."""
        if self._rules is None:
            self._rules = [_rule(line, number) for number, line in enumerate(self.lines, 1)]
        return self._rules


def _rule(line: str, number: int) -> Rule | RuleTextError:
    try:
        return parse_rule(line, number)
    except RuleTextError as error:
        return error


class SavedTables:
    """The tables of one IP family."""

    def __init__(self, tables: Mapping[str, Mapping[str, Chain]]) -> None:
        self._tables = tables

    def chain(self, table: str, name: str) -> Chain | None:
        """A chain, None where the table has none of that name."""
        return self._tables.get(table, {}).get(name)

    def tables(self) -> Iterator[str]:
        """Names of the tables that are there."""
        return iter(self._tables)

    def rule_count(self) -> int:
        """How many rules there are, all in all."""
        return sum(len(chain.lines) for chains in self._tables.values() for chain in chains.values())


def parse_tables(text: str) -> SavedTables:
    """Index what iptables-save printed, one or several tables. Raises SavedTablesError."""
    tables: dict[str, dict[str, Chain]] = {}
    chains: dict[str, Chain] | None = None
    for number, line in _logical_lines(text):
        if not line or line.startswith("#") or line == "COMMIT":
            continue
        if line.startswith("*"):
            chains = tables.setdefault(line[1:].strip(), {})
            continue
        if chains is None:
            raise SavedTablesError(f"line {number} comes before any table (iptables-save prints *TABLE first)")
        if line.startswith(":"):
            match = _CHAIN_LINE.match(line)
            if match is None:
                raise SavedTablesError(f"line {number} is no chain: {line[:80]!r}")
            chains[match[1]] = Chain(match[1], None if match[2] == "-" else match[2])
            continue
        name = chain_of(line)
        if name is None:
            raise SavedTablesError(f"line {number} is neither a table, nor a chain, nor a rule: {line[:80]!r}")
        chains.setdefault(name, Chain(name, None)).lines.append(line)
    return SavedTables(tables)


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers. A quoted text may hold line ends: such lines are joined."""
    pending = ""
    first = 0
    for number, line in enumerate(text.split("\n"), 1):
        if not pending and '"' not in line:
            yield number, line
            continue
        first = first if pending else number
        pending = f"{pending}\n{line}" if pending else line
        if not open_quote(pending):
            yield first, pending
            pending = ""
    if pending:
        raise SavedTablesError(f"line {first}: a quote is not closed")
