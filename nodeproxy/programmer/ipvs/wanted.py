"""Owns what the kernel should hold for one family in IPVS mode: the places of all rows, and what a change of rows changes.

Pure. Where a node port's place falls on that of an address of a Service (an external IP that is the node's own address), the
latter wins, as in the forwarding table's verdict.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from msgspec import Struct, field

from nodeproxy.forwarding.table import Family, FrontendKind, ServicePort, ServicePortKey
from nodeproxy.kernel.ipvs import VirtualServer
from nodeproxy.programmer.base import NodePortAddresses
from nodeproxy.programmer.ipvs.names import SetName
from nodeproxy.programmer.ipvs.places import Place, RowPlaces, Server, Target, Translator, entry

Entries = dict[SetName, set[str]]


class Change(Struct):
    """What a change of rows means for the kernel. A row's places are in it even where they stay as they are."""

    places: set[VirtualServer] = field(default_factory=set)
    added: Entries = field(default_factory=dict)
    removed: Entries = field(default_factory=dict)
    redirects: bool = False
    """Whether the redirects of the nat table changed."""
    addresses: set[str] = field(default_factory=set)
    """Service addresses that became wanted, or are not any more."""


class Wanted:
    """All that is wanted for one family. With `loop_back` local backends are listed for the hairpin rule."""

    def __init__(self, family: Family, scheduler: str, *, loop_back: bool) -> None:
        self.rows: dict[ServicePortKey, RowPlaces] = {}
        self.short_cuts: dict[VirtualServer, Target] = {}
        self.redirects: dict[VirtualServer, Target] = {}
        self.node_addresses: tuple[str, ...] = ()
        self._translator = Translator(family, scheduler, self._stand_in_port)
        self._loop_back = loop_back
        self._fixed: dict[VirtualServer, Place] = {}
        self._node_ports: dict[VirtualServer, Place] = {}
        self._addresses: Counter[str] = Counter()
        self._hairpins: Counter[str] = Counter()
        self._stand_ins: dict[ServicePortKey, int] = {}
        self._key_of_place: dict[VirtualServer, ServicePortKey] = {}

    @property
    def addresses(self) -> Iterable[str]:
        """Addresses that Services are reached at."""
        return self._addresses.keys()

    def server(self, place: VirtualServer) -> Server | None:
        """The virtual server wanted at a place."""
        found = self._place(place)
        return found.server if found else None

    def servers(self) -> Iterator[VirtualServer]:
        """Every place that has a virtual server."""
        for place in self._key_of_place:
            if self.server(place) is not None:
                yield place

    def row_at(self, place: VirtualServer) -> ServicePortKey | None:
        """Whose place it is."""
        return self._key_of_place.get(place)

    def change(self, rows: Mapping[ServicePortKey, ServicePort | None]) -> Change:
        """Set rows (None removes)."""
        old = [places for key in rows if (places := self.rows.get(key)) is not None]
        new = [self._translator.translate(row, self.node_addresses) for row in rows.values() if row is not None]
        change = self._replace(old, new)
        for key, row in rows.items():
            if row is None:
                self._stand_ins.pop(key, None)
        return change

    def set_node_addresses(self, addresses: Iterable[str]) -> Change:
        """The node's addresses that serve node ports are these now."""
        self.node_addresses = tuple(sorted(addresses))
        rows = [
            places
            for places in self.rows.values()
            if any(frontend.kind is FrontendKind.NODE_PORT for frontend in places.row.frontends)
        ]
        return self._replace(rows, [self._translator.translate(places.row, self.node_addresses) for places in rows])

    def _replace(self, old: list[RowPlaces], new: list[RowPlaces]) -> Change:
        before: dict[VirtualServer, Place | None] = {}
        for rows in (old, new):
            for row in rows:
                for at in (*row.fixed, *row.node_ports):
                    before[at] = self._place(at)
        change = Change(places=set(before))
        hairpins: Counter[str] = Counter()
        addresses: Counter[str] = Counter()
        for row in old:
            self._forget(row)
            addresses.subtract(row.addresses)
            hairpins.subtract(self._hairpin_entries(row))
        for row in new:
            self._note(row)
            addresses.update(row.addresses)
            hairpins.update(self._hairpin_entries(row))
        for at, was in before.items():
            self._diff(change, at, was, self._place(at))
        change.addresses = set(_transitions(self._addresses, addresses))
        for text in _transitions(self._hairpins, hairpins):
            into = change.added if text in self._hairpins else change.removed
            into.setdefault(SetName.LOOP_BACK, set()).add(text)
        return change

    def _forget(self, row: RowPlaces) -> None:
        for at, place in row.fixed.items():
            if self._fixed.get(at) is place:
                del self._fixed[at]
        for at, place in row.node_ports.items():
            if self._node_ports.get(at) is place:
                del self._node_ports[at]
        for at in (*row.fixed, *row.node_ports):
            if self._key_of_place.get(at) == row.row.key:
                del self._key_of_place[at]
        self.rows.pop(row.row.key, None)

    def _note(self, row: RowPlaces) -> None:
        self._node_ports.update(row.node_ports)
        self._fixed.update(row.fixed)
        for at in row.node_ports:
            if at not in self._fixed:
                self._key_of_place[at] = row.row.key
        for at in row.fixed:
            self._key_of_place[at] = row.row.key
        self.rows[row.row.key] = row

    def _place(self, at: VirtualServer) -> Place | None:
        return self._fixed.get(at) or self._node_ports.get(at)

    def _diff(self, change: Change, at: VirtualServer, before: Place | None, after: Place | None) -> None:
        old, new = dict(_entries(at, before)), dict(_entries(at, after))
        for (name, text), into in (
            *((pair, change.added) for pair in new if pair not in old),
            *((pair, change.removed) for pair in old if pair not in new),
        ):
            into.setdefault(name, set()).add(text)
        for targets, was, now in (
            (self.short_cuts, before.short_cut if before else None, after.short_cut if after else None),
            (self.redirects, before.redirect if before else None, after.redirect if after else None),
        ):
            if was != now:
                change.redirects = True
                targets.pop(at, None)
                if now is not None:
                    targets[at] = now

    def _hairpin_entries(self, row: RowPlaces) -> Iterator[str]:
        if self._loop_back:
            for backend in row.row.all_backends:
                if backend.local:
                    yield f"{backend.address},{row.row.key.protocol}:{backend.port},{backend.address}"

    def _stand_in_port(self, key: ServicePortKey) -> int:
        """A port for the stand-in of a row: by its name, so that a restart finds it again, or the next one free."""
        if key not in self._stand_ins:
            taken = {port for other, port in self._stand_ins.items() if other.protocol is key.protocol}
            port = int.from_bytes(hashlib.sha256(str(key).encode()).digest()[:4], "big")
            while (port := port % 65535 + 1) in taken:
                pass
            self._stand_ins[key] = port
        return self._stand_ins[key]


