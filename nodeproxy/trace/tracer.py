"""Owns a trace as a whole: what the table says about a packet, what the kernel's rules make of it, and the comparison."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence

from msgspec import UNSET
from msgspec.structs import replace

from nodeproxy.cluster.names import Family, IPProtocol
from nodeproxy.forwarding.verdict import Packet, Verdict
from nodeproxy.snapshot.view import NodeView
from nodeproxy.trace.differences import compare
from nodeproxy.trace.endpoints import EndpointsTold
from nodeproxy.trace.ends import NODE, OUTSIDE, Sender, Target, TraceError, endpoint_text, read_sender
from nodeproxy.trace.explain import expected, rivals, set_in_force, traced_frontend, unread
from nodeproxy.trace.kernel_view import KernelView, RouteKind
from nodeproxy.trace.packet import PacketState
from nodeproxy.trace.path import PacketPath, stands_for_outside
from nodeproxy.trace.results import (
    Agreement,
    Destination,
    KernelFinding,
    Trace,
    TracedPacket,
)
from nodeproxy.trace.saved_tables import BUILT_IN
from nodeproxy.trace.sent import send
from nodeproxy.trace.walk import End, Step, Way


class Tracer:
    """Traces packets on one node. `kernel` gives the kernel for a family; None leaves it out, and `left_out` says why."""

    def __init__(self, view: NodeView, kernel: Callable[[Family], KernelView] | None = None, left_out: str = "") -> None:
        self._view = view
        self._kernel = kernel
        self._left_out = left_out

    def trace(self, source: str, target: Target, *, really: bool = False) -> Trace:
        """One packet; `really`: it is sent, too. Raises TraceError, and KernelViewError where the kernel cannot be read."""
        kernel = self._kernel(target.address.family) if self._kernel is not None else None
        sender = read_sender(source)
        packet = self._packet(sender, target, kernel)
        verdict = self._view.verdict(packet)
        told = self._endpoints(packet, verdict)
        frontend = traced_frontend(self._view, verdict)
        winner = verdict.row.key.name.service if verdict.row is not None else None
        result = Trace(
            packet=self._told(sender, packet, kernel),
            state=self._view.snapshot.origin,
            frontend=frontend,
            endpoints=tuple(told.all()) if told is not None else (),
            expected=expected(self._view, packet, verdict, told.topology() if told is not None else ""),
            agreement=Agreement.NOT_COMPARED,
            kernel_left_out=self._left_out,
            notes=(*unread(self._view, winner), *rivals(self._view, packet, winner)),
            problems=tuple(str(problem) for problem in self._view.problems.get(winner, ())) if winner else (),
        )
        if kernel is None:
            return result
        result = _with_kernel(result, packet, verdict, kernel, stand_in=sender.text == OUTSIDE)
        return _with_sent(result) if really else result

    def _packet(self, sender: Sender, target: Target, kernel: KernelView | None) -> Packet:
        family = target.address.family
        if sender.address is not None and sender.address.family is not family:
            raise TraceError(f"SRC is IPv{int(sender.address.family)}, and DST {target.address.text} is IPv{int(family)}")
        address = self._source(sender, target, kernel)
        from_node: bool | None = True if sender.text == NODE else None
        if from_node is None and kernel is not None and kernel.own_addresses() is not None:
            from_node = kernel.route(address).kind is RouteKind.LOCAL
        by_address = self._view.tells_local_pods_by_address
        packet = self._view.packet(
            address,
            target.address.text,
            target.port,
            target.protocol,
            from_node=from_node,
            from_local_pod=UNSET if by_address else self._came_from_pod(address, kernel),
        )
        if packet.from_node and not by_address:  # it came by no interface
            packet = replace(packet, from_local_pod=False)
        own = kernel.own_addresses() if kernel is not None else None
        if own is None:
            return packet
        to_node = target.address.text in own or ipaddress.ip_address(target.address.text).is_loopback
        serves = to_node and self._view.serves_node_ports(target.address.text)
        return replace(packet, to_node=packet.to_node or to_node, to_node_port_address=packet.to_node_port_address or serves)

    def _source(self, sender: Sender, target: Target, kernel: KernelView | None) -> str:
        family = target.address.family
        if sender.address is not None:
            return sender.address.text
        if sender.text == OUTSIDE:
            return stands_for_outside(int(family))
        if kernel is not None and (found := kernel.route(target.address.text).source) is not None:
            return found
        if ipaddress.ip_address(target.address.text).is_loopback:
            return target.address.text
        known = [text for text in self._view.facts.addresses if (":" in text) == (family is Family.IPV6)]
        if not known:
            raise TraceError(f"SRC: no IPv{int(family)} address of the node is known; write one instead of 'node'")
        return known[0]

    def _came_from_pod(self, address: str, kernel: KernelView | None) -> bool | None:
        """Where detect-local goes by interface: by the one that leads to the source, else by the endpoints on this node."""
        detector = self._view.programmer_config.local_detector
        route = kernel.route(address) if kernel is not None and kernel.own_addresses() is not None else None
        if route is not None:
            if detector.interface is not None:
                return route.interface == detector.interface
            return route.interface.startswith(detector.interface_prefix or "")
        rows = self._view.table.rows.values()
        return any(backend.local and backend.address == address for row in rows for backend in row.all_backends)

    def _endpoints(self, packet: Packet, verdict: Verdict) -> EndpointsTold | None:
        if verdict.row is None:
            return None
        return EndpointsTold(self._view, verdict.row.key, set_in_force(verdict, packet))

    def _told(self, sender: Sender, packet: Packet, kernel: KernelView | None) -> TracedPacket:
        if packet.from_node:
            who = "the node itself"
        elif packet.from_local_pod:
            who = "a pod of this node, as detect-local tells"
        elif sender.text == OUTSIDE:
            who = f"somebody outside; {packet.source} stands for any address there"
        else:
            who = "not this node, and no pod of it as far as detect-local tells"
        if kernel is not None and not packet.from_node and (interface := kernel.route(packet.source).interface):
            who += f", by interface {interface}"
        return TracedPacket(
            packet.source,
            packet.destination,
            packet.port,
            packet.protocol.value,
            int(packet.family),
            packet.from_node,
            packet.from_local_pod,
            packet.to_node,
            who,
        )


def walk(kernel: KernelView, packet: Packet, *, stand_in: bool = False) -> list[Way]:
    """The ways that the kernel's rules leave a packet. `stand_in`: its source stands for anybody outside."""
    state = PacketState(int(packet.family), packet.protocol.value, packet.source, packet.destination, packet.port)
    return PacketPath(kernel).follow(state, from_node=packet.from_node, stand_in=stand_in)


