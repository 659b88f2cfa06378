"""Owns sending a plan's probes, many at a time, and making results of what they met.

First every sender's few probes to everything; then so many from one sender to each frontend that every endpoint has to show;
then many clients to what has session affinity. Where no answer came, all of that sender's are sent once more before it is
held against the mode: on a busy machine a packet may be late.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Final

from msgspec import Struct

from nodeproxy.compare import judging
from nodeproxy.compare.node import ThrowAwayNode
from nodeproxy.compare.places import Places
from nodeproxy.compare.plan import LOOPBACK, Ask, Plan, Target
from nodeproxy.compare.results import Affinity, Balance, FrontendResult, ProbeResult, Seen, Sender, SenderKind, shortened
from nodeproxy.compare.sampling import policy
from nodeproxy.compare.statistics import shows_all
from nodeproxy.forwarding.table import Family
from nodeproxy.sandbox.client import AT_ONCE, PATIENT, TIMEOUT, Answered, Dropped, Probe, Verdict, probe_many
from nodeproxy.sandbox.sockets import host_port

FEW: Final = 3
MOST: Final = 1500
"""So many probes of one sender to one frontend at most; with more endpoints than that shows, not all have to be seen."""
FOR_BALANCE: Final = 150
"""So many connections at least, where choice is by chance: of two endpoints, one that gets thrice as much stands out."""
DOUBTFUL: Final = 1e-3
"""A balance whose chance is below this gets many more connections before it is judged."""
CLIENTS: Final = 32
"""Clients of a Service with affinity that ask repeatedly: that all meet one of two endpoints has a chance below 10^-9."""
MOST_CLIENTS: Final = 240
REPEATS: Final = 2
NO_SERVICE: Final = "(no Service)"
_RESENT: Final = 10 * AT_ONCE

Progress = Callable[[str, int, int], None]
"""What is being done, how much of it is done, and of how much."""


class Fault(Struct, frozen=True):
    """Something that is not as expected. `sender` is None where it is about all; `by_design`: a documented property."""

    service_port: str
    frontend: str
    kind: str
    sender: Sender | None
    expected: str
    seen: str
    reason: str
    by_design: bool = False


@dataclass
class _Met:
    """What one ask's probes met. `complete`: so many that every endpoint must be among it."""

    ask: Ask
    verdicts: list[Verdict] = field(default_factory=list)
    complete: bool = False


class _Crowd(Struct):
    """What many clients met, each asking once, and the first of them again."""

    ask: Ask
    sources: list[str]
    complete: bool
    first: list[Verdict] = []
    again: list[Verdict] = []


