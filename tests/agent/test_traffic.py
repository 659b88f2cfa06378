"""What is counted of connections that are read again and again: nothing twice, nothing of what was there before."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from nodeproxy.agent.observers import traffic
from nodeproxy.agent.observers.flow_memory import FlowMemory
from nodeproxy.agent.observers.traffic import TrafficCounters
from nodeproxy.agent.observers.traffic_series import Series, SeriesIndex
from nodeproxy.forwarding.table import (
    Action,
    Backend,
    BackendSet,
    Delta,
    Family,
    ForwardingTable,
    Frontend,
    FrontendKind,
    IPProtocol,
    Masquerade,
    RowChange,
    ServicePort,
    ServicePortKey,
    ServicePortName,
)
from nodeproxy.kernel import sysctl
from nodeproxy.kernel.conntrack import TCP, UDP
from nodeproxy.kernel.conntrack_accounting import Account, destination_number
from nodeproxy.kernel.errors import PermissionMissing, SysctlReadOnly

IPV4, IPV6 = Family.IPV4, Family.IPV6
NOTHING: dict[ServicePortKey, RowChange] = {}


def counters(packets: int, octets: int, out_packets: int = 0, out_octets: int = 0) -> bytes:
    """As the kernel's attributes have them."""
    return struct.pack(">8sQ4sQ8sQ4sQ", b"", packets, b"", octets, b"", out_packets, b"", out_octets)


def some_series() -> Series:
    return Series(ServicePortName("shop", "web", "http"), IPProtocol.TCP)


def dump(memory: FlowMemory, *accounts: Account[Series]) -> None:
    memory.count(accounts)
    memory.finish()


def totals(series: Series) -> tuple[int, int, int, int, int]:
    return series.connections, series.in_packets, series.in_bytes, series.out_packets, series.out_bytes


def test_only_what_is_new_since_the_last_dump_is_counted() -> None:
    memory, series = FlowMemory(), some_series()
    dump(memory, (series, 1, counters(10, 1000, 5, 500)))
    assert totals(series) == (0, 0, 0, 0, 0)  # it was there before us
    dump(memory, (series, 1, counters(12, 1200, 6, 600)), (series, 2, counters(1, 60, 1, 40)))
    assert totals(series) == (1, 3, 260, 2, 140)
    dump(memory, (series, 1, counters(12, 1200, 6, 600)))
    assert totals(series) == (1, 3, 260, 2, 140)
    dump(memory, (series, 1, counters(13, 1300, 6, 600)), (series, 2, counters(1, 60, 1, 40)))
    assert totals(series) == (2, 5, 420, 3, 180)  # number 2 was gone: this is another one


def test_a_connection_twice_in_a_dump_counts_once() -> None:
    memory, series = FlowMemory(), some_series()
    dump(memory)
    dump(memory, (series, 1, counters(1, 100)), (series, 1, counters(2, 200)))
    assert totals(series) == (1, 2, 200, 0, 0)
    dump(memory, (series, 1, counters(3, 300)), (series, 1, counters(3, 300)))
    assert totals(series) == (1, 3, 300, 0, 0)


def test_connections_without_counters_are_counted() -> None:
    memory, series = FlowMemory(), some_series()
    dump(memory)
    dump(memory, (series, 1, b""))
    dump(memory, (series, 1, b""))
    assert totals(series) == (1, 0, 0, 0, 0)


def test_counters_that_somebody_zeroed_never_count_backwards() -> None:
    memory, series = FlowMemory(), some_series()
    dump(memory)
    dump(memory, (series, 1, counters(10, 1000, 10, 900)))
    dump(memory, (series, 1, counters(2, 150, 1, 70)))
    assert totals(series) == (1, 12, 1150, 11, 970)


def test_a_dump_that_broke_off_is_followed_by_a_first_one() -> None:
    memory, series = FlowMemory(), some_series()
    dump(memory)
    dump(memory, (series, 1, counters(10, 1000)))
    memory.count([(series, 1, counters(11, 1100))])
    memory.forget()
    dump(memory, (series, 1, counters(12, 1200)))
    dump(memory, (series, 1, counters(13, 1300)))
    assert totals(series) == (1, 12, 1200, 0, 0)


