"""Owns the virtual servers of one family in the kernel: making them match what is wanted, and draining what goes.

A real server that is not wanted any more gets weight 0: it takes no new connections and keeps those it has. It is deleted
when they have ended, or after the drain time. UDP has no connections to keep: its real servers are deleted at once. A
virtual server that is not wanted stays as long as one of its real servers drains. All of this state is in the kernel, where
an agent that starts finds it: a real server of weight 0 drains, and the flag `OURS` tells which virtual servers are ours.

What the kernel holds is remembered, and believed until the audit, or a refusal, tells otherwise.

Blocking: call in a thread. Methods raise `KernelError`.
"""

from __future__ import annotations

import errno
import ipaddress
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import structlog
from msgspec import Struct, field

from nodeproxy.cluster.addresses import network
from nodeproxy.forwarding.table import Backend, Family
from nodeproxy.kernel.errors import ItemRefused
from nodeproxy.kernel.ipvs import (
    IPVS,
    AddRealServer,
    AddVirtualServer,
    DeleteRealServer,
    DeleteVirtualServer,
    EditRealServer,
    EditVirtualServer,
    Operation,
    RealServer,
    VirtualServer,
    VirtualServerSettings,
)
from nodeproxy.programmer.ipvs.places import OURS, Server
from nodeproxy.programmer.ipvs.settings import IpvsSettings

_log = structlog.get_logger(__name__)

_FIRST_LOOK_SECONDS = 1.0
_LONGEST_REST_SECONDS = 30.0
_LISTING_PERIOD_SECONDS = 2.0
_REST_PER_LISTING = 100  # times as long as the listing of all virtual servers took: at most 1% of a core
_COMPARE_SECONDS = 0.005  # of each audit: for comparing the real servers of some virtual servers, in turn

Wanted = Mapping[VirtualServer, Server | None]
Servers = Mapping[VirtualServer, VirtualServerSettings]
Refusals = dict[VirtualServer, str]


class Programmed(Struct):
    """A virtual server as the kernel has it: backends of weight 1, and those that drain, each with its deadline.

    `look_at`, `rest` and the deadlines are in seconds of the monotonic clock.
    """

    settings: VirtualServerSettings
    backends: tuple[Backend, ...] = ()
    draining: dict[RealServer, float] = field(default_factory=dict)
    wanted: bool = True
    look_at: float = 0.0
    rest: float = _FIRST_LOOK_SECONDS