def _with_kernel(result: Trace, packet: Packet, verdict: Verdict, kernel: KernelView, *, stand_in: bool) -> Trace:
    ways = walk(kernel, packet, stand_in=stand_in)
    found = compare(packet, verdict, ways)
    return replace(
        result,
        agreement=found.agreement,
        kernel=kernel_finding(kernel.origin, ways, tracked=_tracks(kernel)),
        differences=found.differences,
        notes=(*result.notes, *found.notes, *kernel.not_followed()),
    )


def _with_sent(result: Trace) -> Trace:
    assert result.kernel is not None
    sent = send(result.packet, result.kernel.destinations)
    if sent.confirms is not False:
        return replace(result, sent=sent)
    went = f"went to {sent.to}" if sent.to is not None else "was stopped before it left"
    difference = f"the packet that was really sent {went}, which is not what its rules say"
    return replace(result, sent=sent, agreement=Agreement.DIFFERS, differences=(*result.differences, difference))


def _tracks(kernel: KernelView) -> bool:
    """Whether there are nat rules, which have conntrack follow connections."""
    chains = (tables.chain("nat", name) for tables in kernel.tables().values() for name in BUILT_IN)
    return any(chain is not None and chain.lines for chain in chains)


def kernel_finding(origin: str, ways: Sequence[Way], *, tracked: bool) -> KernelFinding:
    """The ways, with what they share told once. Ways to the same end are one; the steps are those of the likeliest.

    `tracked`: conntrack follows what the rules do not except from it.
    """
    passed = [way.steps() for way in ways]
    first = _shared(passed)
    last = _shared([steps[: first - 1 if first else None : -1] for steps in passed]) if len(ways) > 1 else 0
    groups: dict[tuple[object, ...], list[tuple[Way, list[Step]]]] = {}
    for way, steps in zip(ways, passed, strict=True):
        groups.setdefault((way.packet, way.end, way.reason), []).append((way, steps))
    destinations = []
    for group in groups.values():
        way, steps = max(group, key=lambda item: item[0].chance)
        to_backend = way.packet.translated or way.packet.carried
        destinations.append(
            Destination(
                end=str(way.end),
                chance=sum(one.chance for one, _ in group),
                backend=endpoint_text(way.packet.destination, way.packet.port) if to_backend else None,
                masqueraded=way.packet.masqueraded,
                interface=way.packet.outgoing if way.end is End.SENT else "",
                reason=way.reason,
                steps=tuple(steps[first : len(steps) - last]),
                untracked=way.packet.untracked or not tracked,
            )
        )
    ending = passed[0][len(passed[0]) - last :]
    return KernelFinding(origin, tuple(passed[0][:first]), tuple(destinations), tuple(ending))


def _shared(passed: Sequence[Sequence[Step]]) -> int:
    """How many steps all ways begin with."""
    count = min(len(steps) for steps in passed)
    for position in range(count):
        if any(steps[position] != passed[0][position] for steps in passed):
            return position
    return count


def protocol_of(text: str | None) -> IPProtocol | None:
    """The protocol by its name, in either case."""
    return None if text is None else IPProtocol(text.lower())