@given(st.lists(st.dictionaries(st.integers(0, 5), st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=6), max_size=6))
def test_sums_equal_those_of_all_connections(growth: list[dict[int, tuple[int, int]]]) -> None:
    """Any history of connections that come, carry packets, rest, and go for good."""
    memory, series = FlowMemory(), some_series()
    dump(memory)
    carried: dict[int, tuple[int, int]] = {}
    alive: set[int] = set()
    for drawn in growth:
        step = {number: more for number, more in drawn.items() if number in alive or number not in carried}
        alive = set(step)
        for number, (packets, octets) in step.items():
            before = carried.get(number, (0, 0))
            carried[number] = before[0] + packets, before[1] + octets
        dump(memory, *((series, number, counters(*carried[number])) for number in step))
    expected = [sum(values) for values in zip(*carried.values(), strict=True)] or [0, 0]
    assert totals(series)[:3] == (len(carried), *expected)


def test_memory_is_bounded_and_a_sample_stands_for_all() -> None:
    memory, series = FlowMemory(limit=1000), some_series()
    numbers = random.Random(7).sample(range(1 << 60), 40_000)
    dump(memory)
    assert memory.sampled_one_in == 1
    dump(memory, *((series, number, counters(1, 100)) for number in numbers))
    assert series.connections == 40_000  # what was new in the dump in which the limit was met is all counted
    assert memory.sampled_one_in == 64
    assert memory._seen is not None
    assert len(memory._seen) <= 1000
    dump(memory, *((series, number, counters(3, 300)) for number in numbers))
    assert series.connections == 40_000
    # 625 are expected in the sample; six standard deviations are 24 in 100
    assert series.in_packets == pytest.approx(40_000 + 80_000, rel=0.24)
    assert series.in_bytes == 100 * series.in_packets


def test_a_sample_grows_again_without_counting_what_it_did_not_see() -> None:
    memory, series = FlowMemory(limit=100), some_series()
    numbers = range(1000)  # their last bits are evenly spread
    dump(memory)
    dump(memory, *((series, number, counters(1, 100)) for number in numbers))
    assert (memory.sampled_one_in, series.connections) == (16, 1000)
    left = [number for number in numbers if number < 96]
    for _ in range(10):
        dump(memory, *((series, number, counters(1, 100)) for number in left))
    assert memory.sampled_one_in < 16
    assert totals(series) == (1000, 1000, 100_000, 0, 0)
    few = left[:16]
    for _ in range(10):
        dump(memory, *((series, number, counters(1, 100)) for number in few))
    assert memory.sampled_one_in == 1
    dump(memory, *((series, number, counters(2, 150)) for number in few))
    assert totals(series) == (1000, 1016, 100_800, 0, 0)


def frontend(address: str | None, port: int) -> Frontend:
    kind = FrontendKind.NODE_PORT if address is None else FrontendKind.CLUSTER_IP
    return Frontend(kind, address, port, Action.FORWARD, BackendSet.CLUSTER, Masquerade.NEVER)


def row(
    name: str, *frontends: Frontend, family: Family = IPV4, protocol: IPProtocol = IPProtocol.TCP, backend: str = "10.1.0.1"
) -> ServicePort:
    key = ServicePortKey(family, ServicePortName("shop", name, "http"), protocol)
    return ServicePort(key, frontends, (Backend(backend, 8080, True),), ())


class Kept:
    """A table and the index that follows it by deltas; every step is compared with an index made afresh."""

    def __init__(self) -> None:
        self.table = ForwardingTable(rows={}, health_checks={})
        self.index = SeriesIndex(self.table)

    def change(self, *rows: ServicePort, gone: tuple[ServicePort, ...] = ()) -> None:
        changes = {one.key: RowChange(self.table.rows.pop(one.key), None) for one in gone}
        for one in rows:
            changes[one.key] = RowChange(self.table.rows.get(one.key), one)
            self.table.rows[one.key] = one
        self.index.update(self.table, Delta(rows=changes, health_checks={}))
        assert self.where() == where(SeriesIndex(self.table))

    def where(self, *local: str) -> dict[str, str]:
        return where(self.index, *local)


def where(index: SeriesIndex, *local: str) -> dict[str, str]:
    """Address, protocol and port as text -> name of the Service."""
    found = {}
    for packed, ports in index.destinations(local).items():
        family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
        for number, series in ports.items():
            protocol = {destination_number(TCP, 0): "tcp", destination_number(UDP, 0): "udp"}[number & ~0xFFFF]
            found[f"{socket.inet_ntop(family, packed)} {protocol} {number & 0xFFFF}"] = series.name.name
    return found


