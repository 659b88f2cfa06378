"""Owns reading what IPVS mode keeps in the kernel, whoever put it there, and removing it all before the node goes.

The kernel's list of virtual servers may lack some while others come or go in any namespace of the machine: of a few lists,
the fullest counts. /proc/net/ip_vs always lacks some where several namespaces have any, and is not used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from hack.bench.results import IpvsCount
from hack.bench.rules import NotProgrammed
from nodeproxy.kernel.ipvs import IPVS, RealServerState, VirtualServer
from nodeproxy.sandbox.namespace import Namespace, NamespaceError
from nodeproxy.sandbox.pace import scaled

_DEVICE = "kube-ipvs0"  # nodeproxy has the name from kube-proxy
_TIMEOUT = 60.0
_LISTS = 3


@dataclass(frozen=True)
class Listed:
    """What there is. `serving`: how many real servers of a weight above 0 an address has; in the kernel's order."""

    virtual_servers: int
    real_servers: int
    serving: Mapping[str, int]


def listed(where: Namespace) -> Listed:
    """All virtual servers in a namespace."""
    return where.run(_listed)


def _listed() -> Listed:
    with IPVS() as ipvs:
        fullest = max((ipvs.virtual_servers() for _ in range(_LISTS)), key=len)
        return summed_up(ipvs.all_real_servers(fullest))


def summed_up(found: Mapping[VirtualServer, Sequence[RealServerState]]) -> Listed:
    """Figures of virtual servers with their real servers."""
    return Listed(
        virtual_servers=len(found),
        real_servers=sum(map(len, found.values())),
        serving={server.address: sum(real.weight > 0 for real in reals) for server, reals in found.items()},
    )


def real_addresses(where: Namespace) -> set[str]:
    """The addresses of all real servers that get connections, in a namespace."""
    return where.run(_real_addresses)


def _real_addresses() -> set[str]:
    with IPVS() as ipvs:
        fullest = max((ipvs.virtual_servers() for _ in range(_LISTS)), key=len)
        found = ipvs.all_real_servers(fullest)
        return {state.server.address for states in found.values() for state in states if state.weight > 0}


def check_all_there(found: Listed, endpoints: int, addresses: Collection[str]) -> None:
    """Raise NotProgrammed unless each of these cluster IPs is a virtual server with so many endpoints."""
    lacking = [address for address in addresses if found.serving.get(address) != endpoints]
    if lacking:
        raise NotProgrammed(
            f"{len(lacking)} of {len(addresses)} Services are not complete in the kernel, "
            f"{lacking[0]} for one has {found.serving.get(lacking[0], 0)} of {endpoints} endpoints"
        )


def count(where: Namespace, found: Listed) -> IpvsCount:
    """How much there is of everything."""
    entries = _set_entries(where)
    links = where.command(["ip", "-j", "address", "show", "dev", _DEVICE], timeout=scaled(_TIMEOUT)).stdout
    return IpvsCount(
        virtual_servers=found.virtual_servers,
        real_servers=found.real_servers,
        sets=len(entries),
        set_entries=sum(entries),
        addresses=sum(len(link["addr_info"]) for link in json.loads(links)),
    )


def count_so_far(where: Namespace) -> tuple[int, int]:
    """How many IPv4 virtual servers and set entries there are, without reading them."""
    return where.run(_count_so_far), sum(_set_entries(where))


def _set_entries(where: Namespace) -> list[int]:
    """The number of entries of each set."""
    text = where.command(["ipset", "list", "-t"], timeout=scaled(_TIMEOUT)).stdout
    return [int(number) for number in re.findall(r"^Number of entries: (\d+)$", text, re.MULTILINE)]


def _count_so_far() -> int:
    with IPVS() as ipvs:
        return ipvs.count_ipv4()


def remove_all(where: Namespace) -> None:
    """Delete virtual servers and addresses now: with the namespace, they would go while the next agent is measured."""
    where.run(_flush)
    with suppress(NamespaceError):  # where no agent came so far as to make it
        where.command(["ip", "link", "delete", _DEVICE], timeout=scaled(_TIMEOUT))


def _flush() -> None:
    with IPVS() as ipvs:
        ipvs.flush()
