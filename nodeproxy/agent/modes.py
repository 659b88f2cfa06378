"""Owns which programmer is in force: chosen at the start, changed while the agent runs, and how what was there before goes.

A change is make before break. The new mode is programmed as a whole while the old one serves, and only then does the old one
withdraw, step by step, so that established flows end by themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from nodeproxy.agent.backoff import Backoff
from nodeproxy.agent.cleanup import remove_kube_proxy_sets, remove_others
from nodeproxy.agent.node import programmer_config
from nodeproxy.agent.sync import SyncLoop
from nodeproxy.agent.waiting import wait_at_most
from nodeproxy.cluster.checked import CheckedNode
from nodeproxy.configuration.agent_config import AgentConfig, Mode
from nodeproxy.forwarding.table import Family
from nodeproxy.kernel.errors import KernelError
from nodeproxy.kernel.variant import detect_variant
from nodeproxy.kernel.xtables_tools import Variant
from nodeproxy.programmer.base import Programmer, ProgrammerConfig, ProgrammingError, Withdrawal
from nodeproxy.programmer.iptables.programmer import IptablesProgrammer
from nodeproxy.programmer.ipvs.programmer import IpvsProgrammer
from nodeproxy.programmer.ipvs.settings import IpvsSettings
from nodeproxy.programmer.ipvs.system import apply_settings, require_features
from nodeproxy.programmer.ipvs.withdrawal import addresses_are_left

_log = structlog.get_logger(__name__)

_STEP_SECONDS = 2.0


class Modes:
    """The programmer in force on this node. `node` tells what the Node object says now."""

    def __init__(self, config: AgentConfig, families: Sequence[Family], node: Callable[[], CheckedNode | None]) -> None:
        self._config = config
        self._families = tuple(families)
        self._node = node
        self._variant = Variant.NFT
        self._draining = False
        self._leaving: tuple[Programmer, ...] = ()
        self._changed = asyncio.Event()
        self._writing = asyncio.Lock()  # held by whoever changes what serves, or takes away what served
        self.mode = config.mode

    async def start(self, config: AgentConfig) -> None:
        """Prepare the programmer of the configured mode, or that of the fallback where the kernel lacks something.

        Raises `ProgrammingError` with what is missing and what to do.
        """
        self._variant = choose_variant(config)
        self._draining = await self._addresses_are_left()
        self.mode, self.programmer, self._in_force = await self._prepared(config)
        self._config = config

    async def change(self, config: AgentConfig, sync: SyncLoop) -> None:
        """Put a changed configuration into force, in another mode if it says so.

        Raises `ProgrammingError` where that cannot be; what was in force stays so.
        """
        async with self._writing:
            self._draining = self._draining or (self.mode is Mode.IPVS and await self._addresses_are_left())
            try:
                mode, programmer, in_force = await self._prepared(config)
                await sync.switch(programmer, config.min_sync_period_of(mode), back=self._in_force)
                self._config, self.mode, self.programmer, self._in_force = config, mode, programmer, in_force
            finally:
                self._changed.set()
        if self.refresh():  # the Node changed meanwhile
            sync.request()

    async def _prepared(self, config: AgentConfig) -> tuple[Mode, Programmer, ProgrammerConfig]:
        """The programmer of the configured mode or of the fallback, ready to apply."""
        try:
            return await self._prepared_for(config, config.mode)
        except ProgrammingError as error:
            if config.fallback is None or config.fallback is config.mode:
                raise
            _log.warning(
                "falling back to another mode", wanted=str(config.mode), mode=str(config.fallback), reason=str(error)
            )
            return await self._prepared_for(config, config.fallback)

    async def _prepared_for(self, config: AgentConfig, mode: Mode) -> tuple[Mode, Programmer, ProgrammerConfig]:
        in_force = self._programmer_config(config, mode)
        programmer = self._make(config, mode, in_force)
        await programmer.prepare()
        return mode, programmer, in_force

    def refresh(self) -> bool:
        """Tell the programmer what it needs to know of the node now. True where that changed, so that a sync is needed."""
        fresh = self._programmer_config(self._config, self.mode)
        if fresh == self._in_force:
            return False
        self._in_force = fresh
        self.programmer.configure(fresh)
        return True

    @property
    def draining(self) -> int:
        """How many real servers drain, of this mode and of those that leave. In any thread."""
        return sum(programmer.draining for programmer in (self.programmer, *self._leaving))

    @property
    def variant(self) -> Variant:
        """The variant of iptables that is programmed, once started."""
        return self._variant

    @property
    def in_force(self) -> ProgrammerConfig:
        """How the programmer is configured."""
        return self._in_force

    async def clear_up(self, sync: SyncLoop) -> None:
        """Until cancelled: after the first sync and each change, let go of what other modes and proxies left."""
        await sync.first_sync.wait()
        while True:
            self._changed.clear()
            async with self._writing:
                await remove_others(self._variant, self._families)
                self._leaving = tuple(
                    self._make(self._config, mode, self._in_force) for mode in Mode if mode is not self.mode
                )
            await asyncio.gather(*(self._let_go(other, sync) for other in self._leaving))
            async with self._writing:
                if not self._changed.is_set():
                    await remove_kube_proxy_sets()
                    self._drained(sync)
            await self._changed.wait()

    async def _let_go(self, other: Programmer, sync: SyncLoop) -> None:
        """Have a programmer withdraw, until it is done or another change comes."""
        backoff = Backoff(_STEP_SECONDS, 60.0)
        while True:
            delay = _STEP_SECONDS
            try:
                async with self._writing:
                    if self._changed.is_set():
                        return
                    state = await other.withdraw()
                    if state is Withdrawal.IDLE:
                        self._drained(sync)
            except ProgrammingError as error:
                delay = backoff.next()
                _log.warning("what another mode left is not removed", error=str(error), retry_seconds=round(delay, 1))
            else:
                if state is Withdrawal.DONE:
                    return
                if state is Withdrawal.IDLE:
                    delay = backoff.next()
            await wait_at_most(self._changed, delay)

    def _drained(self, sync: SyncLoop) -> None:
        """Nothing goes through addresses of IPVS mode any more."""
        self._draining = False
        if self.refresh():
            sync.request()

    async def _addresses_are_left(self) -> bool:
        try:
            return await asyncio.to_thread(addresses_are_left, self._families)
        except KernelError as error:
            _log.warning("service addresses of IPVS mode are not guarded while they drain", error=str(error))
            return False

    def _programmer_config(self, config: AgentConfig, mode: Mode) -> ProgrammerConfig:
        draining = self._draining and mode is Mode.IPTABLES
        return programmer_config(config, mode, self._families, self._node(), draining=draining)

    def _make(self, config: AgentConfig, mode: Mode, programmer: ProgrammerConfig) -> Programmer:
        if mode is Mode.IPTABLES:
            return IptablesProgrammer(programmer, self._variant)
        return IpvsProgrammer(programmer, ipvs_settings(config), self._variant)


def choose_variant(config: AgentConfig) -> Variant:
    """The variant of iptables to program, as told or as found on the node. Raises `ProgrammingError`."""
    if config.iptables_variant is not None:
        return Variant(config.iptables_variant)
    try:
        variant, reason = detect_variant()
    except KernelError as error:
        raise ProgrammingError(str(error)) from error
    _log.info("iptables variant", variant=str(variant), reason=reason)
    return variant


def ipvs_settings(config: AgentConfig) -> IpvsSettings:
    """The part of the configuration that IPVS mode alone needs."""
    return IpvsSettings(
        scheduler=config.ipvs_scheduler,
        strict_arp=config.ipvs_strict_arp,
        exclude_cidrs=config.ipvs_exclude_cidrs,
        tcp_timeout=round(config.ipvs_tcp_timeout),
        tcp_fin_timeout=round(config.ipvs_tcpfin_timeout),
        udp_timeout=round(config.ipvs_udp_timeout),
        drain_seconds=config.ipvs_drain_timeout,
    )


def prepare_kernel(config: AgentConfig) -> None:
    """Load modules and set sysctls of the configured mode, so that an agent with fewer privileges can run. Blocking.

    Raises `ProgrammingError` with what is missing.
    """
    if config.mode is Mode.IPVS:
        try:
            require_features(ipvs_settings(config))
        except KernelError as error:
            raise ProgrammingError(str(error)) from error
        apply_settings(ipvs_settings(config))
