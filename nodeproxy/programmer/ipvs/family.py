"""Owns one family in IPVS mode: full passes, incremental changes, the audit, and what must happen in which order.

What is added comes before what is taken away. Of what is added, the virtual servers come first, then the sets that let
packets through to them and mark them for masquerading, and the addresses last: until then no packet gets here. But where
rules forward already (another mode's, kube-proxy's), the addresses come before ours replace them, lest packets get nowhere.

What the kernel is believed to hold is kept by `VirtualServers`, `ServiceSets` and `ServiceAddresses`; after drift or failure
the next pass is a full one, which reads the kernel anew and changes only what differs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping
from typing import Self

import structlog

from nodeproxy.forwarding.table import Family, ServicePort, ServicePortKey
from nodeproxy.kernel.errors import KernelError
from nodeproxy.kernel.ipset import IPSets
from nodeproxy.kernel.ipvs import IPVS, VirtualServer
from nodeproxy.kernel.links import Links
from nodeproxy.kernel.xtables import XTables
from nodeproxy.kernel.xtables_tools import Variant
from nodeproxy.programmer.base import ProgrammerConfig, ProgrammingError
from nodeproxy.programmer.families import Refused
from nodeproxy.programmer.ipvs.adoption import left_by_kube_proxy
from nodeproxy.programmer.ipvs.names import SetName
from nodeproxy.programmer.ipvs.rules import TABLES, chains, jumps, redirect_chains
from nodeproxy.programmer.ipvs.servers import VirtualServers
from nodeproxy.programmer.ipvs.service_addresses import ServiceAddresses
from nodeproxy.programmer.ipvs.sets import ServiceSets
from nodeproxy.programmer.ipvs.settings import IpvsSettings
from nodeproxy.programmer.ipvs.wanted import Change, Wanted, serving_node_ports
from nodeproxy.programmer.rules import transaction as tx
from nodeproxy.programmer.rules.chains import Chains, TableChange
from nodeproxy.programmer.rules.common import Features, same_addresses
from nodeproxy.programmer.rules.counting import RuleCounter
from nodeproxy.programmer.rules.kernel_tables import KernelTables

_log = structlog.get_logger(__name__)

_FENCES = ("mangle", "filter")

Rows = Mapping[ServicePortKey, ServicePort | None]


class FamilyProgrammer:
    """Programs the rows of one family. One call at a time. Calls raise `ProgrammingError` where nothing could be done."""

    def __init__(
        self, family: Family, config: ProgrammerConfig, settings: IpvsSettings, tables: KernelTables, features: Features
    ) -> None:
        self.family = family
        self._config = config
        self._settings = settings
        self._tables = tables
        self._features = features
        self._servers = VirtualServers(family, settings, IPVS())
        self._sets = ServiceSets(family, IPSets())
        self._addresses = ServiceAddresses(family, Links(), self._sets)
        self._wanted: Wanted | None = None
        self._own_addresses: frozenset[str] = frozenset()
        self._health_ports: frozenset[int] = frozenset()
        self.counter = RuleCounter()

    @classmethod
    async def open(cls, family: Family, config: ProgrammerConfig, settings: IpvsSettings, variant: Variant) -> Self:
        """Find the tools, and what they and the kernel can do. Raises `ProgrammingError` where this family cannot be had."""
        try:
            tables = KernelTables(XTables(variant, family.value), TABLES)
            features = await tables.probe(f'-m comment --comment "kubernetes hairpin traffic" {same_addresses(family)}')
            return cls(family, config, settings, tables, features)
        except KernelError as error:
            raise ProgrammingError(f"IPv{int(family)}: {error}") from error

    def configure(self, config: ProgrammerConfig) -> None:
        """Take a new configuration; the next apply is a full pass."""
        self._config = config
        self._wanted = None

    @property
    def draining(self) -> int:
        """How many real servers drain."""
        return self._servers.draining

    @property
    def needs_full_pass(self) -> bool:
        """Whether what the kernel holds is unknown: at start, after drift, after failure."""
        return self._wanted is None

    async def full_pass(
        self,
        rows: Mapping[ServicePortKey, ServicePort],
        health_ports: frozenset[int],
        own_addresses: frozenset[str],
        first: Iterable[ServicePortKey] = (),
    ) -> Refused:
        """Make the kernel match `rows`, and return those that it refuses with the reason.

        `own_addresses` are the node's, without those of the dummy interface. On a node that serves nothing yet, the rows in
        `first` are programmed on their own beforehand.
        """
        self._wanted = None
        self._own_addresses = own_addresses
        self._health_ports = health_ports
        try:
            await asyncio.to_thread(self._read)
            early = {key: rows[key] for key in first}
            if early and len(rows) > len(early) and not len(self._servers):
                refused = await self._full(early)
                later: Rows = {key: row for key, row in rows.items() if key not in early}
                assert self._wanted is not None
                return refused | await self._apply(self._wanted, self._wanted.change(later))
            return await self._full(rows)
        except KernelError as error:
            self._wanted = None
            raise ProgrammingError(f"IPv{int(self.family)}: {error}") from error

    async def change(self, rows: Rows, health_ports: frozenset[int], own_addresses: frozenset[str]) -> Refused:
        """Program changed rows, and what else changed, on top of what is there."""
        wanted = self._wanted
        if wanted is None:
            raise ProgrammingError(f"IPv{int(self.family)}: a full pass is needed first")
        try:
            refused: Refused = {}
            if own_addresses != self._own_addresses:
                refused |= await self._change_own_addresses(wanted, own_addresses)
            change = wanted.change(rows)
            _update_health_ports(change, self._health_ports, health_ports)
            self._health_ports = health_ports
            return refused | await self._apply(wanted, change)
        except KernelError as error:
            self._wanted = None
            raise ProgrammingError(f"IPv{int(self.family)}: {error}") from error

    async def audit(self, removed_addresses: Collection[str], whole: bool = False) -> str:
        """What of the kernel differs from what was programmed, "" for nothing; the first that is found.

        `removed_addresses`: from the dummy interface, by anybody. `whole`: nothing is left for a later call.

        Real servers that have drained are deleted on the way.
        """
        if self._wanted is None:
            return ""
        differs = await asyncio.to_thread(self._look, self._wanted, removed_addresses, whole)
        kernel = None if differs else await self._tables.look(whole)
        if kernel is not None:
            if any(tx.full(self._chains(self._wanted), jumps(), kernel).values()):
                differs = "rules"
            else:
                self._tables.confirm()
        if differs:
            self._wanted = None
        return differs

    async def remove_rules(self) -> None:
        """Remove the rules of ours."""
        self._wanted = None
        try:
            text = tx.render(tx.cleanup(jumps(), await self._tables.read()))
            if text:
                await self._tables.restore(text, after_read=True)
        except KernelError as error:
            raise ProgrammingError(f"IPv{int(self.family)}: {error}") from error

    def _read(self) -> None:
        self._sets.read()
        self._addresses.read()
        service_addresses = {*self._addresses.present, *self._sets.entries(SetName.SERVICE_ADDRESSES)}
        with IPSets() as ipsets:
            self._servers.read(left_by_kube_proxy(ipsets, service_addresses, self._own_addresses))

    async def _full(self, rows: Mapping[ServicePortKey, ServicePort]) -> Refused:
        wanted = Wanted(self.family, self._settings.scheduler, loop_back=not self._features.bpf)
        wanted.set_node_addresses(self._serving(self._own_addresses))
        change = wanted.change(rows)
        change.places.update(self._servers)
        _update_health_ports(change, frozenset(), self._health_ports)
        refused = await asyncio.to_thread(self._raise_up, wanted, change)
        kernel = await self._tables.read()
        rules = self._chains(wanted)
        transaction = tx.full(rules, jumps(), kernel)
        text = tx.render(transaction)
        if text and tx.serves(kernel["nat"]):
            # Somebody's rules forward already, before a packet is delivered here: fences and addresses come before ours.
            if ahead := tx.render(tx.without_removals(transaction, _FENCES)):
                await self._tables.restore(ahead, after_read=True)
                text = tx.render(tx.full(rules, jumps(), await self._tables.read()))
            refused |= await asyncio.to_thread(self._add_addresses, wanted, wanted.addresses)
        if text:
            await self._tables.restore(text, after_read=True)
        else:
            self._tables.confirm()
        self.counter.all(rules, {table: part.change for table, part in transaction.items()})
        self._wanted = wanted
        return refused | await asyncio.to_thread(self._finish_full, wanted, change)

    async def _apply(self, wanted: Wanted, change: Change) -> Refused:
        refused = await asyncio.to_thread(self._raise_up, wanted, change)
        if change.redirects:
            changes = {"nat": TableChange(redirect_chains(wanted.short_cuts, wanted.redirects))}
            await self._tables.restore(tx.render(tx.incremental(changes)), after_read=False)
            self.counter.change(changes)
        return refused | await asyncio.to_thread(self._finish, wanted, change)

    async def _change_own_addresses(self, wanted: Wanted, own: frozenset[str]) -> Refused:
        """The node got or lost addresses: they serve node ports, and are not for the dummy interface."""
        touched = self._own_addresses ^ own
        self._own_addresses = own
        serving = self._serving(own)
        change = wanted.set_node_addresses(serving) if serving != wanted.node_addresses else Change()
        change.addresses |= touched
        return await self._apply(wanted, change)

    def _raise_up(self, wanted: Wanted, change: Change) -> Refused:
        """In a thread: add virtual servers and set entries."""
        refused: Refused = {}
        places = {place: wanted.server(place) for place in change.places}
        for place, reason in self._servers.raise_up(places).items():
            _note(refused, wanted.row_at(place), reason)
            change.places.discard(place)  # what it has now, it keeps
        for text, reason in self._sets.add(change.added):
            _note(refused, _row_of_entry(wanted, text, self.family), reason)
        return refused

    def _finish(self, wanted: Wanted, change: Change) -> Refused:
        """In a thread: add addresses, then take away what is not wanted."""
        refused = self._add_addresses(wanted, change.addresses)
        self._sets.remove(change.removed)
        self._servers.lower({place: wanted.server(place) for place in change.places})
        self._remove_addresses(wanted, change.addresses)
        return refused

    def _finish_full(self, wanted: Wanted, change: Change) -> Refused:
        """In a thread: the same, for all that the kernel holds."""
        refused = self._add_addresses(wanted, wanted.addresses)
        self._servers.lower({place: wanted.server(place) for place in change.places})
        self._remove_addresses(wanted, set(self._addresses.present))
        self._sets.keep({**change.added, SetName.SERVICE_ADDRESSES: set(self._addresses.present)})
        return refused

    def _add_addresses(self, wanted: Wanted, addresses: Iterable[str]) -> Refused:
        refused: Refused = {}
        missing = [one for one in addresses if one in wanted.addresses and one not in self._own_addresses]
        for address, reason in self._addresses.add(missing):
            for key, places in wanted.rows.items():
                if address in places.addresses:
                    _note(refused, key, reason)
        return refused

    def _remove_addresses(self, wanted: Wanted, addresses: Iterable[str]) -> None:
        """Remove those of the addresses that no Service needs, or that the node has by itself."""
        leaving = self._servers.leaving_addresses()
        self._addresses.remove(
            one for one in addresses if one in self._own_addresses or (one not in wanted.addresses and one not in leaving)
        )

    def _look(self, wanted: Wanted, removed_addresses: Collection[str], whole: bool) -> str:
        """In a thread: end what has drained, and compare."""
        self._remove_addresses(wanted, self._servers.end_drained())
        if self._addresses.differ(removed_addresses):
            return "service addresses"
        return self._sets.differ(whole) or self._servers.differ(whole)

    def _chains(self, wanted: Wanted) -> Chains:
        return chains(self.family, self._config, self._features, wanted.short_cuts, wanted.redirects)

    def _serving(self, addresses: Iterable[str]) -> tuple[str, ...]:
        """Which addresses of the node serve node ports."""
        return tuple(sorted(serving_node_ports(addresses, self._config.node_port_addresses[self.family])))


def _note(refused: Refused, key: ServicePortKey | None, reason: str) -> None:
    if key is None:
        _log.error("the kernel refuses something of no ServicePort", reason=reason)
    else:
        refused.setdefault(key, reason)


def _row_of_entry(wanted: Wanted, text: str, family: Family) -> ServicePortKey | None:
    """Whose entry of an ipset it is: `address,protocol:port` and what follows."""
    address, _, rest = text.partition(",")
    protocol, _, port = rest.partition(",")[0].partition(":")
    return wanted.row_at(VirtualServer(int(family), protocol, address, int(port))) if port.isdecimal() else None


def _update_health_ports(change: Change, before: frozenset[int], after: frozenset[int]) -> None:
    change.added.setdefault(SetName.HEALTH_CHECK_PORTS, set()).update(str(port) for port in after - before)
    change.removed.setdefault(SetName.HEALTH_CHECK_PORTS, set()).update(str(port) for port in before - after)
