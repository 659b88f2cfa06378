"""Owns health-check node ports (SPEC section 4): one HTTP server for each Service of type LoadBalancer and policy Local.

A load balancer asks each node there whether it has endpoints of the Service. Addresses are those of kube-proxy 1.36: in each
family of the Service all, or those of the node that nodePortAddresses allow. All servers share one event loop, and
each listens on its own: one that cannot, because the port is in use, is tried again and holds up nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, NamedTuple

import msgspec
import structlog

from nodeproxy.agent.backoff import Backoff
from nodeproxy.agent.events import HEALTH_CHECK_FAILED, EventRecorder
from nodeproxy.agent.http_server import Answer, Connections, Listener, bound
from nodeproxy.agent.metrics import Metrics
from nodeproxy.agent.waiting import wait_at_most
from nodeproxy.forwarding.table import Delta, Family, ForwardingTable, HealthCheck, ServiceName
from nodeproxy.kernel.addresses import LocalAddress
from nodeproxy.programmer.base import NodePortAddresses

_log = structlog.get_logger(__name__)

_RETRY_SECONDS: Final = (1.0, 60.0)
_WANTED_FILES: Final = 65536
_EVERYWHERE: Final = {Family.IPV4: "0.0.0.0", Family.IPV6: "::"}


class _Place(NamedTuple):
    """Where to listen. `scope`: interface index of a link-local address, else 0."""

    address: str
    port: int
    scope: int


class _Waiting:
    """A place that could not be had. `retry_at`: monotonic seconds."""

    def __init__(self) -> None:
        self._backoff = Backoff(*_RETRY_SECONDS)
        self.retry_at = 0.0

    def failed(self) -> None:
        """Not this time either."""
        self.retry_at = time.monotonic() + self._backoff.next()


class _Server:
    """All listeners of one Service: those that are open, and those that wait."""

    def __init__(self) -> None:
        self.open: dict[_Place, Listener] = {}
        self.waiting: dict[_Place, _Waiting] = {}
        self.complained = False


class _Body(msgspec.Struct, frozen=True, rename="camel"):
    """What kube-proxy's health-check node ports say."""

    service: Mapping[str, str]
    local_endpoints: int
    service_proxy_healthy: bool


