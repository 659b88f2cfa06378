"""Owns the counters of ServicePorts, where traffic to each of them goes, and their names as metrics."""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterable, Iterator
from typing import Final

from msgspec import Struct
from prometheus_client.core import CounterMetricFamily, Metric

from nodeproxy.forwarding.table import (
    Delta,
    Family,
    ForwardingTable,
    Frontend,
    IPProtocol,
    ServicePortKey,
    ServicePortName,
)
from nodeproxy.kernel.conntrack import SCTP, TCP, UDP
from nodeproxy.kernel.conntrack_accounting import destination_number

_NUMBERS: Final = {IPProtocol.TCP: TCP, IPProtocol.UDP: UDP, IPProtocol.SCTP: SCTP}
_LABELS: Final = ("namespace", "service", "port", "protocol")
_DIRECTED: Final = (*_LABELS, "direction")
_LOOPBACK: Final = "127.0.0.1"

Ports = dict[int, "Series"]
"""`destination_number` -> whose traffic that is."""


class Series(Struct, gc=False, eq=False):
    """What went through one port of a Service, in both IP families; `in` is from clients. `rows`: how many of the table it
    stands for. The counters are changed by the thread that reads connections, `rows` on the event loop."""

    name: ServicePortName
    protocol: IPProtocol
    rows: int = 0
    connections: int = 0
    in_packets: int = 0
    in_bytes: int = 0
    out_packets: int = 0
    out_bytes: int = 0


class SeriesIndex:
    """The series of all rows of a table, and their frontends by address. Changed on the event loop only."""

    def __init__(self, table: ForwardingTable) -> None:
        self._frontends: dict[ServicePortKey, tuple[Frontend, ...]] = {}
        self._series: dict[tuple[ServicePortName, IPProtocol], Series] = {}
        self._addresses: dict[bytes, Ports] = {}
        self._node_ports: dict[Family, Ports] = {family: {} for family in Family}
        for key, row in table.rows.items():
            if row.frontends:
                self._add(key, row.frontends)

    def update(self, table: ForwardingTable, delta: Delta) -> None:
        """Follow the table in the rows of a delta. Costs nothing for rows of which only the backends changed."""
        changed: list[tuple[ServicePortKey, tuple[Frontend, ...]]] = []
        for key in delta.rows:
            row = table.rows.get(key)
            frontends = () if row is None else row.frontends
            if self._frontends.get(key, ()) != frontends:
                changed.append((key, frontends))
        for key, frontends in changed:
            for place, _ in _places(key, (*self._frontends.get(key, ()), *frontends)):
                if place in self._addresses:
                    self._addresses[place] = dict(self._addresses[place])  # somebody may be reading the present one
        touched = [self._remove(key) for key, _ in changed]  # first: what one row gives up may be another's now
        for key, frontends in changed:
            if frontends:
                self._add(key, frontends)
        for series in touched:
            if series is not None and not series.rows:
                self._series.pop((series.name, series.protocol), None)

    def destinations(self, local_addresses: Collection[str]) -> dict[bytes, Ports]:
        """Where traffic of which series goes: packed address -> protocol and port. It stays as it is, whatever comes."""
        found: dict[bytes, Ports] = dict(self._addresses)
        node_ports = {4: dict(self._node_ports[Family.IPV4]), 16: dict(self._node_ports[Family.IPV6])}
        for address in {_packed(text) for text in (*local_addresses, _LOOPBACK)}:
            if ports := node_ports[len(address)]:
                found[address] = {**ports, **found[address]} if address in found else ports
        return found

    def metrics(self) -> Iterator[Metric]:
        """The counters of all ports of Services that this node had traffic for. May be called in any thread.

        Those without are left out: on most nodes they are most, and each would cost five lines of every scrape.
        """
        used = [series for series in list(self._series.values()) if series.connections]
        labels = [(one.name.namespace, one.name.name, one.name.port, one.protocol.value.upper()) for one in used]
        connections = CounterMetricFamily(
            "nodeproxy_service_connections", "Connections to a port of a Service on this node", labels=_LABELS
        )
        packets = CounterMetricFamily(
            "nodeproxy_service_packets", "Packets of these connections, in from clients, out to them", labels=_DIRECTED
        )
        octets = CounterMetricFamily(
            "nodeproxy_service_bytes", "Bytes of these connections, IP headers included", labels=_DIRECTED
        )
        for series, values in zip(used, labels, strict=True):
            connections.add_metric(values, series.connections)
            packets.add_metric((*values, "in"), series.in_packets)
            packets.add_metric((*values, "out"), series.out_packets)
            octets.add_metric((*values, "in"), series.in_bytes)
            octets.add_metric((*values, "out"), series.out_bytes)
        yield from (connections, packets, octets)

    def _add(self, key: ServicePortKey, frontends: tuple[Frontend, ...]) -> None:
        name = key.name, key.protocol
        series = self._series.get(name)
        if series is None:
            series = self._series[name] = Series(*name)
        series.rows += 1
        self._frontends[key] = frontends
        for place, number in _places(key, frontends):
            ports = self._node_ports[key.family] if place is None else self._addresses.setdefault(place, {})
            ports[number] = series

    def _remove(self, key: ServicePortKey) -> Series | None:
        """Take a row out; its series stays, because it may come back with other frontends."""
        frontends = self._frontends.pop(key, None)
        if frontends is None:
            return None
        series = self._series[key.name, key.protocol]
        for place, number in _places(key, frontends):
            ports = self._node_ports[key.family] if place is None else self._addresses.get(place, {})
            if ports.get(number) is series:
                del ports[number]
            if place is not None and not ports:
                self._addresses.pop(place, None)
        series.rows -= 1
        return series


def _places(key: ServicePortKey, frontends: Iterable[Frontend]) -> Iterator[tuple[bytes | None, int]]:
    """Packed address (None: those of the node) and number of each frontend."""
    protocol = _NUMBERS[key.protocol]
    for frontend in frontends:
        place = None if frontend.address is None else _packed(frontend.address)
        yield place, destination_number(protocol, frontend.port)


def _packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
