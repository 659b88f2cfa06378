"""Owns the vocabulary of rules: chains by table, a change of them, and the jumps that lead to them.

Rules are text as iptables-save prints them, without `-A CHAIN`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from msgspec import Struct, field

Chains = Mapping[str, Mapping[str, list[str]]]
"""Rules of every chain, by table."""


class Jump(NamedTuple):
    """A rule that must be in a chain that is not ours: first in it (`prepend`), or anywhere."""

    table: str
    chain: str
    rule: str
    prepend: bool


class TableChange(Struct):
    """New content of chains (all of it), and chains to remove, in one table."""

    chains: dict[str, list[str]] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.chains or self.removed)