class HealthCheckServers:
    """Serves the health-check node ports of the table that is programmed.

    `healthy`: whether the service proxy is (`Health.alive`). `allowed`: nodePortAddresses of each family of the node;
    `addresses`: the node's, which matter where only some of them are allowed.
    """

    def __init__(
        self,
        *,
        healthy: Callable[[], bool],
        events: EventRecorder,
        metrics: Metrics,
        allowed: Mapping[Family, NodePortAddresses],
        addresses: Iterable[LocalAddress] = (),
    ) -> None:
        self._healthy = healthy
        self._events = events
        self._metrics = metrics
        self._allowed = dict(allowed)
        self._node_addresses = frozenset(addresses)
        self._allowed_addresses = _matching(self._allowed, self._node_addresses)
        self._checks: dict[ServiceName, HealthCheck] = {}
        self._servers: dict[ServiceName, _Server] = {}
        self._touched: set[ServiceName] = set()
        self._connections = Connections()
        self._first = True
        self._wake = asyncio.Event()

    def programmed(self, table: ForwardingTable, delta: Delta) -> None:
        """The kernel holds `table`, of which `delta` is new since the last call; with the first call, everything is."""
        changes: Mapping[ServiceName, HealthCheck | None] = table.health_checks if self._first else delta.health_checks
        self._first = False
        for name, check in changes.items():
            before = self._checks.get(name)
            if check is None:
                self._checks.pop(name, None)
            else:
                self._checks[name] = check
            if _listening(before) != _listening(check):
                self._touch([name])

    def configure(self, allowed: Mapping[Family, NodePortAddresses]) -> None:
        """Take other nodePortAddresses. Servers move where that makes a difference."""
        self._allowed = dict(allowed)
        self._look_again()

    def take_addresses(self, addresses: Iterable[LocalAddress]) -> None:
        """The node has these addresses now (without those that are on an interface for Services)."""
        self._node_addresses = frozenset(addresses)
        self._look_again()

    async def run(self) -> None:
        """Listen as told until cancelled."""
        _raise_file_limit()
        try:
            while True:
                self._wake.clear()
                await self._reconcile()
                await wait_at_most(self._wake, self._seconds_to_retry())
        finally:
            for server in self._servers.values():
                for listener in server.open.values():
                    listener.close()
            self._connections.close()

    def _look_again(self) -> None:
        found = _matching(self._allowed, self._node_addresses)
        if found != self._allowed_addresses:
            self._allowed_addresses = found
            self._touch(self._checks)

    def _touch(self, names: Iterable[ServiceName]) -> None:
        self._touched.update(names)
        self._wake.set()

    async def _reconcile(self) -> None:
        """Close everything first that is to be closed: a port may go from one Service to another."""
        touched, self._touched = self._touched, set()
        freed: set[int] = set()
        for name in touched:
            freed.update(self._close_unwanted(name))
        now = time.monotonic()
        for name, server in list(self._servers.items()):
            due = [place for place, wait in server.waiting.items() if wait.retry_at <= now or place.port in freed]
            for place in due:
                await self._try(name, server, place)
        self._metrics.health_check_ports.set(
            sum(1 for server in self._servers.values() if server.open and not server.waiting)
        )

    def _close_unwanted(self, name: ServiceName) -> Iterator[int]:
        """Close what a Service no longer needs, and note what it needs more. Yields the ports that became free."""
        wanted = set(self._places(name))
        server = self._servers.setdefault(name, _Server())
        for place in server.open.keys() - wanted:
            server.open.pop(place).close()
            yield place.port
        for place in server.waiting.keys() - wanted:
            del server.waiting[place]
        if not server.waiting:
            server.complained = False  # what was wrong with a former port is over
        for place in wanted - server.open.keys() - server.waiting.keys():
            server.waiting[place] = _Waiting()
        if not wanted:
            del self._servers[name]

    def _places(self, name: ServiceName) -> Iterator[_Place]:
        check = self._checks.get(name)
        if check is None:
            return
        for family in check.families:
            for address, scope in self._allowed_addresses.get(family, ()):
                yield _Place(address, check.port, scope)

    async def _try(self, name: ServiceName, server: _Server, place: _Place) -> None:
        listener = self._connections.listener(lambda _: self._answer(name))
        try:
            sock = bound(place.address, place.port, scope=place.scope)
        except OSError as error:
            server.waiting[place].failed()
            self._complain(name, server, place, error)
            return
        del server.waiting[place]
        server.open[place] = listener
        await listener.open(sock)
        if server.complained and not server.waiting:
            server.complained = False
            _log.info("health-check node port is open now", service=str(name), port=place.port)

    def _complain(self, name: ServiceName, server: _Server, place: _Place, error: OSError) -> None:
        """Once for each Service, until all is well with it."""
        if server.complained:
            return
        server.complained = True
        reason = error.strerror or str(error)
        _log.error(
            "cannot listen on a health-check node port; trying again",
            service=str(name),
            port=place.port,
            address=place.address,
            error=reason,
        )
        self._events.service(
            name, HEALTH_CHECK_FAILED, f"cannot listen on health-check node port {place.port} of {place.address}: {reason}"
        )

    def _seconds_to_retry(self) -> float | None:
        times = [wait.retry_at for server in self._servers.values() for wait in server.waiting.values()]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _answer(self, name: ServiceName) -> Answer:
        check = self._checks.get(name)
        endpoints = check.local_endpoints if check is not None else 0
        healthy = self._healthy()
        body = _Body({"namespace": name.namespace, "name": name.name}, endpoints, healthy)
        return Answer(
            status=200 if endpoints > 0 and healthy else 503,
            content_type="application/json",
            body=msgspec.json.encode(body),
            headers={"X-Load-Balancing-Endpoint-Weight": str(endpoints)},
        )


def _listening(check: HealthCheck | None) -> tuple[int, tuple[Family, ...]] | None:
    """As much of a health check as decides where to listen."""
    return None if check is None else (check.port, check.families)


def _matching(
    allowed: Mapping[Family, NodePortAddresses], addresses: Iterable[LocalAddress]
) -> dict[Family, tuple[tuple[str, int], ...]]:
    """Addresses to listen on, with their scope, by family. One that is tentative cannot be listened on yet."""
    found: dict[Family, tuple[tuple[str, int], ...]] = {}
    for family, those in allowed.items():
        if those.cidrs is None:
            found[family] = ((_EVERYWHERE[family], 0),)
            continue
        networks = [ipaddress.ip_network(cidr) for cidr in those.cidrs]
        found[family] = tuple(
            sorted(
                {
                    (one.address, one.interface_index if one.link_local and family is Family.IPV6 else 0)
                    for one in addresses
                    if one.family == family and not one.tentative and _within(one.address, networks)
                }
            )
        )
    return found


def _within(address: str, networks: Iterable[ipaddress.IPv4Network | ipaddress.IPv6Network]) -> bool:
    parsed = ipaddress.ip_address(address)
    return any(parsed in network for network in networks)


def _raise_file_limit() -> None:
    """A listener is a file descriptor, and the usual soft limit is 1,024: raise it, as Go programs do by themselves."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(_WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
