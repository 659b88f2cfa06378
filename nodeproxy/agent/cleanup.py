"""Owns removing what agents left: all of it (`nodeproxy cleanup`), or what ours took the place of."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence, Set

import structlog

from nodeproxy.agent.node import available_families
from nodeproxy.forwarding.table import Family
from nodeproxy.kernel.errors import FeatureMissing, KernelError, ToolMissing
from nodeproxy.kernel.ipset import IPSets
from nodeproxy.kernel.nft_tables import NftTables
from nodeproxy.kernel.xtables import XTables
from nodeproxy.kernel.xtables_tools import Variant
from nodeproxy.programmer.base import (
    LocalDetector,
    NodePortAddresses,
    ProgrammerConfig,
    ProgrammingError,
    Withdrawal,
)
from nodeproxy.programmer.iptables import base_chains
from nodeproxy.programmer.iptables.affinity import AffinitySets
from nodeproxy.programmer.ipvs import rules as ipvs_rules
from nodeproxy.programmer.ipvs.cleanup import remove_beside_kube_proxy, remove_from_kernel
from nodeproxy.programmer.ipvs.settings import IpvsSettings
from nodeproxy.programmer.ipvs.withdrawal import Leaving
from nodeproxy.programmer.kube_proxy_traces import (
    JUMPS,
    KUBE_PROXY_SETS,
    NFT_TABLE,
    kube_proxy_modes,
    reached_by_kube_proxy,
)
from nodeproxy.programmer.rules import transaction as tx
from nodeproxy.programmer.rules.kernel_tables import KernelTables

_log = structlog.get_logger(__name__)

_TABLES = ("mangle", "nat", "filter")
_POLL_SECONDS = 2.0
_SAY_SECONDS = 30.0


async def clean_up(variants: Sequence[str] | None, drain_seconds: float = 900.0) -> None:
    """Remove everything of ours. Raises `ProgrammingError` with all that could not be removed.

    Where kube-proxy has taken the node over, what it programmed stays, though it has our names; and what IPVS mode left goes
    when its connections have ended, after `drain_seconds` at the latest.
    """
    families = available_families()
    holders, errors = await _remove_all_rules([Variant(name) for name in variants or ()], families)
    for family in families:
        await AffinitySets(family).keep_only(())
    if await asyncio.to_thread(_nft_tables, families):
        holders.add("nftables")
    if holders:
        _log.info("kube-proxy serves this node; what it programmed stays", modes=sorted(holders))
    if "ipvs" in holders:
        errors += await asyncio.to_thread(remove_beside_kube_proxy)
    else:
        if holders:
            await _drain(families, drain_seconds)
        errors += await asyncio.to_thread(remove_from_kernel)
    if errors:
        raise ProgrammingError("; ".join(errors))
    _log.info("cleaned up", families=[int(family) for family in families])


async def _remove_all_rules(named: Sequence[Variant], families: Sequence[Family]) -> tuple[set[str], list[str]]:
    """Remove our rules of the variants that were named, else of every variant that the node has programs of.

    Returns the modes in which kube-proxy holds rules, and what could not be removed or not even be looked at.
    """
    holders: set[str] = set()
    errors: list[str] = []
    for family in families:
        missing: list[ToolMissing] = []
        for variant in named or Variant:
            try:
                holders |= await _remove_rules(variant, family)
            except ToolMissing as error:
                missing.append(error)
            except KernelError as error:
                errors.append(f"IPv{int(family)}, {variant}: {error}")
        if missing and (named or len(missing) == len(Variant)):  # most nodes have the programs of one variant only
            errors.append(f"rules of IPv{int(family)} were not looked at: {'; '.join(map(str, missing))}")
    return holders, errors


async def _drain(families: Sequence[Family], seconds: float) -> None:
    """Wait until no connection goes through what IPVS mode left."""
    leaving = Leaving(families, IpvsSettings(drain_seconds=seconds))
    said = -_SAY_SECONDS
    while await asyncio.to_thread(leaving.step) is Withdrawal.CARRIES_FLOWS:
        if time.monotonic() - said >= _SAY_SECONDS:
            _log.info("waiting for connections through IPVS to end", real_servers=leaving.draining, at_most_seconds=seconds)
            said = time.monotonic()
        await asyncio.sleep(_POLL_SECONDS)


async def remove_others(variant: Variant, families: Sequence[Family]) -> None:
    """Remove rules that served before and that ours, in `variant`, do not replace: those of the other variant of iptables,
    and kube-proxy's table of nftables mode. What cannot be removed is said.
    """
    for other in Variant:
        for family in families if other is not variant else ():
            with contextlib.suppress(ToolMissing), _said("rules of the other iptables variant"):
                await _remove_rules(other, family, kube_proxys=True)
    with _said("kube-proxy's nftables table"):
        await asyncio.to_thread(_remove_nft_tables, families)


async def remove_kube_proxy_sets() -> None:
    """Remove the ipsets that only kube-proxy uses, once nobody needs them to tell its virtual servers from others'."""
    with contextlib.suppress(FeatureMissing), _said("ipsets of kube-proxy"):
        await asyncio.to_thread(_remove_sets)


def _remove_nft_tables(families: Sequence[Family]) -> None:
    if tables := _nft_tables(families):
        with NftTables() as nft:
            for family in tables:
                nft.delete(int(family), NFT_TABLE)
        _log.info("removed kube-proxy's nftables table", families=[int(family) for family in tables])


def _remove_sets() -> None:
    with IPSets() as ipsets:
        left = sorted(KUBE_PROXY_SETS.intersection(ipsets.list_names("KUBE-")))
        refused = ipsets.destroy(left)
        if left:
            _log.info("removed kube-proxy's ipsets", sets=left, in_use=[str(one.item) for one in refused])


def _nft_tables(families: Sequence[Family]) -> list[Family]:
    """Families in which kube-proxy's nftables mode has a table."""
    try:
        with NftTables() as nft:
            return [family for family in families if NFT_TABLE in nft.list_names(int(family))]
    except FeatureMissing:
        return []


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    """An error of the kernel is logged, and no more."""
    try:
        yield
    except KernelError as error:
        _log.warning("not removed", what=what, error=str(error))


async def _remove_rules(variant: Variant, family: Family, *, kube_proxys: bool = False) -> Set[str]:
    """Remove our rules of one variant and family, and kube-proxy's with `kube_proxys`.

    Returns the modes in which kube-proxy holds them, so that its part stays.
    """
    config = ProgrammerConfig(
        families=(family,),
        local_detector=LocalDetector(),
        node_port_addresses={family: NodePortAddresses(loopback=family is Family.IPV4)},
    )
    tables = KernelTables(XTables(variant, family.value), _TABLES)
    kernel = await tables.read()
    modes: Set[str] = frozenset() if kube_proxys else kube_proxy_modes(kernel)
    theirs = tx.Theirs(reached_by_kube_proxy(kernel), frozenset().union(*(JUMPS[mode] for mode in modes))) if modes else None
    ours = [*base_chains.jumps(family, config), *ipvs_rules.jumps()]
    if text := tx.render(tx.cleanup(ours, kernel, theirs)):
        await tables.restore(text, after_read=True)
        _log.info("removed rules", variant=str(variant), family=int(family))
    return modes
