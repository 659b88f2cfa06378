"""Places of IPVS mode: increments lead where a fresh start leads, and packets meet what the forwarding table says.

The second is shown by walking the pipeline of `ipvs.rules` in Python; real packets through real kernels are in
tests/conformance and tests/behaviour.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodeproxy.forwarding.table import Backend, Family, ForwardingTable, IPProtocol, ServicePort, ServicePortKey
from nodeproxy.forwarding.verdict import Outcome, Packet, verdict
from nodeproxy.kernel.ipvs import VirtualServer
from nodeproxy.programmer.base import NodePortAddresses
from nodeproxy.programmer.ipvs.names import SetName
from nodeproxy.programmer.ipvs.places import Server, entry
from nodeproxy.programmer.ipvs.wanted import Change, Entries, Wanted, serving_node_ports

from .rows import row_changes

OWN = {Family.IPV4: ["192.0.2.1", "192.0.2.2"], Family.IPV6: ["2001:db8::1"]}
POD = {Family.IPV4: "10.200.1.1", Family.IPV6: "fd00:200::1:1"}
OUTSIDE = {Family.IPV4: "198.51.100.9", Family.IPV6: "2001:db8:9::9"}

Rows = Mapping[ServicePortKey, ServicePort | None]


def merge(entries: Entries, change: Change) -> None:
    """What the sets hold after a change. Nothing is added twice, nothing removed that is not there."""
    for name, texts in change.added.items():
        assert not texts & entries.get(name, set()), name
        entries.setdefault(name, set()).update(texts)
    for name, texts in change.removed.items():
        assert texts <= entries.get(name, set()), name
        entries[name] -= texts


def picture(wanted: Wanted, entries: Entries) -> tuple[object, ...]:
    servers = {place: wanted.server(place) for place in wanted.servers()}
    held = {name: texts for name, texts in entries.items() if texts}
    return servers, held, wanted.short_cuts, wanted.redirects, set(wanted.addresses), wanted.rows.keys()


def fresh(family: Family, rows: Rows, own: Iterable[str]) -> tuple[Wanted, Entries]:
    wanted, entries = Wanted(family, "rr", loop_back=True), Entries()
    wanted.set_node_addresses(own)
    merge(entries, wanted.change(rows))
    return wanted, entries


@pytest.mark.parametrize("family", list(Family))
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_increments_lead_where_a_fresh_start_leads(family: Family, data: st.DataObject) -> None:
    wanted, entries = fresh(family, {}, OWN[family])
    rows: dict[ServicePortKey, ServicePort] = {}
    own = OWN[family]
    for step in data.draw(row_changes(family)):
        before = {place: wanted.server(place) for place in wanted.servers()}
        change = wanted.change(step)
        if data.draw(st.booleans()):
            own = data.draw(st.sampled_from([OWN[family], OWN[family][:1], []]))
            later = wanted.set_node_addresses(own)
            merge(entries, change)
            change = Change(places=change.places | later.places, added=later.added, removed=later.removed)
        merge(entries, change)
        rows = {key: row for key, row in {**rows, **step}.items() if row is not None}
        assert picture(wanted, entries) == picture(*fresh(family, rows, own))
        after = {place: wanted.server(place) for place in wanted.servers()}
        differing = {place for place in before.keys() | after.keys() if before.get(place) != after.get(place)}
        assert differing <= change.places


def walk(wanted: Wanted, entries: Entries, packet: Packet) -> tuple[Outcome, set[Backend], bool]:
    """What becomes of a packet by the rules: outcome, real servers, masqueraded."""
    protocol = packet.protocol.value
    at = VirtualServer(int(packet.family), protocol, packet.destination, packet.port)

    def held(name: SetName) -> bool:
        return entry(at) in entries.get(name, set())

    masquerade = False
    if held(SetName.FIREWALLED):
        gates = [text.rpartition(",") for text in entries.get(SetName.ALLOWED_SOURCES, ())]
        allowed = [ip_network(cidr) for where, _, cidr in gates if where == entry(at)]
        if not any(ip_address(packet.source) in cidr for cidr in allowed):
            return Outcome.DROP, set(), False
    if held(SetName.SHORT_CUT) and (packet.from_local_pod or packet.from_node):
        masquerade = not packet.from_local_pod
        target = wanted.short_cuts[at]
        at = VirtualServer(int(packet.family), protocol, *target)
    else:
        masquerade = held(SetName.MASQUERADED) or (held(SetName.CLUSTER_IP) and packet.from_local_pod is False)
        if held(SetName.REDIRECTED):
            at = VirtualServer(int(packet.family), protocol, *wanted.redirects[at])
    if held(SetName.DROPPED):
        return Outcome.DROP, set(), False
    if held(SetName.REJECTED):
        return Outcome.REJECT, set(), False
    passing = (SetName.CLUSTER_IP, SetName.MASQUERADED, SetName.SOURCE_KEPT)
    if at.address in wanted.addresses and not any(held(name) for name in passing):
        return Outcome.REJECT, set(), False
    server: Server | None = wanted.server(at)
    if server is None:
        return Outcome.NO_MATCH, set(), False
    return Outcome.FORWARD, set(server.backends), masquerade


@pytest.mark.parametrize("family", list(Family))
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_packets_meet_what_the_table_says(family: Family, data: st.DataObject) -> None:
    rows = {key: row for step in data.draw(row_changes(family)) for key, row in step.items() if row is not None}
    wanted, entries = fresh(family, rows, OWN[family])
    table = ForwardingTable(rows=rows, health_checks={})
    addresses = [*wanted.addresses, *OWN[family]]
    ports = {front.port for row in rows.values() for front in row.frontends} | {22}
    for address in addresses:
        for port in ports:
            for protocol in IPProtocol:
                for source, local_pod, node in (
                    (POD[family], True, False),
                    (OUTSIDE[family], False, False),
                    (OWN[family][0], False, True),
                ):
                    own = address in OWN[family]
                    packet = Packet(family, source, address, port, protocol, local_pod, node, own, own)
                    said = verdict(table, packet)
                    outcome, backends, masquerade = walk(wanted, entries, packet)
                    if said.outcome is Outcome.NO_MATCH and not own and outcome is Outcome.REJECT:
                        continue  # a port of a service address that no Service has
                    if said.row is None and address.startswith(("169.254.", "fd6e:")):
                        continue  # a stand-in, which nobody knows
                    assert (outcome, backends, masquerade) == (said.outcome, set(said.backends), said.masquerade), packet


def test_which_addresses_serve_node_ports() -> None:
    addresses = ["127.0.0.1", "192.0.2.1", "10.0.0.1", "::1", "fe80::1", "2001:db8::1"]
    everything = NodePortAddresses()
    assert serving_node_ports(addresses, everything) == ["192.0.2.1", "10.0.0.1", "2001:db8::1"]
    some = NodePortAddresses(cidrs=("192.0.2.0/24", "2001:db8::/32"))
    assert serving_node_ports(addresses, some) == ["192.0.2.1", "2001:db8::1"]
