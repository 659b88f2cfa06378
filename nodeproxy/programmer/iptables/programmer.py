"""Owns iptables mode as the agent sees it: both families side by side, neither holding up the other."""

from __future__ import annotations

from collections.abc import Sequence

from nodeproxy.forwarding.table import Delta, Family, ForwardingTable, ServicePort
from nodeproxy.kernel.errors import KernelError
from nodeproxy.kernel.xtables_tools import Variant
from nodeproxy.programmer.base import ApplyResult, ProgrammerConfig, ProgrammingError, Withdrawal
from nodeproxy.programmer.families import Refused, apply_each, open_each
from nodeproxy.programmer.iptables.affinity import AffinitySets
from nodeproxy.programmer.iptables.family import FamilyProgrammer
from nodeproxy.programmer.stale_flows import StaleFlows


class IptablesProgrammer:
    """`Programmer` for iptables mode, in one variant (legacy or nft)."""

    def __init__(self, config: ProgrammerConfig, variant: Variant) -> None:
        self._config = config
        self._variant = variant
        self._stale_flows = StaleFlows()
        self._families: list[FamilyProgrammer] = []
        self._failed: list[Family] = []

    @property
    def draining(self) -> int:
        """None: established flows live in conntrack."""
        return 0

    async def prepare(self) -> None:
        """Check tools and tables of each family. One that cannot be had is left out; `ProgrammingError` if none can."""
        self._families = await open_each(
            FamilyProgrammer.open(family, self._config, self._variant, AffinitySets(family))
            for family in self._config.families
        )

    def configure(self, config: ProgrammerConfig) -> None:
        """Take a new configuration; the next apply is a full pass."""
        self._config = config
        for family in self._families:
            family.configure(config)

    async def apply(self, table: ForwardingTable, delta: Delta) -> ApplyResult:
        """Program a delta, or the whole table where that is needed. See `Programmer.apply`."""
        full = any(family.needs_full_pass for family in self._families)
        self._failed = []
        refused, errors = await apply_each(self._apply_family(family, table, delta) for family in self._families)
        stale_flows = await self._stale_flows.remove(table, delta, full)
        if errors:
            raise ProgrammingError("; ".join(errors))
        rules = {family.family: family.counter.counts for family in self._families}
        return ApplyResult(
            refused=refused, full=full, partial_failures=tuple(self._failed), rules=rules, stale_flows=stale_flows
        )

    async def audit(self, *, whole: bool = False) -> Sequence[str]:
        """Families whose rules are not as programmed. Raises `ProgrammingError` if they cannot be read."""
        await self._stale_flows.look_again()
        try:
            return [f"rules of IPv{int(family.family)}" for family in self._families if await family.audit(whole)]
        except KernelError as error:
            raise ProgrammingError(str(error)) from error

    async def withdraw(self) -> Withdrawal:
        """Leave to another mode, whose rules are in the place of ours: flows live in conntrack, and only ipsets remain."""
        try:
            for family in self._config.families:
                await AffinitySets(family).keep_only(())
        except KernelError as error:
            raise ProgrammingError(str(error)) from error
        return Withdrawal.DONE

    async def cleanup(self) -> None:
        """Remove everything of ours, in every family."""
        for family in self._families:
            await family.cleanup()

    async def _apply_family(self, family: FamilyProgrammer, table: ForwardingTable, delta: Delta) -> Refused:
        checks = table.health_checks.values()
        health_ports = frozenset(check.port for check in checks if family.family in check.families)
        if not family.needs_full_pass:
            changes = {key: change.after for key, change in delta.rows.items() if key.family is family.family}
            refused = await family.change(changes, health_ports)
            if refused is not None:
                return refused
            self._failed.append(family.family)
        rows = {key: row for key, row in table.rows.items() if key.family is family.family}
        return await family.full_pass(rows, health_ports, first=[key for key in rows if _is_api_server(rows[key])])


def _is_api_server(row: ServicePort) -> bool:
    return row.key.name.service == ("default", "kubernetes")
