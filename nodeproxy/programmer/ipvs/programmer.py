"""Owns IPVS mode as the agent sees it: both families, neither holding up the other, and the node's addresses."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence

from nodeproxy.forwarding.table import Delta, Family, ForwardingTable
from nodeproxy.kernel.addresses import NodeAddresses
from nodeproxy.kernel.errors import KernelError
from nodeproxy.kernel.xtables_tools import Variant
from nodeproxy.programmer.base import ApplyResult, ProgrammerConfig, ProgrammingError, Withdrawal
from nodeproxy.programmer.families import Refused, apply_each, open_each
from nodeproxy.programmer.ipvs.cleanup import remove_from_kernel
from nodeproxy.programmer.ipvs.family import FamilyProgrammer
from nodeproxy.programmer.ipvs.names import DEVICE
from nodeproxy.programmer.ipvs.settings import IpvsSettings
from nodeproxy.programmer.ipvs.system import apply_settings, require_features
from nodeproxy.programmer.ipvs.withdrawal import Leaving
from nodeproxy.programmer.stale_flows import StaleFlows


class IpvsProgrammer:
    """`Programmer` for IPVS mode. The rules around IPVS are of one variant of iptables."""

    def __init__(self, config: ProgrammerConfig, settings: IpvsSettings, variant: Variant) -> None:
        self._config = config
        self._settings = settings
        self._variant = variant
        self._stale_flows = StaleFlows()
        self._families: list[FamilyProgrammer] = []
        self._node: NodeAddresses | None = None
        self._own_addresses: dict[Family, frozenset[str]] = {}
        self._removed_addresses: frozenset[str] = frozenset()
        self._leaving: Leaving | None = None

    @property
    def draining(self) -> int:
        """How many real servers of all families take no new connections and keep those that they have."""
        return sum(family.draining for family in self._families) if self._leaving is None else self._leaving.draining

    async def prepare(self) -> None:
        """Check kernel and tools, set sysctls. A family that cannot be had is left out; `ProgrammingError` if none can."""
        try:
            await asyncio.to_thread(require_features, self._settings)
            self._node = await asyncio.to_thread(NodeAddresses, excluding=(DEVICE,))
        except KernelError as error:
            raise ProgrammingError(str(error)) from error
        await asyncio.to_thread(apply_settings, self._settings)
        self._families = await open_each(
            FamilyProgrammer.open(family, self._config, self._settings, self._variant) for family in self._config.families
        )

    def configure(self, config: ProgrammerConfig) -> None:
        """Take a new configuration; the next apply is a full pass."""
        self._config = config
        for family in self._families:
            family.configure(config)

    async def apply(self, table: ForwardingTable, delta: Delta) -> ApplyResult:
        """Program a delta, or the whole table where that is needed. See `Programmer.apply`."""
        full = any(family.needs_full_pass for family in self._families)
        try:
            self._poll_addresses()
        except KernelError as error:
            raise ProgrammingError(str(error)) from error
        refused, errors = await apply_each(self._apply_family(family, table, delta) for family in self._families)
        stale_flows = await self._stale_flows.remove(table, delta, full)
        if errors:
            raise ProgrammingError("; ".join(errors))
        rules = {family.family: family.counter.counts for family in self._families}
        return ApplyResult(refused=refused, full=full, rules=rules, stale_flows=stale_flows)

    async def audit(self, *, whole: bool = False) -> Sequence[str]:
        """What of some family is not as programmed. Also ends what has drained."""
        try:
            self._poll_addresses()
            removed, self._removed_addresses = self._removed_addresses, frozenset()
            await self._stale_flows.look_again()
            found = [(family.family, await family.audit(removed, whole)) for family in self._families]
            return [f"{what} of IPv{int(family)}" for family, what in found if what]
        except KernelError as error:
            raise ProgrammingError(str(error)) from error

    async def withdraw(self) -> Withdrawal:
        """Leave to another mode: what takes no new connections goes when those that it has have ended."""
        self._leaving = self._leaving or Leaving(self._config.families, self._settings)
        try:
            return await asyncio.to_thread(self._leaving.step)
        except KernelError as error:
            raise ProgrammingError(str(error)) from error

    async def cleanup(self) -> None:
        """Remove everything of ours, in every family."""
        for family in self._families:
            await family.remove_rules()
        errors = await asyncio.to_thread(remove_from_kernel)
        if errors:
            raise ProgrammingError("; ".join(errors))

    def _poll_addresses(self) -> None:
        """Read what the kernel told of addresses: no waiting, and next to nothing where nothing changed."""
        assert self._node is not None
        news = self._node.poll()
        self._removed_addresses |= news.removed
        if news.node_changed or not self._own_addresses:
            found = self._node.current
            self._own_addresses = {
                family: frozenset(one.address for one in found if one.family == int(family))
                for family in self._config.families
            }

    def _apply_family(self, family: FamilyProgrammer, table: ForwardingTable, delta: Delta) -> Awaitable[Refused]:
        checks = table.health_checks.values()
        health_ports = frozenset(check.port for check in checks if family.family in check.families)
        addresses = self._own_addresses[family.family]
        if not family.needs_full_pass:
            changes = {key: change.after for key, change in delta.rows.items() if key.family is family.family}
            return family.change(changes, health_ports, addresses)
        rows = {key: row for key, row in table.rows.items() if key.family is family.family}
        first = [key for key in rows if key.name.service == ("default", "kubernetes")]
        return family.full_pass(rows, health_ports, addresses, first)
