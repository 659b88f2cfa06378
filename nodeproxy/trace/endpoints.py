"""Owns telling of every endpoint of a Service's slices whether packets to one of its ports may go there, and why.

The choice itself is `nodeproxy.forwarding.endpoints`'; here it is only put into words, together with what never got so far:
other families, slices without the port, addresses that cannot be used, entries that another slice's holds against.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nodeproxy.api.objects import EndpointPort, EndpointSlice
from nodeproxy.cluster.addresses import is_special, parse_address
from nodeproxy.cluster.checked import CheckedEndpoint, CheckedSlice, Readiness
from nodeproxy.cluster.names import ServiceName
from nodeproxy.forwarding.endpoints import (
    Candidate,
    Choice,
    PortMatch,
    Reason,
    TopologyMode,
    choose,
    explain,
    group_by_port,
    merge_endpoints,
)
from nodeproxy.forwarding.node import NodeFacts
from nodeproxy.forwarding.table import BackendSet, ServicePortKey
from nodeproxy.snapshot.view import NodeView
from nodeproxy.trace.results import TracedEndpoint


class EndpointsTold:
    """The endpoints of a ServicePort, for one of its two sets."""

    def __init__(self, view: NodeView, key: ServicePortKey, which: BackendSet) -> None:
        self._facts: NodeFacts = view.facts
        self._which = which
        self._service = key.name.service
        self._match = PortMatch(key.family, key.name.port, key.protocol)
        self._checked: Mapping[str, CheckedSlice] = view.state.slices(self._service)
        candidates = merge_endpoints(group_by_port(self._checked).get(self._match, ()), view.facts.name)
        self._candidates = {(one.backend.address, one.backend.port): one for one in candidates}
        self._slice_of = {id(one): name for name, of in self._checked.items() for one in of.endpoints}
        self.choice: Choice = choose(candidates, view.facts)
        self._chosen = frozenset(self.choice.local if which is BackendSet.LOCAL else self.choice.cluster)
        self._slices = slices_of(view, self._service)

    def all(self) -> list[TracedEndpoint]:
        """Every endpoint: those that are used first, then by address."""
        found = [told for slice_ in self._slices for told in self._of_slice(slice_)]
        return sorted(found, key=lambda told: (not told.used, told.address, told.port or 0, told.slice))

    def topology(self) -> str:
        """What the hints amount to, in words; "" where they leave out nobody."""
        if self._which is BackendSet.LOCAL or self.choice.topology is TopologyMode.ANY:
            return ""
        if self.choice.topology is TopologyMode.SAME_NODE:
            return f"every ready endpoint has node hints: only those for node {self._facts.name} are used"
        return f"every ready endpoint has zone hints: only those for zone {self._facts.zone} are used"

    def _of_slice(self, slice_: EndpointSlice) -> Iterator[TracedEndpoint]:
        name = slice_.metadata.name
        checked = self._checked.get(name)
        fault, ports = self._usable_ports(slice_, checked)
        usable = iter(checked.endpoints if checked is not None else ())
        for endpoint in slice_.endpoints or ():
            text = endpoint.addresses[0] if endpoint.addresses else ""
            node = endpoint.node_name or ""
            address = parse_address(text)
            if checked is not None and (address is None or address.family is not checked.family or is_special(*address)):
                yield TracedEndpoint(name, text, None, node, False, "its address cannot be used")
                continue
            entry = next(usable, None)
            if fault or entry is None:
                yield TracedEndpoint(name, text, None, node, False, fault or "not taken over from the slice")
                continue
            for port in ports:
                used, reason = self._judge(entry, port, name)
                yield TracedEndpoint(name, entry.address, port, node, used, reason)

    def _usable_ports(self, slice_: EndpointSlice, checked: CheckedSlice | None) -> tuple[str, list[int]]:
        """Why nothing in the slice can be used, or the port numbers that it gives the ServicePort."""
        match = self._match
        if checked is None:
            return f"addressType {slice_.address_type} is neither IPv4 nor IPv6", []
        if checked.family is not match.family:
            return f"IPv{int(checked.family)}, and the packet is IPv{int(match.family)}", []
        ports = [port.port for port in checked.ports if (port.name, port.protocol) == (match.name, match.protocol)]
        if ports:
            return "", ports
        named = [port for port in slice_.ports or () if (port.name or "") == match.name]
        return _no_port(match, named, slice_), []

    def _judge(self, entry: CheckedEndpoint, port: int, slice_name: str) -> tuple[bool, str]:
        candidate = self._candidates[entry.address, port]
        if candidate.endpoint is not entry:
            other = self._slice_of.get(id(candidate.endpoint), slice_name)
            where = f"EndpointSlice {other}" if other != slice_name else "the same slice"
            return False, f"a duplicate: the entry in {where} holds"
        if candidate.backend in self._chosen:
            return True, self._why_used(candidate)
        return False, self._why_not(candidate)

    def _why_used(self, candidate: Candidate) -> str:
        draining = candidate.endpoint.readiness is Readiness.DRAINING
        state = "terminating but serving, and nothing is ready" if draining else "ready"
        here = " on this node" if self._which is BackendSet.LOCAL else ""
        if self._which is BackendSet.CLUSTER and self.choice.topology is TopologyMode.SAME_ZONE:
            return f"{state}, hinted for zone {self._facts.zone}"
        if self._which is BackendSet.CLUSTER and self.choice.topology is TopologyMode.SAME_NODE:
            return f"{state}, hinted for node {self._facts.name}"
        return f"{state}{here}"

    def _why_not(self, candidate: Candidate) -> str:
        endpoint, reason = candidate.endpoint, explain(candidate, self._which, self.choice, self._facts)
        if reason is Reason.REMOTE:
            where = f"on node {endpoint.node}" if endpoint.node else "on a node that is not known"
            return f"{where}, and only endpoints on this node count"
        if reason is Reason.OTHER_ZONE:
            hinted = f"hinted for {_listed('zone', endpoint.zone_hints)}" if endpoint.zone_hints else "has no zone hint"
            return f"{hinted}, and this node is in zone {self._facts.zone}"
        if reason is Reason.OTHER_NODE:
            hinted = f"hinted for {_listed('node', endpoint.node_hints)}" if endpoint.node_hints else "has no node hint"
            return f"{hinted}, and this node is {self._facts.name}"
        if endpoint.readiness is Readiness.GONE:
            return "terminating, and no longer serving"
        return "not ready" if endpoint.readiness is Readiness.UNUSABLE else reason.value


def slices_of(view: NodeView, service: ServiceName) -> list[EndpointSlice]:
    """The EndpointSlices of a Service as they are in the snapshot, by name."""
    found = [
        one
        for one in view.snapshot.objects
        if isinstance(one, EndpointSlice)
        and one.metadata.labels is not None
        and one.metadata.labels.service_name == service.name
        and one.key.namespace == service.namespace
    ]
    return sorted(found, key=lambda one: one.metadata.name)


def _no_port(match: PortMatch, named: list[EndpointPort], slice_: EndpointSlice) -> str:
    wanted = f"port {match.name!r}" if match.name else "port without a name"
    if any(port.port is None for port in named):
        return f"the slice's {wanted} has no number: not usable here"
    if named:
        return f"the slice's {wanted} is not {match.protocol.upper()}"
    return f"the slice has no {wanted}" if slice_.ports else "the slice has no ports"


def _listed(what: str, names: tuple[str, ...]) -> str:
    return f"{what}{'s' if len(names) > 1 else ''} {', '.join(names)}"
