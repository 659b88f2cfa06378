"""Owns removing what agents left: all of it (`nodeproxy cleanup`), or what another mode left where ours took its place."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import structlog

from nodeproxy.agent.config import Mode
from nodeproxy.agent.node import available_families
from nodeproxy.forwarding.table import Family
from nodeproxy.kernel.errors import KernelError, ToolMissing
from nodeproxy.kernel.xtables import XTables
from nodeproxy.kernel.xtables_tools import Variant
from nodeproxy.programmer.base import LocalDetector, NodePortAddresses, ProgrammerConfig, ProgrammingError
from nodeproxy.programmer.iptables import base_chains
from nodeproxy.programmer.iptables.affinity import AffinitySets
from nodeproxy.programmer.ipvs import rules as ipvs_rules
from nodeproxy.programmer.ipvs.cleanup import has_traces, remove_from_kernel
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


async def remove_other_mode(mode: Mode) -> None:
    """Remove what an agent of the other mode left on this node, once `mode` is programmed. What cannot be removed is said.

    Rules of the nat and filter tables are not among it: every mode replaces them, because the names are the same.
    """
    families = available_families()
    try:
        if mode is Mode.IPVS:
            for family in families:
                await AffinitySets(family).keep_only(())
            return
        if not await asyncio.to_thread(has_traces):
            return
        for variant in Variant:
            for family in families:
                with contextlib.suppress(ToolMissing):
                    await _remove_rules(variant, family, ("mangle",))
        errors = await asyncio.to_thread(remove_from_kernel)
        _log.info("removed what IPVS mode left", errors=errors)
    except KernelError as error:
        _log.warning("what the other mode left is not removed", error=str(error))


async def _remove_rules(variant: Variant, family: Family, of: Sequence[str] = _TABLES) -> None:
    config = ProgrammerConfig(
        families=(family,),
        local_detector=LocalDetector(),
        node_port_addresses={family: NodePortAddresses(loopback=family is Family.IPV4)},
    )
    tables = KernelTables(XTables(variant, family.value), of)
    text = tx.render(tx.cleanup([*base_chains.jumps(family, config), *ipvs_rules.jumps()], await tables.read()))
    if text:
        await tables.restore(text, after_read=True)
