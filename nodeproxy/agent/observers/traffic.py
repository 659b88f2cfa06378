"""Owns the counters of traffic by port of a Service: when connections are read, and what that may cost.

Both modes are served alike, from connection tracking with accounting (net.netfilter.nf_conntrack_acct): a connection belongs
to the ServicePort whose frontend its first packet was for. All connections are read each period. What the kernel forgets
between two readings is missed. By default it remembers TCP for 120 s after a FIN and 10 s after a reset, UDP for 30 s after
the last packet, SCTP for 10 s after its end. So a period of 10 s misses nothing, and one of 30 s misses the last bytes (or
all, where it was short) of two in three connections that end in a reset.

What it costs is bounded: no more than a hundredth of a core (reading waits a hundred times as long as the last time took),
and some 300 bytes for each of at most `FLOW_LIMIT` connections; of more than that a sample is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Final

import structlog
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from nodeproxy.agent.observers.flow_memory import FLOW_LIMIT, FlowMemory
from nodeproxy.agent.observers.traffic_series import Ports, SeriesIndex
from nodeproxy.agent.waiting import wait_at_most
from nodeproxy.forwarding.table import Delta, ForwardingTable
from nodeproxy.kernel import sysctl
from nodeproxy.kernel.conntrack_accounting import accounts
from nodeproxy.kernel.errors import KernelError, SysctlAbsent

_log = structlog.get_logger(__name__)

_ACCOUNTING: Final = "net.netfilter.nf_conntrack_acct"
_SHARE_OF_A_CORE: Final = 0.01
_BURST_SECONDS: Final = 0.01  # of work, then as long a rest: the event loop and the node's other work get their turn


class TrafficCounters(Collector):
    """Counts connections, packets and bytes of each port of a Service. `period` in seconds; 0 or less: nothing is counted.

    `local_addresses` tells the node's own addresses, at which node ports are served. All methods but `collect` are for the
    event loop. Registers its metrics in `registry`; they are without Services while nothing is counted.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        local_addresses: Callable[[], Collection[str]],
        period: float,
        *,
        flow_limit: int = FLOW_LIMIT,
    ) -> None:
        self._local_addresses = local_addresses
        self._period = period
        self._memory = FlowMemory(flow_limit)
        self._table: ForwardingTable | None = None
        self._index: SeriesIndex | None = None
        self._changed = asyncio.Event()
        self._stop = threading.Event()
        self._started = self._not_before = 0.0  # monotonic seconds
        self._set_by_us = False
        self._said: set[str] = set()
        self._seconds = Gauge(
            "nodeproxy_traffic_dump_seconds", "CPU time that the last reading of connections took", registry=registry
        )
        self._sampled = Gauge(
            "nodeproxy_traffic_sampled_one_in", "One of how many connections is counted, for all of them", registry=registry
        )
        self._sampled.set(1)
        registry.register(self)

    def programmed(self, table: ForwardingTable, delta: Delta) -> None:
        """Take note that the kernel follows the table, in which the rows of `delta` are others than at the last call."""
        if self._table is None:
            self._changed.set()
        self._table = table
        if self._index is not None:
            self._index.update(table, delta)

    def change_period(self, period: float) -> None:
        """Count more or less often from now on; not at all with 0 or less, which also drops what was counted."""
        if period != self._period:
            self._period = period
            self._changed.set()

    def collect(self) -> Iterator[Metric]:
        """The counters by port of a Service, made when they are asked for; in any thread."""
        index = self._index
        if index is not None:
            yield from index.metrics()

    def describe(self) -> Iterator[Metric]:
        """The names of the metrics."""
        return SeriesIndex(ForwardingTable(rows={}, health_checks={})).metrics()

    async def run(self) -> None:
        """Count until cancelled. Never raises because of the kernel: what does not work is said once, and tried again."""
        try:
            while True:
                await self._until_due()
                await self._read()
        finally:
            self._stop.set()  # a thread that is reading gives up

    async def _until_due(self) -> None:
        """Return when connections are to be read; `self._index` is there then."""
        while True:
            self._changed.clear()
            if self._period <= 0:
                await self._turn_off()
            wait = None
            if self._period > 0 and self._table is not None:
                if self._index is None:
                    self._index = SeriesIndex(self._table)
                wait = max(self._started + self._period, self._not_before) - time.monotonic()
                if wait <= 0:
                    return
            await wait_at_most(self._changed, wait)

    async def _turn_off(self) -> None:
        if self._index is None:
            return
        self._index = None
        self._memory.forget()
        if self._set_by_us:
            self._set_by_us = False
            with contextlib.suppress(KernelError):
                await asyncio.to_thread(sysctl.set, _ACCOUNTING, 0)

    async def _read(self) -> None:
        assert self._index is not None
        self._started = time.monotonic()
        destinations = self._index.destinations(self._local_addresses())
        if not destinations:
            self._memory.finish()  # as if it had been read: what comes next is new
            return
        try:
            cost = await asyncio.to_thread(self._read_connections, destinations)
        except (KernelError, OSError) as error:
            self._memory.forget()
            self._not_before = time.monotonic() + self._period
            self._say("traffic to Services cannot be counted; trying again", error)
            return
        self._not_before = time.monotonic() + cost / _SHARE_OF_A_CORE
        self._seconds.set(cost)
        self._sampled.set(self._memory.sampled_one_in)

    def _read_connections(self, destinations: Mapping[bytes, Ports]) -> float:
        """Read all connections once, in a thread of its own; returns the CPU seconds that it took."""
        start = burst = time.thread_time()
        self._turn_on()
        for found in accounts(destinations):
            self._memory.count(found)
            worked = time.thread_time() - burst
            if worked >= _BURST_SECONDS:
                if self._stop.wait(worked):
                    return 0.0
                burst = time.thread_time()
        self._memory.finish()
        return time.thread_time() - start

    def _turn_on(self) -> None:
        """Have the kernel count. Without, connections are still counted, but not what they carry."""
        try:
            if sysctl.set(_ACCOUNTING, 1):
                self._set_by_us = True
        except SysctlAbsent:
            return  # no connection was tracked yet
        except KernelError as error:
            self._say("packets and bytes of Services are not counted, only connections", error)

    def _say(self, event: str, error: Exception) -> None:
        if event not in self._said:
            self._said.add(event)
            _log.warning(event, error=str(error))
