"""Owns looking at the kernel of this network namespace: rules, ipsets, routes, virtual servers, as they are now.

Nothing is changed by looking: a table that does not exist is not made, a module that is not loaded stays so.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final, Self

from nodeproxy.kernel.addresses import local_addresses
from nodeproxy.kernel.errors import FeatureMissing, ItemRefused, KernelError, RequestRefused, ToolMissing
from nodeproxy.kernel.ipset import IPSets
from nodeproxy.kernel.ipset_messages import SetContents
from nodeproxy.kernel.ipvs import IPVS
from nodeproxy.kernel.ipvs_types import FirewallMark, VirtualServer, VirtualServerSettings
from nodeproxy.kernel.netlink import NETLINK_NETFILTER, NetlinkSocket, attributes
from nodeproxy.kernel.variant import detect_variant
from nodeproxy.kernel.xtables_stamp import NFNL_SUBSYS_NFTABLES, legacy_tables
from nodeproxy.kernel.xtables_tools import Variant, find_tools, run_tool
from nodeproxy.programmer.ipvs.names import DEVICE
from nodeproxy.trace.kernel_view import KernelViewError, Route, VirtualServerFound
from nodeproxy.trace.packet import PacketState
from nodeproxy.trace.routes import Routes
from nodeproxy.trace.saved_tables import SavedTables, SavedTablesError, parse_tables

_NET: Final = Path("/proc/thread-self/net")  # /proc/net is the main thread's namespace
_NFT_MSG_GETTABLE: Final = 1  # include/uapi/linux/netfilter/nf_tables.h
_NFT_FAMILIES: Final = {1: "inet", 2: "ip", 10: "ip6"}
_IPTABLES: Final = ("raw", "mangle", "nat", "filter", "security")
_TICKS_A_SECOND: Final = (100, 250, 300, 1000)


class LiveKernel:
    """The kernel as the calling thread's network namespace has it. `family` is 4 or 6; the other is not looked at.

    `variant`: what the node's agent uses; None: as an agent would choose. Where both variants have rules, both are
    read.
    """

    def __init__(self, family: int, variant: Variant | None = None) -> None:
        self._family = family
        try:
            choice = detect_variant((family,)) if variant is None else None
            self.variant = choice.variant if choice is not None else variant
            self._routes = Routes()
        except KernelError as error:
            raise KernelViewError(str(error)) from error
        self.origin = f"the kernel of this network namespace, iptables {self.variant}"
        if choice is not None:
            self.origin += f" ({choice.reason})"
        self._tables: dict[str, SavedTables] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._routes.close()

    def not_followed(self) -> Sequence[str]:
        """Tables that nft made, not an iptables program: kube-proxy's nftables mode, firewalld."""
        found = []
        try:
            with NetlinkSocket(NETLINK_NETFILTER) as netlink:
                kind = NFNL_SUBSYS_NFTABLES << 8 | _NFT_MSG_GETTABLE
                for message in netlink.dump(kind, bytes(4), request="list nft tables"):
                    family = _NFT_FAMILIES.get(message[0])
                    names = [message[start:end] for key, start, end in attributes(message, 4, len(message)) if key == 1]
                    name = names[0].rstrip(b"\0").decode(errors="replace") if names else ""
                    if family in ("inet", "ip" if self._family == 4 else "ip6") and (
                        family == "inet" or name not in _IPTABLES
                    ):
                        found.append(f"{family} {name}")
        except (FeatureMissing, RequestRefused):
            return ()  # no nf_tables in this kernel
        except KernelError as error:
            raise KernelViewError(str(error)) from error
        return [f"nftables' own tables may decide as well, and are not followed: {', '.join(found)}"] if found else ()

    def tables(self) -> Mapping[str, SavedTables]:
        if self._tables is None:
            assert self.variant is not None
            self._tables = {self.variant.value: self._read(self.variant)}
            for other in Variant:
                if other is not self.variant and (found := self._read_other(other)) is not None and found.rule_count():
                    self._tables[other.value] = found
        return self._tables

    def _read_other(self, variant: Variant) -> SavedTables | None:
        if variant is Variant.LEGACY and not legacy_tables(self._family):
            return None  # reading would create them
        try:
            find_tools(variant, self._family)
        except ToolMissing:
            return None
        return self._read(variant)

    def _read(self, variant: Variant) -> SavedTables:
        if variant is Variant.LEGACY and not legacy_tables(self._family):
            return SavedTables({})
        try:
            program = find_tools(variant, self._family).save
            status, output, message = asyncio.run(run_tool([program, "--counters"]))
        except KernelError as error:
            raise KernelViewError(str(error)) from error
        if status != 0:
            raise KernelViewError(f"{program} failed with status {status}: {' '.join(message.split())}")
        try:
            return parse_tables(output.decode(errors="replace"))
        except SavedTablesError as error:
            raise KernelViewError(f"{program}: {error}") from error

    def route(self, destination: str, *, source: str | None = None, incoming: str = "", mark: int = 0) -> Route:
        try:
            return self._routes.decide(destination, source=source, incoming=incoming, mark=mark)
        except KernelError as error:
            raise KernelViewError(str(error)) from error

    def own_addresses(self) -> frozenset[str] | None:
        try:
            return frozenset(local_addresses(self._family, excluding=(DEVICE,)))
        except KernelError as error:
            raise KernelViewError(str(error)) from error

    def ip_set(self, name: str) -> SetContents | None:
        try:
            with IPSets() as sets:
                return sets.contents(name)
        except ItemRefused:
            return None
        except KernelError as error:
            raise KernelViewError(str(error)) from error

    def virtual_server(self, packet: PacketState) -> VirtualServerFound | None:
        servers = self._virtual_servers
        if not servers and not self._has_ipvs:
            return None
        try:
            with IPVS() as ipvs:
                # The order of the kernel's ip_vs_service_find: by firewall mark, then by address and port, then any port.
                if packet.mark and (marked := ipvs.real_servers(FirewallMark(packet.family, packet.mark))):
                    return VirtualServerFound(f"firewall mark {packet.mark}", VirtualServerSettings("?"), marked)
                for port in (packet.port, 0):
                    at = VirtualServer(packet.family, packet.protocol, packet.destination, port)
                    if at in servers:
                        return VirtualServerFound(str(at), servers[at], ipvs.real_servers(at))
        except KernelError as error:
            raise KernelViewError(str(error)) from error
        return None

    @property
    def _has_ipvs(self) -> bool:
        """Whether IPVS is loaded. Asking it by netlink would load it."""
        return (_NET / "ip_vs").exists()

    @cached_property
    def _virtual_servers(self) -> Mapping[VirtualServer, VirtualServerSettings]:
        if not self._has_ipvs:
            return {}
        try:
            with IPVS() as ipvs:
                return ipvs.virtual_servers()
        except KernelError as error:
            raise KernelViewError(str(error)) from error

    def recent(self, name: str, address: str, seconds: int | None) -> bool | None:
        try:
            text = (_NET / "xt_recent" / Path(name).name).read_text(encoding="ascii", errors="replace")
        except OSError:
            return None
        for line in text.splitlines():
            match = re.match(r"src=(\S+) .*last_seen: (\d+)", line)
            if match is not None and _same(match[1], address):
                if seconds is None:
                    return True
                age = _age(int(match[2]))
                return None if age is None else age <= seconds
        return False


def _same(listed: str, address: str) -> bool:
    try:
        return str(ipaddress.ip_address(listed)) == address
    except ValueError:
        return False


def _age(then: int) -> float | None:
    """Seconds since a moment in jiffies, None where the kernel does not tell how many they are now.

    They count from 300 s below 2**32 on (include/linux/jiffies.h), which tells how many there are in a second.
    """
    try:
        match = re.search(r"^jiffies: (\d+)$", Path("/proc/timer_list").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    if match is None:
        return None
    now, up = int(match[1]), time.clock_gettime(time.CLOCK_MONOTONIC)
    rate = min(_TICKS_A_SECOND, key=lambda hz: abs((now - 2**32) / hz + 300 - up))
    return (now - then) / rate
