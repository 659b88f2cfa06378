"""Owns the ipsets of one family in IPVS mode: making them, and making their entries match what is wanted.

Blocking: call in a thread. Methods raise `KernelError`.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

from nodeproxy.forwarding.table import Family
from nodeproxy.kernel.errors import ItemRefused
from nodeproxy.kernel.ipset import IPSets, SetSpec
from nodeproxy.programmer.ipvs.names import SET_TYPES, SetName
from nodeproxy.programmer.ipvs.wanted import Entries

# kube-proxy's IPVS mode makes its sets with this limit, and fails where one of the same name has another.
_USUAL_LIMIT, _LARGE_LIMIT = 65536, 1 << 20
_HASH_FULL = 4352  # IPSET_ERR_HASH_FULL, include/uapi/linux/netfilter/ipset/ip_set_hash.h
_SPARE = "NEW"
_REST_PER_LOOK = 100  # times as long as reading sets took: at most 1% of a core
_LOOK_SECONDS = 0.01  # after so long the other sets are for the next time

# Entries are added in this order and removed in the opposite one, so that a fence never stands without its gate.
_ORDER = (
    SetName.ALLOWED_SOURCES,
    SetName.FIREWALLED,
    *(name for name in SetName if name not in (SetName.ALLOWED_SOURCES, SetName.FIREWALLED)),
)


class ServiceSets:
    """All sets of one family."""

    def __init__(self, family: Family, ipsets: IPSets) -> None:
        self._family = family
        self._ipsets = ipsets
        self._entries: Entries = {}
        self._to_compare: list[SetName] = []
        self._compare_at = 0.0

    def entries(self, name: SetName) -> set[str]:
        """What a set is believed to hold."""
        return self._entries[name]

    def read(self) -> None:
        """Make the sets that are not there, and read what the others hold."""
        specs = {name.of(self._family): self._spec(name) for name in SetName}
        for refused in self._ipsets.create(specs.values()):
            if refused.errno != errno.EEXIST:
                raise refused
            spec = specs[str(refused.item)]
            if self._ipsets.create([replace(spec, max_elements=_LARGE_LIMIT)]):  # it was not made larger by us
                self._replace(spec)
        self._entries = {name: self._contents(name) for name in SetName}

    def add(self, added: Mapping[SetName, Iterable[str]]) -> list[tuple[str, str]]:
        """Add entries; returns those refused, each with the reason."""
        refused: list[ItemRefused] = []
        for name in _ORDER:
            wanted = set(added.get(name, ())) - self._entries[name]
            if wanted:
                errors = self._ipsets.add(name.of(self._family), wanted)
                if any(error.errno == _HASH_FULL for error in errors):
                    self._replace(self._spec(name, _LARGE_LIMIT))
                    errors = self._ipsets.add(name.of(self._family), wanted)
                self._entries[name] |= wanted - {str(error.item) for error in errors}
                refused += errors
        return [(str(error.item), str(error)) for error in refused]

    def remove(self, removed: Mapping[SetName, Iterable[str]]) -> None:
        """Remove entries."""
        for name in reversed(_ORDER):
            gone = self._entries[name].intersection(removed.get(name, ()))
            if gone:
                for error in self._ipsets.remove(name.of(self._family), gone):
                    raise error
                self._entries[name] -= gone

    def keep(self, wanted: Mapping[SetName, Iterable[str]]) -> None:
        """Remove all entries but these."""
        self.remove({name: entries - set(wanted.get(name, ())) for name, entries in self._entries.items()})

    def differ(self, whole: bool = False) -> str:
        """Which set holds something else than programmed, "" for none.

        The number of entries is compared each time; entries are set by set, spread over calls where there are many.

        `whole`: all entries now.
        """
        sizes = {size.name: size.elements for size in self._ipsets.sizes(_prefix(self._family))}
        for name, entries in self._entries.items():
            if name is not SetName.HEALTH_CHECK_PORTS and sizes.get(name.of(self._family)) != len(entries):
                return f"ipset {name.of(self._family)}"
        start = time.monotonic()
        if start < self._compare_at and not whole:
            return ""
        if whole or not self._to_compare:
            self._to_compare = list(self._entries)
        differs = ""
        while self._to_compare and not differs:
            name = self._to_compare.pop()
            if self._contents(name) != self._entries[name]:
                differs = f"ipset {name.of(self._family)}"
            if not whole and time.monotonic() - start >= _LOOK_SECONDS:
                break
        self._compare_at = start + _REST_PER_LOOK * (time.monotonic() - start)
        return differs

    def _contents(self, name: SetName) -> set[str]:
        return {entry.text for entry in self._ipsets.contents(name.of(self._family)).entries}

    def _spec(self, name: SetName, limit: int = _USUAL_LIMIT) -> SetSpec:
        kind = SET_TYPES.get(name, "hash:ip,port")
        most = None if kind == "bitmap:port" else limit
        return SetSpec(name=name.of(self._family), type=kind, family=int(self._family), max_elements=most)

    def _replace(self, spec: SetSpec) -> None:
        """A set of that name is there with other settings, or too small: put one with ours in its place.

        One of another type cannot be replaced as long as rules use it, and the refusal says so.
        """
        spare = replace(spec, name=f"{_prefix(self._family)}{_SPARE}")
        self._ipsets.destroy([spare.name])
        for error in self._ipsets.create([spare]):
            raise error
        self._ipsets.add(spare.name, [entry.text for entry in self._ipsets.contents(spec.name).entries])
        self._ipsets.swap(spec.name, spare.name)
        for error in self._ipsets.destroy([spare.name]):
            raise error


def _prefix(family: Family) -> str:
    return "KUBE-" if family is Family.IPV4 else "KUBE-6-"
