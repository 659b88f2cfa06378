"""Owns reading iptables-save: the chains of tables with their rules, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from msgspec import Struct


class TableSnapshot(Struct, frozen=True):
    """A table as the kernel has it: rules (without `-A CHAIN`) of every chain, and which chains are built in."""

    chains: Mapping[str, Sequence[str]]
    built_in: Set[str]


def parse_tables(text: str) -> dict[str, TableSnapshot]:
    """Parse the output of `iptables-save`: every table in it."""
    tables: dict[str, TableSnapshot] = {}
    chains: dict[str, list[str]] = {}
    built_in: set[str] = set()
    for line in text.splitlines():
        if line.startswith("-A "):
            _, chain, rule = line.split(" ", 2)
            chains[chain].append(rule)
        elif line.startswith(":"):
            name, policy, _ = line[1:].split(" ", 2)
            chains[name] = []
            if policy != "-":
                built_in.add(name)
        elif line.startswith("*"):
            chains, built_in = {}, set()
            tables[line[1:]] = TableSnapshot(chains, built_in)
    return tables


def parse_save(text: str, table: str) -> TableSnapshot:
    """One table of what `iptables-save` prints; an absent one is empty."""
    return parse_tables(text).get(table, TableSnapshot({}, frozenset()))
