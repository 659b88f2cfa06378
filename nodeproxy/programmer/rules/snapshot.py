"""Owns reading iptables-save: the chains of one table with their rules, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct


class TableSnapshot(Struct, frozen=True):
    """A table as the kernel has it: rules (without `-A CHAIN`) of every chain, and which chains are built in."""

    chains: Mapping[str, Sequence[str]]
    built_in: frozenset[str]


def parse_save(text: str, table: str) -> TableSnapshot:
    """Parse the output of `iptables-save -t TABLE`. Other tables in the text are passed over; an absent one is empty."""
    chains: dict[str, list[str]] = {}
    built_in: set[str] = set()
    inside = False
    for line in text.splitlines():
        if line.startswith("*"):
            inside = line == f"*{table}"
        elif not inside:
            continue
        elif line.startswith("-A "):
            _, chain, rule = line.split(" ", 2)
            chains[chain].append(rule)
        elif line.startswith(":"):
            name, policy, _ = line[1:].split(" ", 2)
            chains[name] = []
            if policy != "-":
                built_in.add(name)
    return TableSnapshot(chains, frozenset(built_in))
