"""Health-check node ports: where they listen, what they say, and that one of them never holds up another. Real sockets."""

from __future__ import annotations

import asyncio
import resource
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress

import pytest

from nodeproxy.agent.events import HEALTH_CHECK_FAILED
from nodeproxy.agent.metrics import Metrics
from nodeproxy.agent.observers import health_checks
from nodeproxy.agent.observers.health_checks import HealthCheckServers
from nodeproxy.forwarding.table import Delta, Family, ForwardingTable, HealthCheck, ServiceName
from nodeproxy.kernel.addresses import LocalAddress, NodeAddresses
from nodeproxy.programmer.base import NodePortAddresses
from nodeproxy.sandbox.namespace import Namespace, unique_stem
from tests.agent.http_client import free_port, get

BOTH = (Family.IPV4, Family.IPV6)
EVERYWHERE = {family: NodePortAddresses() for family in BOTH}
WEB, SHOP = ServiceName("ns", "web"), ServiceName("ns", "shop")


class Events:
    """Remembers what was recorded."""

    def __init__(self) -> None:
        self.seen: list[tuple[ServiceName, str, str]] = []

    def service(self, name: ServiceName, reason: str, note: str, *, warning: bool = True) -> None:
        assert warning
        self.seen.append((name, reason, note))

    def node(self, reason: str, note: str, *, warning: bool = False) -> None:
        raise AssertionError("nothing here is about the node")


class Node:
    """The servers of a node, and a table that they follow."""

    def __init__(self, allowed: Mapping[Family, NodePortAddresses], addresses: tuple[LocalAddress, ...] = ()) -> None:
        self.healthy = True
        self.events, self.metrics = Events(), Metrics()
        self.table = ForwardingTable(rows={}, health_checks={})
        self.servers = HealthCheckServers(
            healthy=lambda: self.healthy,
            events=self.events,
            metrics=self.metrics,
            allowed=allowed,
            addresses=addresses,
        )

    def put(self, *checks: HealthCheck | ServiceName) -> None:
        """Program health checks, and take away those of the Services named."""
        delta: dict[ServiceName, HealthCheck | None] = {}
        for check in checks:
            if isinstance(check, HealthCheck):
                delta[check.service] = self.table.health_checks[check.service] = check
            else:
                delta[check] = None
                del self.table.health_checks[check]
        self.servers.programmed(self.table, Delta(rows={}, health_checks=delta))

    async def ports_open(self, count: int) -> None:
        """Wait until so many Services have all that they should have."""
        await until(lambda: self.metrics.registry.get_sample_value("nodeproxy_health_check_ports") == count)


