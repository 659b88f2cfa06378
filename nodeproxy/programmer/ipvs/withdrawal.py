"""Owns how IPVS mode leaves the kernel once another mode serves: what established connections go through stays meanwhile.

New connections are redirected before IPVS sees them, as soon as the other mode's rules are in place. Established ones go on
through IPVS: that takes their virtual server (its real servers get weight 0) and its address on the dummy interface, until
they have ended, or the drain time is over. All of it is in the kernel, so an agent that starts goes on where one stopped.

Blocking: call in a thread. Functions and methods raise `KernelError`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence

import structlog

from nodeproxy.forwarding.table import Family
from nodeproxy.kernel.addresses import local_addresses
from nodeproxy.kernel.errors import FeatureMissing
from nodeproxy.kernel.ipset import IPSets, SetSpec
from nodeproxy.kernel.ipvs import IPVS
from nodeproxy.kernel.links import Links
from nodeproxy.programmer.base import Withdrawal
from nodeproxy.programmer.ipvs.adoption import left_by_kube_proxy
from nodeproxy.programmer.ipvs.cleanup import has_traces, remove_from_kernel
from nodeproxy.programmer.ipvs.names import DEVICE, SetName
from nodeproxy.programmer.ipvs.servers import VirtualServers
from nodeproxy.programmer.ipvs.settings import IpvsSettings

_log = structlog.get_logger(__name__)


def addresses_are_left(families: Sequence[Family]) -> bool:
    """Whether IPVS mode left service addresses on this node; if so, the ipsets of them are made complete.

    Rules of the other mode look into these sets (`ProgrammerConfig.draining_addresses`).
    """
    with Links() as links:
        index = links.link_index(DEVICE)
        if index is None:
            return False
        addresses = links.addresses_of(index)
    with IPSets() as ipsets:
        for family in families:
            name = SetName.SERVICE_ADDRESSES.of(family)
            for refused in ipsets.create([SetSpec(name=name, type="hash:ip", family=int(family))]):
                if refused.errno != errno.EEXIST:
                    raise refused
            there = {entry.text for entry in ipsets.contents(name).entries}
            for refused in ipsets.add(name, _of_family(addresses, family) - there):
                raise refused
    return bool(addresses)


class Leaving:
    """What IPVS mode left on this node, on its way out."""

    def __init__(self, families: Sequence[Family], settings: IpvsSettings) -> None:
        self._families = families
        self._settings = settings
        self._servers: dict[Family, VirtualServers] | None = None

    def step(self) -> Withdrawal:
        """Delete what has drained. The first step stops everything from taking new connections."""
        if not has_traces():
            return Withdrawal.DONE
        try:
            if self._servers is None:
                self._servers = self._stop()
            for servers in self._servers.values():
                servers.end_drained()
            in_use = {server.address for servers in self._servers.values() for server in servers}
            self._keep_addresses(in_use)
        except FeatureMissing:
            in_use = set()  # no IPVS in this kernel, so nothing goes through it
        if in_use:
            return Withdrawal.CARRIES_FLOWS
        errors = remove_from_kernel()
        if errors:
            _log.debug("not removed yet", errors=errors)
            return Withdrawal.IDLE
        _log.info("IPVS mode has left the node")
        return Withdrawal.DONE

    @property
    def draining(self) -> int:
        """How many real servers still drain."""
        return sum(servers.draining for servers in (self._servers or {}).values())

    def _stop(self) -> dict[Family, VirtualServers]:
        with Links() as links:
            index = links.link_index(DEVICE)
            addresses = links.addresses_of(index) if index is not None else set()
        with IPSets() as ipsets:
            theirs = left_by_kube_proxy(ipsets, addresses, local_addresses(excluding=(DEVICE,)))
        result = {}
        for family in self._families:
            servers = VirtualServers(family, self._settings, IPVS())
            servers.read(theirs)
            servers.lower(dict.fromkeys(servers), drain_udp=True)
            result[family] = servers
        return result

    def _keep_addresses(self, in_use: set[str]) -> None:
        with Links() as links, IPSets() as ipsets:
            index = links.link_index(DEVICE)
            if index is None:
                return
            gone = links.addresses_of(index) - in_use
            links.remove_addresses(index, gone)
            for family in self._families:
                ipsets.remove(SetName.SERVICE_ADDRESSES.of(family), _of_family(gone, family))


def _of_family(addresses: Iterable[str], family: Family) -> set[str]:
    return {address for address in addresses if (":" in address) == (family is Family.IPV6)}
