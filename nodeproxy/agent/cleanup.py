"""Owns `nodeproxy cleanup`: every mode and variant, every family, whether or not an agent ran here with these flags."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from nodeproxy.agent.node import available_families
from nodeproxy.forwarding.table import Family
from nodeproxy.kernel.errors import ToolMissing
from nodeproxy.kernel.xtables import XTables
from nodeproxy.kernel.xtables_tools import Variant
from nodeproxy.programmer.base import LocalDetector, NodePortAddresses, ProgrammerConfig, ProgrammingError
from nodeproxy.programmer.iptables.affinity import AffinitySets
from nodeproxy.programmer.iptables.family import FamilyProgrammer
from nodeproxy.programmer.iptables.ruleset import TABLES
from nodeproxy.programmer.rules.kernel_tables import KernelTables

_log = structlog.get_logger(__name__)


async def clean_up(variants: Sequence[str] | None) -> None:
    """Remove everything of ours. Raises `ProgrammingError` with all that could not be removed."""
    families = available_families()
    config = ProgrammerConfig(
        families=families,
        local_detector=LocalDetector(),
        node_port_addresses={family: NodePortAddresses(loopback=family is Family.IPV4) for family in families},
    )
    errors: list[str] = []
    for variant in [Variant(name) for name in variants or ("legacy", "nft")]:
        for family in families:
            try:
                tables = KernelTables(XTables(variant, family.value), TABLES)
                await FamilyProgrammer(family, config, tables, AffinitySets(family)).cleanup()
            except ProgrammingError as error:
                if variants is None and isinstance(error.__cause__, ToolMissing):
                    continue
                errors.append(str(error))
    if errors:
        raise ProgrammingError("; ".join(errors))
    _log.info("cleaned up", families=[int(family) for family in families])
