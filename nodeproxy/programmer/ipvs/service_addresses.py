"""Owns the service addresses of one family on the dummy interface, and the ipset of them.

An address that the node has anyway, on another interface, is not ours: other processes of the node may listen on it.
Blocking: call in a thread. Methods raise `KernelError`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from nodeproxy.forwarding.table import Family
from nodeproxy.kernel.links import Links
from nodeproxy.programmer.ipvs.names import DEVICE, SetName
from nodeproxy.programmer.ipvs.sets import ServiceSets


class ServiceAddresses:
    """Addresses of one family on the dummy interface."""

    def __init__(self, family: Family, links: Links, sets: ServiceSets) -> None:
        self._family = family
        self._links = links
        self._sets = sets
        self._index = 0
        self._present: set[str] = set()

    @property
    def present(self) -> Collection[str]:
        """Addresses that the interface is believed to have."""
        return self._present

    def read(self) -> None:
        """Make the interface where it is not there, and read its addresses."""
        self._index = self._links.ensure_dummy(DEVICE)
        addresses = self._links.addresses_of(self._index)
        self._present = {address for address in addresses if (":" in address) == (self._family is Family.IPV6)}

    def add(self, addresses: Iterable[str]) -> list[tuple[str, str]]:
        """Add addresses; returns those refused, each with the reason. The set comes first: it keeps the node's processes
        from being reached."""
        wanted = set(addresses)
        refused = self._sets.add({SetName.SERVICE_ADDRESSES: wanted})
        missing = wanted - self._present
        errors = self._links.add_addresses(self._index, missing) if missing else []
        self._present |= missing - {str(error.item) for error in errors}
        return [*refused, *((str(error.item), str(error)) for error in errors)]

    def remove(self, addresses: Iterable[str]) -> None:
        """Remove addresses."""
        gone = self._present.intersection(addresses)
        if gone:
            self._links.remove_addresses(self._index, gone)
            self._present -= gone
        self._sets.remove({SetName.SERVICE_ADDRESSES: gone})

    def differ(self, removed: Collection[str]) -> bool:
        """Whether the interface was removed, or lacks one of the addresses that the kernel says were `removed` from it."""
        return self._links.link_index(DEVICE) != self._index or not self._present.isdisjoint(removed)
