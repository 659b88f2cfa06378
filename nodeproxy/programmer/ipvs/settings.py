"""Owns what an operator can set about IPVS mode; names and meanings are kube-proxy's where it has them."""

from __future__ import annotations

from msgspec import Struct

SCHEDULERS = ("rr", "wrr", "lc", "wlc", "lblc", "lblcr", "sh", "dh", "sed", "nq", "mh")
"""Schedulers of the kernel (net/netfilter/ipvs/Kconfig); each is a module ip_vs_NAME of its own."""


class IpvsSettings(Struct, frozen=True, kw_only=True):
    """Settings of IPVS mode. Durations in seconds; a timeout of 0 leaves the kernel's.

    Virtual servers at addresses within `exclude_cidrs` are never deleted. `drain_seconds`: how long an endpoint that goes
    keeps its established connections at most.
    """

    scheduler: str = "rr"
    strict_arp: bool = False
    exclude_cidrs: tuple[str, ...] = ()
    tcp_timeout: int = 0
    tcp_fin_timeout: int = 0
    udp_timeout: int = 0
    drain_seconds: float = 900.0