def test_frontends_lead_to_their_service() -> None:
    kept = Kept()
    web = row("web", frontend("10.96.0.1", 80), frontend("203.0.113.5", 80), frontend(None, 30080))
    web6 = row("web", frontend("fd00:96::1", 80), frontend(None, 30080), family=IPV6)
    dns = row("dns", frontend("10.96.0.1", 80), frontend(None, 30080), protocol=IPProtocol.UDP)
    kept.change(web, web6, dns)
    assert kept.where("192.0.2.7", "2001:db8::7", "203.0.113.5") == {
        "10.96.0.1 tcp 80": "web",
        "203.0.113.5 tcp 80": "web",
        "203.0.113.5 tcp 30080": "web",
        "203.0.113.5 udp 30080": "dns",
        "192.0.2.7 tcp 30080": "web",
        "192.0.2.7 udp 30080": "dns",
        "127.0.0.1 tcp 30080": "web",
        "127.0.0.1 udp 30080": "dns",
        "2001:db8::7 tcp 30080": "web",
        "fd00:96::1 tcp 80": "web",
        "10.96.0.1 udp 80": "dns",
    }


def series_at(index: SeriesIndex, address: str, port: int) -> Series:
    return index.destinations(())[socket.inet_pton(socket.AF_INET, address)][destination_number(TCP, port)]


def test_what_is_counted_stays_with_the_service_while_it_changes() -> None:
    kept = Kept()
    kept.change(row("web", frontend("10.96.0.1", 80)))
    series = series_at(kept.index, "10.96.0.1", 80)
    kept.change(row("web", frontend("10.96.0.1", 80), backend="10.1.0.2"))
    kept.change(row("web", frontend("10.96.0.1", 80), frontend("203.0.113.5", 80)))
    kept.change(row("web", frontend("203.0.113.5", 80)))
    assert series_at(kept.index, "203.0.113.5", 80) is series
    # two families of a port are one series; it goes with the last of them
    kept.change(row("web", frontend("fd00:96::1", 80), family=IPV6))
    kept.change(gone=(row("web"),))
    assert next(iter(kept.index.destinations(())[socket.inet_pton(socket.AF_INET6, "fd00:96::1")].values())) is series
    kept.change(gone=(row("web", family=IPV6),))
    kept.change(row("web", frontend("10.96.0.1", 80)))
    assert series_at(kept.index, "10.96.0.1", 80) is not series


def test_an_address_that_moves_to_another_service_in_one_change() -> None:
    kept = Kept()
    kept.change(row("web", frontend("203.0.113.5", 80)), row("shop", frontend("203.0.113.5", 81)))
    kept.change(row("web", frontend("203.0.113.5", 81)), row("shop", frontend("203.0.113.5", 80)))
    assert kept.where() == {"203.0.113.5 tcp 81": "web", "203.0.113.5 tcp 80": "shop"}


def test_what_a_dump_goes_by_stays_as_it_was_when_the_dump_began() -> None:
    kept = Kept()
    kept.change(row("web", frontend("10.96.0.1", 80), frontend("203.0.113.5", 80), frontend(None, 30080)))
    taken = kept.index.destinations(("192.0.2.7",))
    before = {address: dict(ports) for address, ports in taken.items()}
    kept.change(row("web", frontend("10.96.0.1", 81), frontend(None, 30081)), row("other", frontend("203.0.113.5", 80)))
    kept.change(gone=(row("web"), row("other")))
    assert taken == before


def exposed(registry: CollectorRegistry) -> list[str]:
    return [line for line in generate_latest(registry).decode().splitlines() if line.startswith("nodeproxy_service")]


class Reading:
    """In the place of the kernel: what each reading finds, one list of (port of web, number, counters) for each."""

    def __init__(self, *dumps: list[tuple[int, bytes]] | Exception) -> None:
        self.dumps = list(dumps)
        self.done = 0

    def __call__(self, destinations: dict[bytes, dict[int, Series]]) -> list[list[Account[Series]]]:
        self.done += 1
        found = self.dumps.pop(0) if self.dumps else []
        if isinstance(found, Exception):
            raise found
        series = destinations[socket.inet_pton(socket.AF_INET, "10.96.0.1")][destination_number(TCP, 80)]
        return [[(series, number, carried)] for number, carried in found]


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not done():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


