"""Owns reading what IPVS mode keeps in the kernel, whoever put it there, and removing it all before the node goes.

The list of virtual servers is read from /proc: one read, and nothing of nodeproxy is used to judge nodeproxy.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hack.bench.results import IpvsCount
from hack.bench.rules import NotProgrammed
from nodeproxy.kernel.ipvs import IPVS
from nodeproxy.sandbox.namespace import Namespace, NamespaceError
from nodeproxy.sandbox.pace import scaled

_DEVICE = "kube-ipvs0"  # nodeproxy has the name from kube-proxy
_LIST = Path("/proc/thread-self/net/ip_vs")
_TIMEOUT = 60.0
_LISTS = 3


@dataclass
class Listed:
    """The virtual servers in the kernel's order: the addresses, and how many real servers of a weight above 0 each has."""

    addresses: list[str] = field(default_factory=list)
    serving: list[int] = field(default_factory=list)
    real_servers: int = 0


def listed(where: Namespace) -> Listed:
    """All virtual servers in a namespace. The fullest of some lists: one has gaps while others come and go anywhere."""
    return max((parse(where.run(_LIST.read_text)) for _ in range(_LISTS)), key=lambda found: found.real_servers)


def parse(text: str) -> Listed:
    """What /proc/net/ip_vs says: a line for each virtual server, then `  -> ...` for each of its real servers."""
    found = Listed()
    for line in text.splitlines()[3:]:
        if line.startswith("  -> "):
            found.real_servers += 1
            found.serving[-1] += int(line.split()[3]) > 0
        else:
            found.addresses.append(_address(line.split()[1].rpartition(":")[0]))
            found.serving.append(0)
    return found


def _address(text: str) -> str:
    """`0A600001` or `[fd00:0000:...]`, as usually written."""
    return str(ipaddress.ip_address(text.strip("[]") if text.startswith("[") else int(text, 16)))


def check_all_there(found: Listed, endpoints: int, addresses: Collection[str]) -> None:
    """Raise NotProgrammed unless each of these cluster IPs is a virtual server with so many endpoints."""
    serving = dict(zip(found.addresses, found.serving, strict=True))
    lacking = [address for address in addresses if serving.get(address) != endpoints]
    if lacking:
        raise NotProgrammed(
            f"{len(lacking)} of {len(addresses)} Services are not complete in the kernel, "
            f"{lacking[0]} for one has {serving.get(lacking[0], 0)} of {endpoints} endpoints"
        )


def count(where: Namespace, found: Listed) -> IpvsCount:
    """How much there is of everything."""
    entries = _set_entries(where)
    links = where.command(["ip", "-j", "address", "show", "dev", _DEVICE], timeout=scaled(_TIMEOUT)).stdout
    return IpvsCount(
        virtual_servers=len(found.addresses),
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
