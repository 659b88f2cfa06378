"""Owns a kernel that was saved in files, as a node's operator sends them: iptables-save, ipset-save, ipvsadm-save.

What is not in them is not known, and a walk says so where it needs it: the names of interfaces (so `-i` and `-o` are
unknown, but for the loopback interface), the lists of `recent`. The node's addresses are those of the cluster state.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from nodeproxy.cluster.addresses import parse_address
from nodeproxy.cluster.names import Family
from nodeproxy.kernel.ipset_messages import Entry, SetContents, SetSpec
from nodeproxy.kernel.ipvs_types import RealServer, RealServerState, VirtualServer, VirtualServerSettings
from nodeproxy.programmer.ipvs.names import SetName
from nodeproxy.snapshot.view import NodeView
from nodeproxy.trace.kernel_view import KernelViewError, Route, RouteKind, VirtualServerFound
from nodeproxy.trace.packet import UNKNOWN_INTERFACE, PacketState
from nodeproxy.trace.saved_tables import SavedTables, SavedTablesError, parse_tables

_RULES: Final = {4: "iptables-save", 6: "ip6tables-save"}
_SETS: Final = "ipset-save"
_SERVERS: Final = "ipvsadm-save"
_PROTOCOLS: Final = {"-t": "tcp", "-u": "udp", "--sctp-service": "sctp"}


class SavedKernel:
    """A kernel from files. `local` are the addresses of its node."""

    def __init__(
        self,
        origin: str,
        tables: SavedTables,
        local: frozenset[str],
        sets: Mapping[str, SetContents],
        servers: Mapping[VirtualServer, VirtualServerFound],
    ) -> None:
        self.origin = origin
        self._tables = tables
        self._local = local
        self._sets = sets
        self._servers = servers

    def not_followed(self) -> Sequence[str]:
        return ()

    def tables(self) -> Mapping[str, SavedTables]:
        return {"saved": self._tables}

    def route(self, destination: str, *, source: str | None = None, incoming: str = "", mark: int = 0) -> Route:
        """By the node's addresses alone: all else leaves by an interface whose name is not known."""
        if destination in self._local or ipaddress.ip_address(destination).is_loopback:
            return Route(RouteKind.LOCAL, "lo")
        return Route(RouteKind.UNICAST, UNKNOWN_INTERFACE)

    def own_addresses(self) -> frozenset[str] | None:
        return None

    def ip_set(self, name: str) -> SetContents | None:
        return self._sets.get(name)

    def virtual_server(self, packet: PacketState) -> VirtualServerFound | None:
        at = VirtualServer(packet.family, packet.protocol, packet.destination, packet.port)
        return self._servers.get(at)

    def recent(self, name: str, address: str, seconds: int | None) -> bool | None:
        return None


def load_kernel(path: Path, family: int, view: NodeView) -> SavedKernel:
    """A file of iptables-save (of the family that is asked for), or a directory. Raises KernelViewError."""
    rules = path / _RULES[family] if path.is_dir() else path
    try:
        tables = parse_tables(_read(rules))
    except SavedTablesError as error:
        raise KernelViewError(f"{rules}: {error}") from error
    sets = _read_sets(path / _SETS) if path.is_dir() and (path / _SETS).exists() else {}
    servers = _read_servers(path / _SERVERS) if path.is_dir() and (path / _SERVERS).exists() else {}
    local = {str(address) for address in view.node_addresses}
    held = sets.get(SetName.SERVICE_ADDRESSES.of(Family(family)))
    local.update(entry.text for entry in held.entries) if held is not None else None
    return SavedKernel(f"saved in {path}", tables, frozenset(local), sets, servers)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise KernelViewError(f"{path}: {error.strerror}") from error


def _read_sets(path: Path) -> dict[str, SetContents]:
    """`create NAME TYPE ...` and `add NAME ENTRY ...`, as `ipset save` prints them."""
    specs: dict[str, SetSpec] = {}
    masked: set[str] = set()
    entries: dict[str, list[Entry]] = {}
    for number, line in enumerate(_read(path).splitlines(), 1):
        words = line.split()
        if len(words) >= 3 and words[0] == "create":
            family = 6 if "inet6" in words else 4
            specs[words[1]] = SetSpec(words[1], words[2], family)
            if not {"netmask", "bitmask"}.isdisjoint(words[3:]):
                masked.add(words[1])
        elif len(words) >= 3 and words[0] == "add" and words[1] in specs:
            entries.setdefault(words[1], []).append(Entry(words[2], nomatch="nomatch" in words[3:]))
        elif words:
            raise KernelViewError(f"{path}: line {number} is not what ipset save prints: {line[:80]!r}")
    return {
        name: SetContents(spec, 0, 0, tuple(entries.get(name, ())), masked=name in masked) for name, spec in specs.items()
    }


def _read_servers(path: Path) -> dict[VirtualServer, VirtualServerFound]:
    """`-A -t ADDRESS:PORT -s rr [-p SECONDS]` and `-a -t ADDRESS:PORT -r ADDRESS:PORT -m -w 1`, as `ipvsadm -Sn` prints."""
    settings: dict[VirtualServer, VirtualServerSettings] = {}
    real: dict[VirtualServer, list[RealServerState]] = {}
    for number, line in enumerate(_read(path).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            at = _virtual_server(words)
            if at is None:
                continue  # by firewall mark
            if words[0] == "-A":
                seconds = int(_value(words, "-p")) if "-p" in words else None
                settings[at] = VirtualServerSettings(_value(words, "-s"), seconds)
            else:
                address, port = _endpoint(_value(words, "-r"))
                weight = int(_value(words, "-w"))
                state = RealServerState(RealServer(address, port), weight, 0, 0, 0, masquerade="-m" in words)
                real.setdefault(at, []).append(state)
        except (ValueError, IndexError):
            raise KernelViewError(f"{path}: line {number} is not what ipvsadm -Sn prints: {line[:80]!r}") from None
    return {at: VirtualServerFound(str(at), of, real.get(at, [])) for at, of in settings.items()}


def _virtual_server(words: list[str]) -> VirtualServer | None:
    if words[0] not in ("-A", "-a"):
        raise ValueError(words[0])
    if words[1] == "-f":
        return None
    address, port = _endpoint(words[2])
    return VirtualServer(6 if ":" in address else 4, _PROTOCOLS.get(words[1], words[1]), address, port)


def _value(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def _endpoint(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    address = parse_address(host.removeprefix("[").removesuffix("]"))
    if address is None:
        raise ValueError(text)
    return address.text, int(port)