class Counting:
    """Counters over a stand-in for the kernel. `sysctls`: what was set, and what setting raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, reading: Reading, period: float = 0.001) -> None:
        self.sysctls: list[int] = []
        self.refused: Exception | None = None
        monkeypatch.setattr(traffic, "accounts", reading)
        monkeypatch.setattr(sysctl, "set", self._set)
        self.registry = CollectorRegistry()
        self.counters = TrafficCounters(self.registry, lambda: (), period)
        self.table = ForwardingTable(rows={}, health_checks={})
        self.web = row("web", frontend("10.96.0.1", 80))
        self.table.rows[self.web.key] = self.web

    def _set(self, name: str, value: int) -> bool:
        assert name == "net.netfilter.nf_conntrack_acct"
        if self.refused is not None:
            raise self.refused
        before = self.sysctls[-1:] or [0]
        self.sysctls.append(value)
        return before != [value]

    def programmed(self) -> None:
        self.counters.programmed(self.table, Delta(rows={self.web.key: RowChange(None, self.web)}, health_checks={}))


async def test_counters_are_exposed_and_go_with_their_service(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading([], [(1, counters(3, 300, 2, 2000))])
    counting = Counting(monkeypatch, reading)
    task = asyncio.create_task(counting.counters.run())
    await asyncio.sleep(0.02)
    assert reading.done == 0  # nothing is read before something is programmed
    counting.programmed()
    await until(lambda: bool(exposed(counting.registry)))
    labels = 'namespace="shop",port="http",protocol="TCP",service="web"'
    assert [line for line in exposed(counting.registry) if "_created" not in line] == [
        f"nodeproxy_service_connections_total{{{labels}}} 1.0",
        f'nodeproxy_service_packets_total{{direction="in",{labels}}} 3.0',
        f'nodeproxy_service_packets_total{{direction="out",{labels}}} 2.0',
        f'nodeproxy_service_bytes_total{{direction="in",{labels}}} 300.0',
        f'nodeproxy_service_bytes_total{{direction="out",{labels}}} 2000.0',
    ]
    del counting.table.rows[counting.web.key]
    counting.counters.programmed(
        counting.table, Delta(rows={counting.web.key: RowChange(counting.web, None)}, health_checks={})
    )
    assert exposed(counting.registry) == []
    task.cancel()


async def test_turned_off_and_on_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading([], [(1, counters(3, 300))])
    counting = Counting(monkeypatch, reading, period=0)
    task = asyncio.create_task(counting.counters.run())
    counting.programmed()
    await asyncio.sleep(0.02)
    assert (reading.done, counting.sysctls) == (0, [])
    counting.counters.change_period(0.001)
    await until(lambda: bool(exposed(counting.registry)))
    assert set(counting.sysctls) == {1}
    counting.counters.change_period(0)
    await until(lambda: counting.sysctls[-1] == 0)
    done = reading.done
    await asyncio.sleep(0.02)
    assert reading.done == done
    assert exposed(counting.registry) == []
    task.cancel()


async def test_a_sysctl_that_was_set_by_others_is_left_on(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading()
    counting = Counting(monkeypatch, reading)
    counting.sysctls.append(1)
    task = asyncio.create_task(counting.counters.run())
    counting.programmed()
    await until(lambda: reading.done > 2)
    counting.counters.change_period(0)
    await asyncio.sleep(0.02)
    assert set(counting.sysctls) == {1}
    task.cancel()


async def test_trouble_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reading that fails is followed by a first one; a read-only sysctl leaves the connections to be counted."""
    failure = PermissionMissing("read conntrack counters", "no CAP_NET_ADMIN")
    reading = Reading([], [(1, b"")], failure, [(1, b""), (2, b"")], [(1, b""), (2, b""), (3, b"")])
    counting = Counting(monkeypatch, reading)
    counting.refused = SysctlReadOnly("net.netfilter.nf_conntrack_acct", "1")
    task = asyncio.create_task(counting.counters.run())
    counting.programmed()
    await until(lambda: reading.done > 6)
    assert [line.split()[1] for line in exposed(counting.registry) if "connections_total" in line] == ["2.0"]
    task.cancel()


async def test_the_next_reading_waits_a_hundred_times_as_long_as_one_took(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading()
    counting = Counting(monkeypatch, reading)
    monkeypatch.setattr(counting.counters, "_read_connections", lambda found: 60.0 * (1 + len(reading(found))))
    task = asyncio.create_task(counting.counters.run())
    counting.programmed()
    await until(lambda: reading.done == 1)
    await asyncio.sleep(0.05)
    assert reading.done == 1
    assert counting.registry.get_sample_value("nodeproxy_traffic_dump_seconds") == 60.0
    task.cancel()
