"""Owns what IPVS mode needs of the node: kernel features, sysctls and timeouts. Blocking: call in a thread."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator

import structlog

from nodeproxy.kernel import sysctl
from nodeproxy.kernel.errors import KernelError, PermissionMissing
from nodeproxy.kernel.ipset import IPSets
from nodeproxy.kernel.ipvs import IPVS
from nodeproxy.kernel.links import Links
from nodeproxy.programmer.base import ProgrammingError
from nodeproxy.programmer.ipvs.names import DEVICE
from nodeproxy.programmer.ipvs.settings import IpvsSettings

_log = structlog.get_logger(__name__)

_CONNTRACK = "net.ipv4.vs.conntrack"


def require_features(settings: IpvsSettings) -> None:
    """Raise `ProgrammingError` with all that the kernel lacks for IPVS mode, `KernelError` where it may not be asked.

    Loads modules where it can, and makes the interface.
    """
    if missing := _missing_features(settings):
        raise ProgrammingError(
            f"this kernel cannot do IPVS mode: {'; '.join(missing)}. Load the modules on the host (modprobe), "
            "install the kernel's package of extra modules, or use --mode iptables (or --fallback iptables)"
        )


def _missing_features(settings: IpvsSettings) -> list[str]:
    found = []
    try:
        with IPVS() as ipvs:
            ipvs.require()
            if not ipvs.has_scheduler(settings.scheduler):
                found.append(f"no IPVS scheduler {settings.scheduler!r} (module ip_vs_{settings.scheduler})")
        found += _no_conntrack()
    except PermissionMissing:
        raise
    except KernelError:
        found.append("no IPVS (module ip_vs)")
    try:
        with IPSets() as ipsets:
            ipsets.list_names()
    except PermissionMissing:
        raise
    except KernelError:
        found.append("no ipset (modules ip_set, ip_set_hash_ipport, xt_set)")
    try:
        with Links() as links:
            links.ensure_dummy(DEVICE)
    except PermissionMissing:
        raise
    except KernelError as error:
        found.append(f"no interface {DEVICE} ({error})")
    return found


def _no_conntrack() -> list[str]:
    """Without this one, IPVS cannot masquerade, and conntrack takes the replies of its connections for invalid."""
    try:
        if sysctl.get(_CONNTRACK) != "1":
            sysctl.set(_CONNTRACK, "1")
            _log.info("sysctl set", name=_CONNTRACK, value="1")
    except KernelError as error:
        return [f"{_CONNTRACK} is 0 and cannot be set ({error})"]
    return []


def apply_settings(settings: IpvsSettings) -> None:
    """Set sysctls and timeouts. One that cannot be set is said, never fatal."""
    for name, value in _sysctls(settings):
        try:
            if sysctl.get(name) != value:
                sysctl.set(name, value)
                _log.info("sysctl set", name=name, value=value)
        except KernelError as error:
            _log.warning("sysctl not set; going on without", name=name, value=value, error=str(error))
    if settings.tcp_timeout or settings.tcp_fin_timeout or settings.udp_timeout:
        try:
            with IPVS() as ipvs:
                ipvs.set_timeouts(tcp=settings.tcp_timeout, tcp_fin=settings.tcp_fin_timeout, udp=settings.udp_timeout)
        except KernelError as error:
            _log.warning("IPVS timeouts not set; going on without", error=str(error))


def _sysctls(settings: IpvsSettings) -> Iterator[tuple[str, str]]:
    yield "net.ipv4.ip_forward", "1"
    # A client that uses a port again gets a new real server: before Linux 5.9 this cost it a second (and with 4.1 to
    # 5.8 the value 0 is better, which sends it to the old one).
    yield "net.ipv4.vs.conn_reuse_mode", "1" if _kernel_version() >= (5, 9) else "0"
    # Connections of a real server that is gone, and affinity to one that drains, end at once.
    yield "net.ipv4.vs.expire_nodest_conn", "1"
    yield "net.ipv4.vs.expire_quiescent_template", "1"
    if settings.strict_arp:
        # The node answers for service addresses on no interface: only for its own (MetalLB and the like need this).
        yield "net.ipv4.conf.all.arp_ignore", "1"
        yield "net.ipv4.conf.all.arp_announce", "2"


def _kernel_version() -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", platform.release())
    return (int(match[1]), int(match[2])) if match else (0, 0)