class VirtualServers:
    """Our virtual servers of one family, and others' where we want ours to be."""

    def __init__(self, family: Family, settings: IpvsSettings, ipvs: IPVS) -> None:
        self._family = int(family)
        self._settings = settings
        self._ipvs = ipvs
        self._programmed: dict[VirtualServer, Programmed] = {}
        self._draining: set[VirtualServer] = set()
        self._others = 0
        self._list_at = 0.0
        self._to_compare: list[VirtualServer] = []

    def __len__(self) -> int:
        return len(self._programmed)

    def __iter__(self) -> Iterator[VirtualServer]:
        return iter(self._programmed)

    @property
    def draining(self) -> int:
        """How many real servers drain."""
        programmed = self._programmed
        return sum(len(have.draining) for server in tuple(self._draining) if (have := programmed.get(server)) is not None)

    def leaving_addresses(self) -> set[str]:
        """Addresses of virtual servers that are not wanted, and still there."""
        return {server.address for server in self._draining if not self._programmed[server].wanted}

    def read(self, theirs: Callable[[Servers], Collection[VirtualServer]]) -> None:
        """Take stock of the kernel's virtual servers that are ours: by their flag, or because kube-proxy left them.

        `theirs` picks the latter from a list.
        """
        listed = self._list(times=3)
        self._programmed.clear()
        self._draining.clear()
        left = theirs(listed)
        self._note({server: settings for server, settings in listed.items() if settings.flags & OURS or server in left})
        self._others = self._count(listed) - len(self._programmed)

    def raise_up(self, wanted: Wanted) -> Refusals:
        """Add what is wanted and not there: virtual servers, settings, real servers. Nothing is taken away.

        Returns what the kernel refuses, with the reason.
        """
        refused = self._try_to_raise(wanted)
        if refused:
            # It may hold something else than believed (EEXIST, ESRCH): once more from what is really there.
            self._read_again(refused)
            refused = self._try_to_raise({server: wanted[server] for server in refused})
            if refused:
                self._read_again(refused)
        return {server: str(error) for server, error in refused.items()}

    def lower(self, wanted: Wanted, *, drain_udp: bool = False) -> None:
        """Drain or delete real servers that are not wanted, and delete virtual servers that nothing holds any more.

        `drain_udp`: the real servers go on serving, and flows to them are kept as if they were connections.
        """
        operations: list[Operation] = []
        deadline = time.monotonic() + self._settings.drain_seconds
        for server, want in wanted.items():
            have = self._programmed.get(server)
            if have is not None:
                cut = server.protocol == "udp" and not drain_udp
                operations += self._operations_down(server, have, want, None if cut else deadline)
        self._carry_out_quietly(operations)

    def end_drained(self) -> set[str]:
        """Delete real servers that have drained; looks at each where it is time. Returns addresses that this left free."""
        now = time.monotonic()
        due = [server for server in self._draining if self._programmed[server].look_at <= now]
        if not due:
            return set()
        operations: list[Operation] = []
        for server, states in self._ipvs.all_real_servers(due).items():
            have = self._programmed[server]
            busy = {state.server for state in states if state.active_connections or state.inactive_connections}
            for real in [real for real, deadline in have.draining.items() if real not in busy or deadline <= now]:
                del have.draining[real]
                operations.append(DeleteRealServer(server, real))
            if have.draining:
                have.rest = min(_LONGEST_REST_SECONDS, have.rest * 2)
                have.look_at = min(now + have.rest, *have.draining.values())
            else:
                operations += self._drained(server, have)
        self._carry_out_quietly(operations)
        return {server.address for server in due if server not in self._programmed}

    def differ(self, whole: bool = False) -> str:
        """What the kernel holds otherwise than programmed, "" for nothing.

        Spread over calls, which then cost about 1% of a core, unless the `whole` is asked for.
        """
        start = time.monotonic()
        # The kernel counts IPv4 virtual servers at no cost; for IPv6 there is only the list.
        uncounted = self._family == 4 and self._ipvs.count_ipv4() != len(self._programmed) + self._others
        if uncounted or whole or start >= self._list_at:
            listed = self._list()
            took = time.monotonic() - start
            self._list_at = start + max(_LISTING_PERIOD_SECONDS, took * _REST_PER_LISTING)
            if self._lacks(listed) and self._lacks(listed := listed | self._list(times=2)):
                return "virtual servers"
            self._others = self._count(listed) - len(self._programmed)
        if whole:
            self._to_compare = list(self._programmed)
        until = time.monotonic() + _COMPARE_SECONDS
        while whole or time.monotonic() < until:
            if not self._to_compare:
                self._to_compare = list(self._programmed)
                if not self._to_compare:
                    return ""
            server = self._to_compare.pop()
            have = self._programmed.get(server)
            if have is not None and not self._as_believed(server, have):
                return f"real servers of {server}"
            if not self._to_compare:
                break  # all of them once in a second is enough
        return ""

    def _try_to_raise(self, wanted: Wanted) -> dict[VirtualServer, ItemRefused]:
        operations: list[Operation] = []
        for server, want in wanted.items():
            if want is not None:
                operations += self._operations_up(server, want)
        refused: dict[VirtualServer, ItemRefused] = {}
        for index, error in self._ipvs.change(operations).items():
            refused.setdefault(_server_of(operations[index]), error)
        for server, want in wanted.items():
            if want is not None and server not in refused:
                self._raised(server, want)
        return refused

    def _operations_up(self, server: VirtualServer, want: Server) -> Iterator[Operation]:
        have = self._programmed.get(server)
        if have is None:
            yield AddVirtualServer(server, want.settings)
            for backend in want.backends:
                yield AddRealServer(server, RealServer(backend.address, backend.port))
            return
        if have.settings != want.settings:
            yield EditVirtualServer(server, want.settings)
        for real in _without(want.backends, have.backends):
            yield EditRealServer(server, real, 1) if real in have.draining else AddRealServer(server, real)

    def _raised(self, server: VirtualServer, want: Server) -> None:
        have = self._programmed.get(server)
        if have is None:
            self._programmed[server] = Programmed(want.settings, want.backends)
            return
        have.settings = want.settings
        have.wanted = True
        back = _without(want.backends, have.backends)
        have.backends += tuple(Backend(real.address, real.port, False) for real in back)
        for real in back:
            have.draining.pop(real, None)
        if not have.draining:
            self._draining.discard(server)

    def _operations_down(
        self, server: VirtualServer, have: Programmed, want: Server | None, deadline: float | None
    ) -> Iterator[Operation]:
        """`deadline`: when draining ends; None: no draining."""
        have.wanted = want is not None
        gone = _without(have.backends, want.backends if want is not None else ())
        for real in gone:
            if deadline is None:
                yield DeleteRealServer(server, real)
            else:
                yield EditRealServer(server, real, 0)
                have.draining[real] = deadline
                have.look_at, have.rest = time.monotonic() + _FIRST_LOOK_SECONDS, _FIRST_LOOK_SECONDS
        if gone:
            leaving = set(gone)
            have.backends = tuple(b for b in have.backends if RealServer(b.address, b.port) not in leaving)
        if have.draining:
            self._draining.add(server)
        else:
            yield from self._drained(server, have)

    def _drained(self, server: VirtualServer, have: Programmed) -> Iterator[Operation]:
        """Nothing drains here any more: one that is not wanted goes."""
        self._draining.discard(server)
        if have.wanted:
            return
        del self._programmed[server]
        address = ipaddress.ip_address(server.address)
        if any(address in network(cidr) for cidr in self._settings.exclude_cidrs):
            self._others += 1
        else:
            yield DeleteVirtualServer(server)

    def _list(self, times: int = 1) -> dict[VirtualServer, VirtualServerSettings]:
        """The kernel's virtual servers. Listed several `times` there are no gaps, which one list has where others, in any
        network namespace, come and go meanwhile."""
        listed: dict[VirtualServer, VirtualServerSettings] = {}
        for _ in range(times):
            listed |= self._ipvs.virtual_servers()
        return {server: settings for server, settings in listed.items() if server.family == self._family}

    def _lacks(self, listed: Mapping[VirtualServer, VirtualServerSettings]) -> bool:
        """Whether a virtual server of ours is not in a list as it should be."""
        return any(listed.get(server) != have.settings for server, have in self._programmed.items())

    def _count(self, listed: Collection[VirtualServer]) -> int:
        """How many there are. What is by firewall mark is counted, but not listed."""
        return self._ipvs.count_ipv4() if self._family == 4 else len(listed)

    def _note(self, listed: Mapping[VirtualServer, VirtualServerSettings]) -> None:
        """Remember virtual servers as the kernel has them. What somebody set that we never set is put right here."""
        deadline = time.monotonic() + self._settings.drain_seconds
        reals = self._ipvs.all_real_servers(listed)
        corrections: list[Operation] = []
        for server, settings in listed.items():
            have = self._programmed[server] = Programmed(settings)
            for state in reals.get(server, ()):
                real = state.server
                if not state.masquerade:
                    corrections.append(DeleteRealServer(server, real))
                elif state.weight == 0:
                    have.draining[real] = deadline
                    self._draining.add(server)
                else:
                    have.backends += (Backend(real.address, real.port, False),)
                    if state.weight != 1:
                        corrections.append(EditRealServer(server, real, 1))
        self._carry_out_quietly(corrections)

    def _read_again(self, servers: Iterable[VirtualServer]) -> None:
        asked = list(servers)
        for server in asked:
            self._programmed.pop(server, None)
            self._draining.discard(server)
        listed = self._list(times=3)
        self._note({server: listed[server] for server in asked if server in listed})
        self._others = self._count(listed) - len(self._programmed)

    def _as_believed(self, server: VirtualServer, have: Programmed) -> bool:
        states = {state.server: state.weight for state in self._ipvs.real_servers(server)}
        believed = {RealServer(backend.address, backend.port): 1 for backend in have.backends}
        return states == believed | dict.fromkeys(have.draining, 0)

    def _carry_out_quietly(self, operations: Sequence[Operation]) -> None:
        """Taking away what is gone already is as good; anything else shows in the next audit."""
        for error in self._ipvs.change(operations).values():
            if error.errno not in (errno.ESRCH, errno.ENOENT):
                _log.warning("virtual server not changed as wanted", error=str(error))
                self._list_at = 0.0


def _server_of(operation: Operation) -> VirtualServer:
    assert isinstance(operation.server, VirtualServer)  # none of ours is by firewall mark
    return operation.server


def _without(some: tuple[Backend, ...], others: tuple[Backend, ...]) -> list[RealServer]:
    """Those of `some` that are not in `others`, as real servers. Whether a backend is local does not matter."""
    if some is others or some == others:
        return []
    there = {(backend.address, backend.port) for backend in others}
    return [RealServer(backend.address, backend.port) for backend in some if (backend.address, backend.port) not in there]
