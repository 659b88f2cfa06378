"""Owns what is asked: chosen frontends, who sends to them, and what must happen, by the forwarding table and by the mode."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Final

from nodeproxy.compare.places import LINKS, Places, own_addresses, source_within
from nodeproxy.compare.results import Expected, Sender, SenderKind
from nodeproxy.configuration.agent_config import Mode
from nodeproxy.forwarding.table import Backend, Family, Frontend, FrontendKind, IPProtocol, ServicePort
from nodeproxy.forwarding.verdict import Outcome, Verdict
from nodeproxy.sandbox.sockets import host_port
from nodeproxy.snapshot.view import NodeView

LOOPBACK: Final = "127.0.0.1"
BESIDE: Final = 8
"""At so many service addresses of a family a port is asked that no Service has."""
HAIRPINS: Final = 1
"""So many endpoints of a frontend on this node ask it themselves."""

LOOPBACK_REASON: Final = (
    "IPVS mode serves no node ports on loopback: IPVS does not send on what has a loopback source (as kube-proxy's)"
)
BESIDE_REASON: Final = (
    "IPVS mode has service addresses on the node, and rejects what no Service there matches, lest a process of the node "
    "gets it"
)


@dataclass(frozen=True, eq=False)
class Target:
    """A frontend at one address: of a node port there is one for each of the node's addresses that is asked.

    `frontend` and `row` are None for a port beside those of a service address, which nothing must match.
    """

    address: str
    port: int
    protocol: IPProtocol
    row: ServicePort | None
    frontend: Frontend | None


@dataclass(frozen=True, eq=False)
class Ask:
    """One sender's probes to a target. `table` is what the forwarding table says, `expected` what the mode is to do.

    `sticky`: one client keeps its endpoint.
    """

    target: Target
    sender: Sender
    table: Expected
    expected: Expected
    sticky: bool = False
    by_design: str | None = None


@dataclass
class Plan:
    """All that is asked, and what has to stand where for it: `local` endpoints on this node, the others elsewhere."""

    targets: list[Target] = field(default_factory=list)
    asks: list[Ask] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def backends(self) -> dict[tuple[Backend, IPProtocol], None]:
        """Every backend that may answer, with its protocol."""
        rows = {target.row.key: target.row for target in self.targets if target.row is not None}
        return {(backend, row.key.protocol): None for row in rows.values() for backend in row.all_backends}

    @property
    def clients(self) -> set[str]:
        """Clients outside that are no ordinary ones: within source ranges."""
        kinds = (SenderKind.ALLOWED, SenderKind.REFUSED)
        return {ask.sender.address for ask in self.asks if ask.sender.kind in kinds}


def make_plan(view: NodeView, rows: Sequence[ServicePort], places: Mapping[Family, Places], mode: Mode) -> Plan:
    """Plan probes of these rows. `view` is that of iptables mode, whose table is the standard for all modes."""
    plan = Plan()
    asking = _Asking(view, places, mode)
    targets = (target for row in rows for frontend in row.frontends for target in _targets(view, row, frontend))
    for target in (*targets, *_beside(rows)):
        plan.targets.append(target)
        plan.asks += asking.asks(target)
    if asking.not_allowed:
        plan.notes.append(f"{asking.not_allowed} frontends with source ranges: no address is free in them to send from")
    return plan


def _targets(view: NodeView, row: ServicePort, frontend: Frontend) -> Iterator[Target]:
    def at(address: str) -> Target:
        return Target(address, frontend.port, row.key.protocol, row, frontend)

    if frontend.address is not None:
        yield at(frontend.address)
        return
    own = [address.text for address in view.facts.addresses_of(row.key.family)]
    serving = [address for address in own if view.serves_node_ports(address)]
    closed = [address for address in own if address not in serving]
    yield from map(at, serving[:2])
    yield from map(at, closed[:1])
    if row.key.family is Family.IPV4:
        yield at(LOOPBACK)


def _beside(rows: Iterable[ServicePort]) -> Iterator[Target]:
    """Ports of service addresses that no Service has, at some of the addresses."""
    used: dict[tuple[Family, str], set[int]] = {}
    for row in rows:
        for frontend in row.frontends:
            if frontend.address is not None and frontend.kind is FrontendKind.CLUSTER_IP:
                used.setdefault((row.key.family, frontend.address), set()).add(frontend.port)
    for family in Family:
        addresses = sorted(address for of, address in used if of is family)
        for address in addresses[:: max(1, len(addresses) // BESIDE)][:BESIDE]:
            port = next(number for number in range(9, 65536) if number not in used[family, address])
            yield Target(address, port, IPProtocol.TCP, None, None)


class _Asking:
    """Who asks a target, and what is expected."""

    def __init__(self, view: NodeView, places: Mapping[Family, Places], mode: Mode) -> None:
        self._view = view
        self._places = places
        self._mode = mode
        self._by_address = view.tells_local_pods_by_address
        self._own = set(own_addresses(view))
        self._taken = {*self._own, *LINKS, *(claim.address for claim in view.index if claim.address is not None)}
        for place in places.values():
            self._taken |= {place.pod, *place.changing, place.service}
        self.not_allowed = 0

    def asks(self, target: Target) -> Iterator[Ask]:
        """One for each sender."""
        for sender in self._senders(target):
            verdict = self._verdict(target, sender)
            if verdict.outcome is Outcome.ACCEPT:  # a health-check node port, answered by the agent itself
                continue
            table = expectation(verdict)
            expected, reason = in_mode(self._mode, target, table, self._own)
            sticky = verdict.row is not None and verdict.row.affinity_seconds is not None
            yield Ask(target, sender, table, expected, sticky, reason)

    def _senders(self, target: Target) -> Iterator[Sender]:
        family = Family.IPV6 if ":" in target.address else Family.IPV4
        places = self._places[family]
        if target.address == LOOPBACK:
            yield Sender(SenderKind.NODE, LOOPBACK)
            return
        yield Sender(SenderKind.POD, places.pod)
        yield Sender(SenderKind.OUTSIDE, places.outside)
        yield Sender(SenderKind.NODE, places.node)
        if target.row is None or target.frontend is None:
            return
        local = [one.address for one in target.row.all_backends if one.local and one.address not in self._own]
        for address in dict.fromkeys(local[:HAIRPINS]):
            yield Sender(SenderKind.ENDPOINT, address)
        yield from self._clients(target, target.frontend, places)

    def _clients(self, target: Target, frontend: Frontend, places: Places) -> Iterator[Sender]:
        """One client more where there are source ranges: within them, or outside where everybody's client is within."""
        if frontend.allowed_sources is None or target.row is None:
            return
        networks = [ipaddress.ip_network(cidr) for cidr in frontend.allowed_sources]
        if any(ipaddress.ip_address(places.outside) in network for network in networks):
            others = (places.client(number) for number in range(1, 250))
            refused = next((one for one in others if not any(ipaddress.ip_address(one) in net for net in networks)), None)
            if refused is not None:
                yield Sender(SenderKind.REFUSED, refused)
            return
        backends = {backend.address for backend in target.row.all_backends}
        pods = self._view.programmer_config.local_detector.cidrs.get(places.family)
        allowed = source_within(frontend.allowed_sources, self._taken | backends, pods)
        if allowed is not None:
            yield Sender(SenderKind.ALLOWED, allowed)
        else:
            self.not_allowed += 1

    def _verdict(self, target: Target, sender: Sender) -> Verdict:
        from_node = sender.kind is SenderKind.NODE
        arguments = (sender.address, target.address, target.port, target.protocol)
        if self._by_address:
            return self._view.verdict(self._view.packet(*arguments, from_node=from_node))
        from_pod = sender.kind in (SenderKind.POD, SenderKind.ENDPOINT)
        return self._view.verdict(self._view.packet(*arguments, from_node=from_node, from_local_pod=from_pod))


def expectation(verdict: Verdict) -> Expected:
    """A verdict of the forwarding table, as it is told."""
    if verdict.outcome is not Outcome.FORWARD:
        return Expected(verdict.outcome.value)
    backends = tuple(host_port(one.address, one.port) for one in verdict.backends)
    hairpins = tuple(host_port(one.address, one.port) for one in verdict.hairpins)
    return Expected("forward", backends, verdict.masquerade, hairpins)


def in_mode(mode: Mode, target: Target, table: Expected, own: Set[str]) -> tuple[Expected, str | None]:
    """What a mode is to do where the table says this, and the documented reason if it is something else.

    `own` are the node's addresses.
    """
    if mode is not Mode.IPVS or (target.address == LOOPBACK and table.outcome == "no match"):
        return table, None
    if target.address == LOOPBACK:
        return Expected("no match"), LOOPBACK_REASON
    if table.outcome == "no match" and target.frontend is None and target.address not in own:
        return Expected("reject"), BESIDE_REASON
    return table, None
