"""Owns the choice of the programmer: by mode, with the variant of iptables that fits the node, and the fallback."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from nodeproxy.agent.config import AgentConfig, Mode
from nodeproxy.kernel.errors import KernelError
from nodeproxy.kernel.variant import detect_variant
from nodeproxy.kernel.xtables_tools import Variant
from nodeproxy.programmer.base import Programmer, ProgrammerConfig, ProgrammingError
from nodeproxy.programmer.iptables.programmer import IptablesProgrammer
from nodeproxy.programmer.ipvs.programmer import IpvsProgrammer
from nodeproxy.programmer.ipvs.settings import IpvsSettings

_log = structlog.get_logger(__name__)


async def prepared_programmer(
    config: AgentConfig, programmer: Callable[[Mode], ProgrammerConfig]
) -> tuple[Mode, Programmer]:
    """The programmer of the configured mode, ready to apply, or that of the fallback where the kernel lacks something.

    `programmer` makes the configuration for a mode. Raises `ProgrammingError` with what is missing and what to do.
    """
    variant = choose_variant(config)
    made = _make(config, config.mode, programmer(config.mode), variant)
    try:
        await made.prepare()
    except ProgrammingError as error:
        if config.fallback is None or config.fallback is config.mode:
            raise
        _log.warning("falling back to another mode", wanted=str(config.mode), mode=str(config.fallback), reason=str(error))
    else:
        return config.mode, made
    made = _make(config, config.fallback, programmer(config.fallback), variant)
    await made.prepare()
    return config.fallback, made


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


def _make(config: AgentConfig, mode: Mode, programmer: ProgrammerConfig, variant: Variant) -> Programmer:
    if mode is Mode.IPTABLES:
        return IptablesProgrammer(programmer, variant)
    settings = IpvsSettings(
        scheduler=config.ipvs_scheduler,
        strict_arp=config.ipvs_strict_arp,
        exclude_cidrs=config.ipvs_exclude_cidrs,
        tcp_timeout=round(config.ipvs_tcp_timeout),
        tcp_fin_timeout=round(config.ipvs_tcpfin_timeout),
        udp_timeout=round(config.ipvs_udp_timeout),
        drain_seconds=config.ipvs_drain_timeout,
    )
    return IpvsProgrammer(programmer, settings, variant)
