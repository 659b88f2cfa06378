"""Owns what a virtual server of IPVS makes of a new connection: which real servers it may go to, with which chances."""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from nodeproxy.kernel.ipvs_types import RealServerState
from nodeproxy.trace.kernel_view import VirtualServerFound
from nodeproxy.trace.walk import End, Step, Way

# Schedulers that give each connection in turn, or to the least busy: in the long run by weight. Others go by addresses.
_BY_WEIGHT: Final = frozenset(("wrr", "wlc", "sed", "nq"))
_ALIKE: Final = frozenset(("rr", "lc"))


def scheduled(way: Way, found: VirtualServerFound) -> list[Way]:
    """The ways after the virtual server. A real server with weight 0 takes no new connection; without any it is rejected."""
    settings = found.settings
    usable = sorted((one for one in found.real_servers if one.weight > 0), key=_place)
    resting = len(found.real_servers) - len(usable)
    persistent = f", persistent {settings.persistence_seconds} s" if settings.persistence_seconds is not None else ""
    remark = f"scheduler {settings.scheduler}{persistent}, {len(usable)} real servers"
    if resting:
        remark += f", {resting} with weight 0"
    step = Step(f"virtual server {found.name}", remark=remark)
    here = way.passed(step)
    if not usable:
        reason = f"virtual server {found.name} has no real server that takes new connections"
        return [here.ended(End.REJECTED, reason)]
    chances = _chances(settings.scheduler, usable)
    if chances is None:
        step = replace(step, remark=f"{remark}; which one it is depends on addresses")
        here, chances = way.passed(step), [1 / len(usable)] * len(usable)
    return [_to(here, one, chance) for one, chance in zip(usable, chances, strict=True)]


def _to(way: Way, one: RealServerState, chance: float) -> Way:
    """IPVS rewrites the destination; conntrack does not take that for a DNAT."""
    packet = replace(way.packet, destination=one.server.address, port=one.server.port or way.packet.port, carried=True)
    step = Step(f"real server {one.server}", remark=f"weight {one.weight}" if one.masquerade else "not by masquerading")
    return replace(way, chance=way.chance * chance, packet=packet).passed(step)


def _chances(scheduler: str, servers: list[RealServerState]) -> list[float] | None:
    if scheduler in _ALIKE:
        return [1 / len(servers)] * len(servers)
    if scheduler in _BY_WEIGHT:
        total = sum(one.weight for one in servers)
        return [one.weight / total for one in servers]
    return None


def _place(one: RealServerState) -> tuple[str, int]:
    return one.server.address, one.server.port