@asynccontextmanager
async def running(
    allowed: Mapping[Family, NodePortAddresses] = EVERYWHERE, addresses: tuple[LocalAddress, ...] = ()
) -> AsyncIterator[Node]:
    node = Node(allowed, addresses)
    task = asyncio.create_task(node.servers.run())
    try:
        yield node
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(done: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not done():  # noqa: ASYNC110 - what is waited for knows nothing of events
            await asyncio.sleep(0.005)


async def refused(port: int, host: str = "127.0.0.1") -> bool:
    try:
        await get(port, "/", host)
    except ConnectionRefusedError:
        return True
    except (ConnectionResetError, asyncio.IncompleteReadError):  # it was closed in this moment
        return await refused(port, host)
    return False


async def becomes_refused(port: int, host: str = "127.0.0.1") -> None:
    async with asyncio.timeout(10):
        while not await refused(port, host):  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def becomes_answered(port: int, host: str) -> None:
    async with asyncio.timeout(10):
        while True:
            with suppress(OSError, asyncio.IncompleteReadError):
                assert (await get(port, "/", host)).status == 200
                return
            await asyncio.sleep(0.01)


async def answered_for(port: int, name: str) -> None:
    """Wait until a port answers for a Service."""
    async with asyncio.timeout(10):
        while True:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                if (await get(port)).json["service"]["name"] == name:
                    return
            await asyncio.sleep(0.005)


def check(port: int, endpoints: int = 1, name: ServiceName = WEB, families: tuple[Family, ...] = BOTH) -> HealthCheck:
    return HealthCheck(name, port, endpoints, families)


async def test_the_answer_tells_endpoints_and_health() -> None:
    port = free_port()
    async with running() as node:
        node.put(check(port, 2))
        await node.ports_open(1)
        for host in ("127.0.0.1", "::1"):
            reply = await get(port, "/any/path?x", host)
            assert reply.status == 200
            assert reply.json == {
                "service": {"namespace": "ns", "name": "web"},
                "localEndpoints": 2,
                "serviceProxyHealthy": True,
            }
            assert reply.headers["content-type"] == "application/json"
            assert reply.headers["x-content-type-options"] == "nosniff"
            assert reply.headers["x-load-balancing-endpoint-weight"] == "2"
        node.healthy = False
        reply = await get(port)
        assert (reply.status, reply.json["serviceProxyHealthy"], reply.json["localEndpoints"]) == (503, False, 2)
        node.healthy = True
        node.put(check(port, 0))
        reply = await get(port)
        assert (reply.status, reply.json["localEndpoints"]) == (503, 0)
        assert reply.headers["x-load-balancing-endpoint-weight"] == "0"
        assert (await get(port, method="HEAD")).status == 503


async def test_only_the_families_of_the_service_and_of_the_node() -> None:
    four, six = free_port(), free_port()
    async with running() as node:
        node.put(check(four, families=(Family.IPV4,)), check(six, name=SHOP, families=(Family.IPV6,)))
        await node.ports_open(2)
        assert not await refused(four)
        assert await refused(four, "::1")
        assert await refused(six)
        assert not await refused(six, "::1")
    async with running({Family.IPV4: NodePortAddresses()}) as node:
        node.put(check(four))
        await node.ports_open(1)
        assert await refused(four, "::1")


async def test_a_server_moves_with_its_port_and_goes_with_its_service() -> None:
    first, second = free_port(), free_port()
    async with running() as node:
        node.put(check(first))
        await node.ports_open(1)
        node.put(check(second))
        await becomes_refused(first)
        assert (await get(second)).status == 200
        node.put(WEB)
        await becomes_refused(second)
        await node.ports_open(0)
        node.put(check(first))
        await node.ports_open(1)
        assert (await get(first)).status == 200
    assert await refused(first)


async def test_two_services_can_change_ports() -> None:
    first, second = free_port(), free_port()
    async with running() as node:
        node.put(check(first), check(second, name=SHOP))
        await node.ports_open(2)
        node.put(check(second), check(first, name=SHOP))
        await answered_for(first, "shop")
        await answered_for(second, "web")
        assert node.events.seen == []


async def test_the_first_call_takes_the_whole_table() -> None:
    port = free_port()
    async with running() as node:
        node.table.health_checks[WEB] = check(port)
        node.put()
        await node.ports_open(1)
        assert (await get(port)).status == 200


async def test_a_port_in_use_is_an_event_and_holds_up_nothing() -> None:
    port = free_port()
    with socket.create_server(("0.0.0.0", 0)) as other:
        used = other.getsockname()[1]
        async with running() as node:
            node.put(check(used), check(port, name=SHOP))
            await node.ports_open(1)
            assert (await get(port)).json["service"]["name"] == "shop"
            assert (await get(used, "/", "::1")).status == 200, "the other family is held up"
            assert [(name, reason) for name, reason, _ in node.events.seen] == [(WEB, HEALTH_CHECK_FAILED)]
            assert f"port {used} of 0.0.0.0: Address already in use" in node.events.seen[0][2]
            other.close()
            await node.ports_open(2)  # tried again
            assert (await get(used)).status == 200
            assert len(node.events.seen) == 1


async def test_who_waits_for_a_port_of_ours_gets_it_when_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_checks, "_RETRY_SECONDS", (3600.0, 3600.0))
    port = free_port()
    async with running() as node:
        node.put(check(port))
        await node.ports_open(1)
        node.put(check(port, name=SHOP))
        await until(lambda: len(node.events.seen) == 1)
        node.put(WEB)
        await answered_for(port, "shop")


