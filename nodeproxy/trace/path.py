"""Owns the way of a packet through the kernel: tables in their order, routing, IPVS.

Order of the hooks, by priority (include/uapi/linux/netfilter_ipv4.h; IPVS: net/netfilter/ipvs/ip_vs_core.c):

    PREROUTING   raw, mangle, nat                      what comes in
    INPUT        mangle, filter, security, IPVS, nat   what is for this node
    FORWARD      mangle, filter, security              what is not
    OUTPUT       raw, mangle, nat, IPVS, filter, security     what the node itself sends, and what IPVS has rewritten
    POSTROUTING  mangle, nat                           what leaves

The nat table is asked once for a connection about its destination (PREROUTING or OUTPUT), and once about its source. What
the node sends to itself leaves by the loopback interface and comes in there again.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Iterator

from msgspec.structs import replace

from nodeproxy.trace.kernel_view import KernelView, Route, RouteKind
from nodeproxy.trace.packet import PacketState
from nodeproxy.trace.virtual_servers import scheduled
from nodeproxy.trace.walk import ChainWalk, End, Step, Way

_Stage = Callable[[Way], Iterable[Way]]


class PacketPath:
    """Sends packets through one kernel's rules, on paper."""

    def __init__(self, kernel: KernelView) -> None:
        self._kernel = kernel
        tables = kernel.tables()
        several = len(tables) > 1
        self._filters = [ChainWalk(kernel, found, f" ({variant})" if several else "") for variant, found in tables.items()]

    def follow(self, packet: PacketState, *, from_node: bool, stand_in: bool = False) -> list[Way]:
        """Every way that a packet may take, all ended. `from_node`: the node itself sends it.

        `stand_in`: the source stands for any that there is outside, and says nothing where it has no route itself.
        """
        if from_node:
            return list(self._sent_by_node(Way(1.0, packet)))
        came = self._kernel.route(packet.source)
        if came.kind is RouteKind.NONE and stand_in:
            why = f"nothing leads to {packet.source}, which stands for anybody outside ({came.fault})"
            return [Way(1.0, packet).ended(End.UNKNOWN, f"{why}: write the client's address as SRC")]
        if came.kind is RouteKind.NONE:
            return [Way(1.0, packet).ended(End.UNROUTABLE, f"nothing leads to its source {packet.source}: {came.fault}")]
        return list(self._came_in(Way(1.0, replace(packet, incoming=came.interface))))

    def _came_in(self, way: Way) -> Iterator[Way]:
        for at in self._through([way], "PREROUTING", "raw", "mangle", "nat"):
            if at.end is not None:
                yield at
                continue
            packet = at.packet
            route = self._kernel.route(packet.destination, source=packet.source, incoming=packet.incoming, mark=packet.mark)
            routed = _routed(at, route)
            if routed.end is not None:
                yield routed
            elif route.kind is RouteKind.LOCAL:
                yield from self._for_this_node(routed)
            else:
                out = replace(routed, packet=replace(routed.packet, outgoing=route.interface))
                yield from self._leaving(self._through([out], "FORWARD", "mangle", "filter", "security"))

    def _for_this_node(self, way: Way) -> Iterator[Way]:
        for at in self._through([way], "INPUT", "mangle", "filter", "security"):
            if at.end is not None:
                yield at
                continue
            for taken in self._ipvs(at):
                if taken.end is not None:
                    yield taken
                elif taken.packet.carried and not at.packet.carried and not self._local(taken.packet.destination):
                    yield from self._rewritten(taken)
                else:
                    for done in self._through([taken], "INPUT", "nat"):
                        yield done if done.end is not None else done.ended(End.DELIVERED)

    def _sent_by_node(self, way: Way) -> Iterator[Way]:
        route = self._kernel.route(way.packet.destination, source=way.packet.source, mark=way.packet.mark)
        routed = _routed(way, route)
        if routed.end is not None:
            yield routed
            return
        out = replace(routed, packet=replace(routed.packet, incoming="", outgoing=route.interface))
        for at in self._through([out], "OUTPUT", "raw", "mangle", "nat"):
            if at.end is not None:
                yield at
                continue
            again = self._routed_again(at, out.packet)
            if again.end is not None:
                yield again
                continue
            for taken in self._ipvs(again):
                if taken.end is not None:
                    yield taken
                elif taken.packet.carried and not again.packet.carried and not self._local(taken.packet.destination):
                    yield from self._rewritten(taken)
                else:
                    yield from self._leaving(self._through([taken], "OUTPUT", "filter", "security"))

    def _rewritten(self, way: Way) -> Iterator[Way]:
        """What IPVS has rewritten goes out as if the node sent it."""
        packet = replace(way.packet, incoming="")
        routed = self._routed_again(replace(way, packet=packet), None)
        if routed.end is not None:
            yield routed
        else:
            yield from self._leaving(self._through([routed], "OUTPUT", "raw", "mangle", "nat", "filter", "security"))

    def _leaving(self, ways: Iterable[Way]) -> Iterator[Way]:
        for way in ways:
            if way.end is not None:
                yield way
                continue
            for at in self._through([way], "POSTROUTING", "mangle", "nat"):
                if at.end is not None:
                    yield at
                elif at.packet.outgoing != "lo":
                    yield at.ended(End.SENT)
                else:
                    yield from self._looped(at)

    def _looped(self, way: Way) -> Iterator[Way]:
        back = replace(way, packet=replace(way.packet, incoming="lo", outgoing=""))
        for at in self._through([back], "PREROUTING", "raw", "mangle"):
            if at.end is not None:
                yield at
                continue
            for done in self._through([at], "INPUT", "mangle", "filter", "security"):
                yield done if done.end is not None else done.ended(End.DELIVERED)

    def _through(self, ways: Iterable[Way], hook: str, *tables: str) -> Iterator[Way]:
        """Pass the chains of one hook in these tables, in turn."""
        under_way: Iterable[Way] = ways
        for table in tables:
            under_way = self._table(under_way, hook, table)
        return iter(under_way)

    def _table(self, ways: Iterable[Way], hook: str, table: str) -> Iterator[Way]:
        about_source = hook in ("INPUT", "POSTROUTING")
        for way in ways:
            if way.end is not None:
                yield way
            elif table != "nat":
                yield from self._filtered([way], table, hook)
            elif way.packet.untracked or (way.source_decided if about_source else way.destination_decided):
                yield way
            else:
                for found in self._filtered([way], table, hook):
                    yield replace(
                        found,
                        source_decided=found.source_decided or about_source,
                        destination_decided=found.destination_decided or not about_source,
                    )

    def _filtered(self, ways: list[Way], table: str, hook: str) -> list[Way]:
        """A table of every variant in turn; of nat tables the first that decides is the last that is asked."""
        for chains in self._filters:
            found: list[Way] = []
            for way in ways:
                decided = way.packet.masqueraded if hook in ("INPUT", "POSTROUTING") else way.packet.translated
                if way.end is not None or (table == "nat" and decided and chains is not self._filters[0]):
                    found.append(way)
                else:
                    found += chains.table(way, table, hook)
            ways = found
        return ways

    def _routed_again(self, way: Way, before: PacketState | None) -> Way:
        """The routing decision for a packet whose destination was rewritten since."""
        packet = way.packet
        if before is not None and (packet.destination, packet.mark) == (before.destination, before.mark):
            return way
        # IPVS asks for a route to the real server alone (net/netfilter/ipvs/ip_vs_xmit.c, __ip_vs_get_out_rt).
        source = None if packet.carried else packet.source
        route = self._kernel.route(packet.destination, source=source, mark=packet.mark)
        routed = _routed(way, route)
        return routed if routed.end is not None else replace(routed, packet=replace(packet, outgoing=route.interface))

    def _ipvs(self, way: Way) -> list[Way]:
        if way.packet.carried:
            return [way]
        found = self._kernel.virtual_server(way.packet)
        return [way] if found is None else scheduled(way, found)

    def _local(self, address: str) -> bool:
        return self._kernel.route(address).kind is RouteKind.LOCAL


def _routed(way: Way, route: Route) -> Way:
    if route.kind is RouteKind.NONE:
        step = Step(f"routing: {way.packet.destination} is not routed ({route.fault})")
        return way.passed(step).ended(End.UNROUTABLE, f"no route to {way.packet.destination}: {route.fault}")
    return way


def stands_for_outside(family: int) -> str:
    """An address that no node, pod or Service has: of the networks for documentation (RFC 5737, RFC 3849)."""
    return "203.0.113.1" if family == 4 else str(ipaddress.IPv6Address("2001:db8:ffff::1"))
