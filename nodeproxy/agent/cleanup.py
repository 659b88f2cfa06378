"""Owns removing what agents left: all of it (`nodeproxy cleanup`), or what ours took the place of."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import structlog

from nodeproxy.agent.node import available_families
from nodeproxy.forwarding.table import Family
from nodeproxy.kernel.errors import KernelError, ToolMissing
from nodeproxy.kernel.xtables import XTables
from nodeproxy.kernel.xtables_tools import Variant
from nodeproxy.programmer.base import LocalDetector, NodePortAddresses, ProgrammerConfig, ProgrammingError
from nodeproxy.programmer.iptables import base_chains
from nodeproxy.programmer.iptables.affinity import AffinitySets
from nodeproxy.programmer.ipvs import rules as ipvs_rules
from nodeproxy.programmer.ipvs.cleanup import remove_from_kernel
from nodeproxy.programmer.rules import transaction as tx
from nodeproxy.programmer.rules.kernel_tables import KernelTables

_log = structlog.get_logger(__name__)

_TABLES = ("mangle", "nat", "filter")


async def clean_up(variants: Sequence[str] | None) -> None:
    """Remove everything of ours. Raises `ProgrammingError` with all that could not be removed."""
    families = available_families()
    errors: list[str] = []
    for variant in [Variant(name) for name in variants or ("legacy", "nft")]:
        for family in families:
            try:
                await _remove_rules(variant, family)
            except ToolMissing as error:
                if variants is not None:
                    errors.append(str(error))
            except KernelError as error:
                errors.append(f"IPv{int(family)}, {variant}: {error}")
    for family in families:
        await AffinitySets(family).keep_only(())
    errors += await asyncio.to_thread(remove_from_kernel)
    if errors:
        raise ProgrammingError("; ".join(errors))
    _log.info("cleaned up", families=[int(family) for family in families])


async def remove_others(variant: Variant, families: Sequence[Family]) -> None:
    """Remove what served before and that ours, in `variant`, does not replace: the same rules in the other variant.

    What cannot be removed is said.
    """
    for other in Variant:
        if other is variant:
            continue
        for family in families:
            try:
                with contextlib.suppress(ToolMissing):
                    if await _remove_rules(other, family):
                        _log.info("removed rules of the other iptables variant", variant=str(other), family=int(family))
            except KernelError as error:
                _log.warning("rules of the other iptables variant are not removed", variant=str(other), error=str(error))


async def _remove_rules(variant: Variant, family: Family) -> bool:
    """Remove our rules of one variant and family. True where there were any."""
    config = ProgrammerConfig(
        families=(family,),
        local_detector=LocalDetector(),
        node_port_addresses={family: NodePortAddresses(loopback=family is Family.IPV4)},
    )
    tables = KernelTables(XTables(variant, family.value), _TABLES)
    text = tx.render(tx.cleanup([*base_chains.jumps(family, config), *ipvs_rules.jumps()], await tables.read()))
    if text:
        await tables.restore(text, after_read=True)
    return bool(text)