async def test_only_addresses_that_are_allowed_and_there() -> None:
    port = free_port()
    here = (LocalAddress("127.0.0.2", 8, 1), LocalAddress("127.0.0.3", 8, 1), LocalAddress("127.0.9.1", 8, 1))
    allowed = {Family.IPV4: NodePortAddresses(cidrs=("127.0.0.0/29",)), Family.IPV6: NodePortAddresses(cidrs=())}
    async with running(allowed, here) as node:
        node.put(check(port))
        await node.ports_open(1)
        assert not await refused(port, "127.0.0.2")
        assert not await refused(port, "127.0.0.3")
        assert await refused(port, "127.0.0.1")
        assert await refused(port, "127.0.9.1")
        assert await refused(port, "::1")

        node.servers.take_addresses(here[1:])  # an address goes
        await becomes_refused(port, "127.0.0.2")
        assert not await refused(port, "127.0.0.3")

        node.servers.take_addresses((LocalAddress("127.0.0.4", 8, 1, tentative=True),))  # the last one goes
        await becomes_refused(port, "127.0.0.3")
        assert await refused(port, "127.0.0.4")
        await node.ports_open(0)

        node.servers.configure(EVERYWHERE)
        await node.ports_open(1)
        for host in ("127.0.0.1", "127.0.9.1", "::1"):
            assert not await refused(port, host)


async def test_an_address_that_comes_later_is_listened_on() -> None:
    port = free_port()
    allowed = {Family.IPV4: NodePortAddresses(cidrs=("192.0.2.0/24",)), Family.IPV6: NodePortAddresses(cidrs=("::1/128",))}
    async with running(allowed, (LocalAddress("192.0.2.1", 24, 1), LocalAddress("::1", 128, 1))) as node:
        node.put(check(port))
        await until(lambda: len(node.events.seen) == 1)  # there is no such address, though somebody said so
        assert (await get(port, "/", "::1")).status == 200
        node.servers.take_addresses((LocalAddress("::1", 128, 1),))
        await node.ports_open(1)
        assert (await get(port, "/", "::1")).status == 200


@pytest.mark.kernel
def test_addresses_of_the_node_are_followed() -> None:
    """On a real link: addresses that are still being checked for duplicates, link-local ones, and ones that go."""
    with Namespace(f"{unique_stem()}-health") as box:
        box.ip(["link set lo up", "link add veth0 type veth peer name veth1", "link set veth1 up", "link set veth0 up"])
        box.wait_links_up(["veth0", "veth1"])
        box.run(asyncio.run, _follow_real_addresses())


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


async def _follow_real_addresses() -> None:
    port = free_port()
    cidrs = {Family.IPV4: ("192.0.2.0/24",), Family.IPV6: ("2001:db8::/64", "fe80::/10")}
    allowed = {family: NodePortAddresses(cidrs=those) for family, those in cidrs.items()}
    with NodeAddresses() as monitor:
        async with running(allowed, tuple(monitor.current)) as node, asyncio.TaskGroup() as group:

            async def follow() -> None:
                async for _ in monitor.changes():
                    node.servers.take_addresses(monitor.current)

            following = group.create_task(follow())
            node.put(check(port))
            for address in ("192.0.2.1/24", "2001:db8::1/64"):
                ip("address", "add", address, "dev", "veth0")
            links = [f"{one.address}%{one.interface()}" for one in monitor.current if one.link_local]
            for host in ("192.0.2.1", "2001:db8::1", *links):
                await becomes_answered(port, host)
            assert await refused(port, "127.0.0.1")
            assert await refused(port, "::1")
            ip("address", "del", "192.0.2.1/24", "dev", "veth0")
            await until(lambda: all(one.address != "192.0.2.1" for one in monitor.current))
            ip("address", "add", "192.0.2.1/32", "dev", "lo")
            await becomes_answered(port, "192.0.2.1")
            assert node.events.seen == []
            following.cancel()
    assert links


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 3000, reason="may not open so many files")
async def test_a_thousand_services_without_a_thread() -> None:
    import threading

    threads = threading.active_count()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))  # as usual; two families need twice as many
    try:
        async with running() as node:
            # ports below those that the kernel gives to others
            checks = [check(20_000 + number, number, ServiceName("ns", f"s{number}")) for number in range(1000)]
            node.put(*checks)
            await node.ports_open(1000)
            for number in (0, 1, 500, 999):
                reply = await get(20_000 + number, "/", "::1")
                assert (reply.status, reply.json["localEndpoints"]) == (200 if number else 503, number)
            assert threading.active_count() == threads
            node.put(*(one.service for one in checks))
            await node.ports_open(0)
            assert await refused(20_500)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