class Probing:
    """Sends the probes of one plan to one node. `scheduler`: how IPVS chooses, or judging.CHANCE."""

    def __init__(
        self, node: ThrowAwayNode, plan: Plan, places: Mapping[Family, Places], scheduler: str, progress: Progress
    ) -> None:
        self._node = node
        self._plan = plan
        self._places = places
        self._scheduler = scheduler
        self._progress = progress
        # Ports are taken in turn, so that no connection is taken for an earlier one; not those of node ports and agents.
        self._ports = cycle([*range(11000, 30000), *range(33000, 65000)])
        self._ground = judging.Ground(node.box.owned_addresses(), node.backend_is_on_node)
        self.faults: list[Fault] = []
        self.notes: list[str] = []

    def run(self) -> list[FrontendResult]:
        """Everything, in the order of the plan's targets."""
        met: dict[Target, list[_Met]] = defaultdict(list)
        for ask in self._plan.asks:
            met[ask.target].append(_Met(ask))
        self._send("a few probes of each sender", [(one, FEW) for members in met.values() for one in members])
        self._once_more([one for members in met.values() for one in members])
        balances = self._every_endpoint(met)
        crowds = self._crowds(met)
        return [self._result(target, members, balances.get(target), crowds.get(target)) for target, members in met.items()]

    def _send(self, stage: str, wanted: Sequence[tuple[_Met, int]]) -> None:
        """Send so many probes of each; what should be dropped by itself, as that costs a time-out for each batch."""
        total, done = sum(count for _, count in wanted), 0
        groups: dict[tuple[SenderKind, bool], list[_Met]] = defaultdict(list)
        for one, count in wanted:
            groups[one.ask.sender.kind, one.ask.expected.outcome == "drop"] += [one] * count
        for (kind, quiet), members in groups.items():
            for start in range(0, len(members), AT_ONCE):
                batch = members[start : start + AT_ONCE]
                probes = [self._probe(one.ask.target, one.ask.sender.address) for one in batch]
                verdicts = probe_many(self._node.sender(kind), probes, timeout=TIMEOUT if quiet else PATIENT)
                for one, verdict in zip(batch, verdicts, strict=True):
                    one.verdicts.append(verdict)
                done += len(batch)
                self._progress(stage, done, total)

    def _probe(self, target: Target, source: str) -> Probe:
        # On loopback, ports of those who asked the agent how it is are not free for a minute: there the kernel chooses.
        port = 0 if source == LOOPBACK else next(self._ports)
        return Probe(target.address, target.port, target.protocol.upper(), source, port)

    def _once_more(self, met: Iterable[_Met]) -> None:
        """Send again where no answer came, in place of what was sent; not all, where much is broken and will not mend."""
        again: list[tuple[_Met, int]] = []
        count = 0
        for one in met:
            unanswered = any(isinstance(verdict, Dropped) for verdict in one.verdicts)
            if unanswered and one.ask.expected.outcome != "drop" and (count := count + len(one.verdicts)) <= _RESENT:
                again.append((one, len(one.verdicts)))
                one.verdicts = []
        self._send("again where no answer came", again)
        if late := sum(not self._reasons(one) for one, _ in again):
            self.notes.append(f"{late} times a sender got no answer at first, and all answers when it asked again")

    def _every_endpoint(self, met: Mapping[Target, Sequence[_Met]]) -> dict[Target, Balance]:
        """From one sender for each set of endpoints so many that every endpoint shows; the balance is that of the first."""
        chosen: dict[Target, _Met] = {}
        wanted: list[tuple[_Met, int]] = []
        too_many = 0
        for target, members in met.items():
            sets: set[tuple[str, ...]] = set()
            for one in members:
                backends = one.ask.expected.backends
                if len(backends) < 2 or one.ask.sticky or backends in sets or self._reasons(one):
                    continue
                sets.add(backends)
                enough, surely = self._enough(len(backends))
                one.verdicts, one.complete = [], surely and enough <= MOST
                too_many += enough > MOST
                wanted.append((one, min(enough, MOST)))
                chosen.setdefault(target, one)
        self._send("every endpoint of each frontend", wanted)
        self._once_more([one for one, _ in wanted])
        if too_many:
            self.notes.append(f"{too_many} frontends have more endpoints than {MOST} connections surely show")
        doubtful = [one for one in chosen.values() if self._is_doubtful(self._balance(one))]
        self._send("frontends whose balance looks uneven", [(one, MOST) for one in doubtful])
        return {target: self._balance(one) for target, one in chosen.items()}

    def _balance(self, one: _Met) -> Balance:
        return judging.balance(one.ask, judging.seen(one.ask, one.verdicts), self._scheduler)

    def _is_doubtful(self, balance: Balance) -> bool:
        """Whether more connections are needed to tell a bias from chance."""
        return self._scheduler == judging.CHANCE and judging.MISSED < balance.p_value < DOUBTFUL

    def _enough(self, endpoints: int) -> tuple[int, bool]:
        """How many connections show every endpoint, and whether surely: schedulers may aim at other than equal shares."""
        if self._scheduler == judging.CHANCE:
            return max(FOR_BALANCE, shows_all(endpoints, judging.MISSED)), True
        return 2 * endpoints, self._scheduler in judging.TURNS

    def _crowds(self, met: Mapping[Target, Sequence[_Met]]) -> dict[Target, _Crowd]:
        """Many clients to every frontend whose ServicePort has affinity and that lets anybody come."""
        crowds: dict[Target, _Crowd] = {}
        for target, members in met.items():
            base = next((one for one in members if _for_a_crowd(one)), None)
            if base is None or self._reasons(base):
                continue
            places = self._places[Family.IPV6 if ":" in target.address else Family.IPV4]
            enough = shows_all(len(base.ask.expected.backends), judging.MISSED)
            count = min(MOST_CLIENTS, max(CLIENTS, enough))
            sources = [places.client(number) for number in range(1, count + 1)]
            crowds[target] = _Crowd(base.ask, sources, enough <= MOST_CLIENTS)
        total = sum(len(crowd.sources) + CLIENTS * REPEATS for crowd in crowds.values())
        done = 0
        for target, crowd in crowds.items():
            everybody = [self._probe(target, source) for source in crowd.sources]
            crowd.first = probe_many(self._node.client, everybody, timeout=PATIENT)
            again = [self._probe(target, source) for source in crowd.sources[:CLIENTS] * REPEATS]
            crowd.again = probe_many(self._node.client, again, timeout=PATIENT)
            done += len(everybody) + len(again)
            self._progress("clients of what has session affinity", done, total)
        return crowds

    def _reasons(self, one: _Met) -> list[str]:
        found = judging.seen(one.ask, one.verdicts)
        reasons = judging.faults(one.ask, found, self._ground, complete=one.complete)
        changed = judging.changed_endpoint(found) if one.ask.sticky else None
        return [*reasons, changed] if changed else reasons

    def _result(
        self, target: Target, members: Sequence[_Met], balance: Balance | None, crowd: _Crowd | None
    ) -> FrontendResult:
        row, frontend = target.row, target.frontend
        probes = [self._probe_result(one) for one in members]
        affinity = None
        if crowd is not None:
            probe, affinity, balance = self._crowd_result(crowd)
            probes.append(probe)
        if balance is not None and not balance.even:
            self._fault(target, balance.sender, "equal shares", _shares(balance), judging.uneven(balance))
        return FrontendResult(
            service_port=_service_port(target),
            family=6 if ":" in target.address else 4,
            protocol=target.protocol.upper(),
            kind=str(frontend.kind) if frontend else "port without Service",
            address=target.address,
            port=target.port,
            policy=policy(frontend) if frontend else "a port of a service address that no Service has",
            endpoints=len(row.all_backends) if row else 0,
            probes=tuple(probes),
            balance=balance,
            affinity=affinity,
        )

    def _probe_result(self, one: _Met) -> ProbeResult:
        found = judging.seen(one.ask, one.verdicts)
        reasons = self._reasons(one)
        for reason in reasons:
            self._fault(one.ask.target, one.ask.sender, str(one.ask.expected), _together(found), reason)
        if one.ask.by_design and not reasons:
            told = (str(one.ask.table), _together(found), one.ask.by_design)
            self._fault(one.ask.target, one.ask.sender, *told, by_design=True)
        return ProbeResult(one.ask.sender, one.ask.expected, found, not reasons, one.complete, one.ask.by_design)

    def _crowd_result(self, crowd: _Crowd) -> tuple[ProbeResult, Affinity, Balance]:
        """Of clients of a ServicePort with affinity: what they met, whether each kept to it, how they were spread."""
        found = judging.seen_by_clients(crowd.ask, crowd.first, crowd.sources)
        reasons = judging.faults(crowd.ask, found, self._ground, complete=crowd.complete)
        names = [[_name(first)] for first in crowd.first[:CLIENTS]]
        for number, verdict in enumerate(crowd.again):
            names[number % CLIENTS].append(_name(verdict))
        kept = sum(len(set(one)) == 1 and one[0] is not None for one in names)
        endpoints = len({_name(verdict) for verdict in crowd.first} - {None})
        affinity = Affinity(CLIENTS, kept, endpoints, endpoints > 1 or len(crowd.ask.expected.backends) == 1)
        if kept < CLIENTS:
            reasons.append(f"session affinity: {CLIENTS - kept} of {CLIENTS} clients did not keep their endpoint")
        if not affinity.spread:
            reasons.append(f"session affinity: all of {len(crowd.sources)} clients got the same endpoint")
        sender = Sender(SenderKind.OUTSIDE, f"{crowd.sources[0]} and {len(crowd.sources) - 1} more clients")
        for reason in reasons:
            self._fault(crowd.ask.target, sender, str(crowd.ask.expected), _together(found), reason)
        result = ProbeResult(sender, crowd.ask.expected, found, not reasons, crowd.complete)
        return result, affinity, judging.balance(crowd.ask, found, judging.CHANCE)

    def _fault(
        self, target: Target, sender: Sender, expected: str, seen: str, reason: str, *, by_design: bool = False
    ) -> None:
        frontend = f"{host_port(target.address, target.port)}/{target.protocol.upper()}"
        kind = str(target.frontend.kind) if target.frontend else ""
        self.faults.append(Fault(_service_port(target), frontend, kind, sender, expected, seen, reason, by_design))


def _for_a_crowd(one: _Met) -> bool:
    ask, frontend = one.ask, one.ask.target.frontend
    anybody = frontend is not None and frontend.allowed_sources is None
    return ask.sticky and anybody and ask.sender.kind is SenderKind.OUTSIDE and ask.expected.outcome == "forward"


def _service_port(target: Target) -> str:
    return str(target.row.key.name) if target.row else NO_SERVICE


def _name(verdict: Verdict) -> str | None:
    return verdict.name if isinstance(verdict, Answered) else None


def _together(found: Sequence[Seen]) -> str:
    return shortened([str(one) for one in found])


def _shares(balance: Balance) -> str:
    return shortened([f"{count} x {name}" for name, count in balance.counts.items()])
