"""Owns the ipsets behind ClientIP affinity: one hash:ip set for each endpoint of a ServicePort that has affinity.

A set remembers the clients of one endpoint; entries expire with the affinity timeout. kube-proxy's `recent` lists hold 100
clients each; these hold hundreds of thousands, at O(1) per packet.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from nodeproxy.forwarding.table import Family, ServicePortKey
from nodeproxy.kernel.errors import KernelError
from nodeproxy.kernel.ipset import IPSets
from nodeproxy.kernel.ipset_messages import SetSize, SetSpec
from nodeproxy.programmer.iptables.service_rules import AffinitySet
from nodeproxy.programmer.rules.names import AFFINITY_SET

_MAX_CLIENTS = 1 << 20
# The kernel grows a set only when user space adds to it, never when a rule does, and a bucket holds twelve entries
# (net/netfilter/ipset/ip_set_hash_gen.h): so a set is made large enough for three clients a bucket. 4096 buckets are
# 32 KiB; with very many sets they are made smaller, for all together to stay within some 32 MiB.
_BUCKETS = 4096
_ALL_BUCKETS = 1 << 22
_MIN_BUCKETS = 64
_CLIENTS_PER_BUCKET = 2  # a set with more is made larger by us
_GROW_PERIOD_SECONDS = 10.0
# A set keeps its timeout for life, while a Service's may change; rules give the timeout with each entry they add.
_DEFAULT_TIMEOUT_SECONDS = 10800


class AffinitySets:
    """Creates and destroys affinity sets of one family. Sets that exist already, with their clients, are kept."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._ipsets = IPSets()
        self._grow_at = 0.0

    async def create(self, sets: Iterable[AffinitySet]) -> dict[ServicePortKey, str]:
        """Create sets that do not exist yet. Returns the rows whose sets the kernel refuses, with the reason."""
        wanted = list(sets)
        if not wanted:
            return {}
        buckets = max(_MIN_BUCKETS, min(_BUCKETS, 1 << (_ALL_BUCKETS // len(wanted)).bit_length() - 1))
        specs = [self._spec(item.name, buckets) for item in wanted]
        row_of_set = {item.name: item.key for item in wanted}
        try:
            failed = await asyncio.to_thread(self._ipsets.create, specs)
        except KernelError as error:
            return dict.fromkeys(row_of_set.values(), str(error))
        return {row_of_set[str(error.item)]: str(error) for error in failed}

    async def grow(self) -> list[str]:
        """Make sets larger that are getting full, with their clients; looks every ten seconds. Returns their names."""
        if time.monotonic() < self._grow_at:
            return []
        self._grow_at = time.monotonic() + _GROW_PERIOD_SECONDS
        return await asyncio.to_thread(self._grow_full_ones)

    def _grow_full_ones(self) -> list[str]:
        prefix = AFFINITY_SET[self._family]
        full = [
            size
            for size in self._ipsets.sizes(prefix)
            if size.elements > size.hash_size * _CLIENTS_PER_BUCKET and size.hash_size < _MAX_CLIENTS
        ]
        for size in full:
            self._replace_by_larger(size, f"{prefix}LARGER")
        return [size.name for size in full]

    def _replace_by_larger(self, size: SetSize, spare: str) -> None:
        """Swap a set for a larger one. Clients that come while it is copied are copied after the swap."""
        self._ipsets.destroy([spare])
        for refused in self._ipsets.create([self._spec(spare, size.hash_size * 8)]):
            raise refused
        self._ipsets.add(spare, self._ipsets.contents(size.name).entries)
        self._ipsets.swap(size.name, spare)
        known = {entry.text for entry in self._ipsets.contents(size.name).entries}
        late = [entry for entry in self._ipsets.contents(spare).entries if entry.text not in known]
        self._ipsets.add(size.name, late)
        self._ipsets.destroy([spare])

    def _spec(self, name: str, buckets: int) -> SetSpec:
        return SetSpec(
            name=name,
            type="hash:ip",
            family=int(self._family),
            timeout=_DEFAULT_TIMEOUT_SECONDS,
            hash_size=buckets,
            max_elements=_MAX_CLIENTS,
        )

    async def destroy(self, names: Iterable[str]) -> None:
        """Destroy sets by name. One that is still in use stays, for the next full pass to remove."""
        doomed = list(names)
        if doomed:
            await asyncio.to_thread(self._ipsets.destroy, doomed)

    async def keep_only(self, names: Iterable[str]) -> None:
        """Destroy all affinity sets of this family but these."""
        try:
            present = await asyncio.to_thread(self._ipsets.list_names, AFFINITY_SET[self._family])
        except KernelError:
            return  # a kernel without ipset has no sets to remove
        await self.destroy(sorted(set(present) - set(names)))