def _entries(at: VirtualServer, place: Place | None) -> Iterator[tuple[tuple[SetName, str], None]]:
    if place is None:
        return
    text = entry(at)
    for name in place.sets:
        yield (name, text), None
    for source in place.allowed_sources:
        yield (SetName.ALLOWED_SOURCES, f"{text},{_as_listed(source)}"), None


def _as_listed(network: str) -> str:
    """A network as the kernel lists it in a set: that of a single address without its length."""
    return network.removesuffix("/128" if ":" in network else "/32")


def _transitions(counts: Counter[str], difference: Counter[str]) -> Iterator[str]:
    """Add the difference; what came to be counted, or is not any more."""
    for text, by in difference.items():
        was = counts[text]
        if was + by:
            counts[text] = was + by
        else:
            del counts[text]
        if (was == 0) != (was + by == 0):
            yield text


def serving_node_ports(addresses: Iterable[str], allowed: NodePortAddresses) -> list[str]:
    """Which of a family's addresses on the node serve node ports. Never loopback, nor link-local ones (they need a zone)."""
    networks = None if allowed.cidrs is None else [ipaddress.ip_network(cidr) for cidr in allowed.cidrs]
    found = []
    for text in addresses:
        address = ipaddress.ip_address(text)
        if address.is_loopback or (address.version == 6 and address.is_link_local):
            continue
        if networks is None or any(address in network for network in networks):
            found.append(text)
    return found
