"""Owns what probes' verdicts mean: what was seen, whether that is as expected, and if not, why, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Final, NamedTuple

from nodeproxy.compare.node import ON_NODE
from nodeproxy.compare.plan import Ask
from nodeproxy.compare.results import Balance, Seen, Sender, shortened
from nodeproxy.compare.statistics import chi_square, p_value
from nodeproxy.sandbox.client import Answered, Connected, Dropped, NoListener, Rejected, Unreachable, Verdict
from nodeproxy.sandbox.sockets import host_port

MISSED: Final = 1e-9
"""The chance with which what works as it should is taken for faulty, for each frontend."""
TURNS: Final = frozenset({"rr", "wrr"})
"""Schedulers of IPVS that take endpoints of equal weight in turn."""
CHANCE: Final = "chance"
"""How iptables mode chooses: each endpoint is equally likely, each time."""


def seen(ask: Ask, verdicts: Sequence[Verdict]) -> tuple[Seen, ...]:
    """Verdicts by kind, the most frequent first."""
    kinds = Counter(_kind(ask, verdict, ask.sender) for verdict in verdicts)
    return tuple(_counted(kind, count) for kind, count in kinds.most_common())


def seen_by_clients(ask: Ask, verdicts: Sequence[Verdict], sources: Sequence[str]) -> tuple[Seen, ...]:
    """The same where each verdict is of another client; of the sources that kept, one stands for all."""
    senders = [Sender(ask.sender.kind, source) for source in sources]
    kinds = Counter(_kind(ask, verdict, sender) for verdict, sender in zip(verdicts, senders, strict=True))
    merged: Counter[Seen] = Counter()
    for kind, count in kinds.items():
        kept = kind.outcome == "forward" and not kind.masqueraded
        merged[Seen(kind.outcome, 0, kind.backend, kind.masqueraded, "its own", kind.detail) if kept else kind] += count
    return tuple(_counted(kind, count) for kind, count in merged.most_common())


def _counted(kind: Seen, count: int) -> Seen:
    return Seen(kind.outcome, count, kind.backend, kind.masqueraded, kind.source, kind.detail)


def _kind(ask: Ask, verdict: Verdict, sender: Sender) -> Seen:
    match verdict:
        case Answered(name=name, source=source):
            untouched = (
                name in (ON_NODE, host_port(ask.target.address, ask.target.port)) and name not in ask.expected.backends
            )
            if untouched:
                rewritten = f"source {source}" if source != sender.address else None
                return Seen("no match", 0, detail=rewritten)
            return Seen("forward", 0, name, source != sender.address, source)
        case Rejected():
            return Seen("reject", 0)
        case Dropped():
            return Seen("drop", 0)
        case NoListener():
            return Seen("closed", 0)
        case Unreachable(reason=reason):
            return Seen("unreachable", 0, detail=reason)
        case Connected():
            return Seen("connected", 0)


class Ground(NamedTuple):
    """What the node is by its addresses: those it owns, links included, one of which is what masquerading gives.

    `is_node`: whether a backend, `ADDRESS:PORT`, is the node itself.
    """

    owned: AbstractSet[str]
    is_node: Callable[[str], bool]


def faults(ask: Ask, found: Sequence[Seen], ground: Ground, *, complete: bool) -> list[str]:
    """What is wrong with what one sender's probes met; nothing: it is as expected.

    `complete`: so many were sent that each backend must be among them.
    """
    if ask.expected.outcome == "forward":
        return list(_forwarding(ask, found, ground, complete))
    wanted = ("no match", "closed") if ask.expected.outcome == "no match" else (ask.expected.outcome,)
    wrong = (one for one in found if one.outcome not in wanted or (one.outcome == "no match" and one.detail))
    return [f"{_should(ask)}, but was {_was(one)}" for one in wrong]


def _should(ask: Ask) -> str:
    return {
        "reject": "should be rejected (no usable endpoint)" if ask.by_design is None else "should be rejected",
        "drop": "should be dropped",
        "no match": "should be left alone",
    }.get(ask.expected.outcome, f"should be {ask.expected.outcome}")


def _was(one: Seen) -> str:
    words = {
        "forward": f"forwarded to {one.backend}",
        "reject": "rejected",
        "drop": "dropped",
        "no match": f"masqueraded: {one.detail} arrived" if one.detail else "left alone (no rule matched)",
        "closed": "answered by a reset: nobody listens where it went",
        "unreachable": f"unreachable ({one.detail})",
        "connected": "connected to an unknown server",
    }
    return words[one.outcome]


def _forwarding(ask: Ask, found: Sequence[Seen], ground: Ground, complete: bool) -> Iterator[str]:
    total = sum(one.count for one in found)
    for one in found:
        if one.outcome != "forward":
            share = "" if one.count == total else f" {one.count} of {total} times"
            yield f"should be forwarded, but was {_was(one)}{share}"
    forwarded = [one for one in found if one.outcome == "forward"]
    names = {one.backend for one in forwarded if one.backend is not None}
    if strangers := sorted(names - set(ask.expected.backends)):
        yield f"forwarded to {shortened(strangers)}, which is not one of its endpoints"
    if complete and (missing := sorted(set(ask.expected.backends) - names)):
        yield f"never forwarded to {shortened(missing)} in {total} connections, though it is one of its endpoints"
    yield from dict.fromkeys(reason for one in forwarded if (reason := _source_fault(ask, one, ground)))


def _source_fault(ask: Ask, one: Seen, ground: Ground) -> str | None:
    """What is wrong with the source that arrived. The kernel masquerades nothing that stays on the node."""
    if one.backend is None or one.backend not in ask.expected.backends:
        return None
    if not (ask.expected.masquerade or one.backend in ask.expected.hairpins):
        return (
            None
            if not one.masqueraded
            else f"should keep its source, but was masqueraded: {one.source} arrived at {one.backend}"
        )
    if one.masqueraded:
        return None if one.source in ground.owned else f"masqueraded as {one.source}, which is no address of the node"
    if ground.is_node(one.backend):
        return None
    why = ": the endpoint reaches itself" if one.backend in ask.expected.hairpins else ""
    return f"should be masqueraded{why}, but its own source {one.source} arrived at {one.backend}"


def changed_endpoint(found: Sequence[Seen]) -> str | None:
    """What is wrong where one client of a Service with affinity met several endpoints."""
    names = sorted({one.backend for one in found if one.backend is not None})
    return None if len(names) < 2 else f"session affinity: one client was forwarded to {shortened(names)}"


def balance(ask: Ask, found: Sequence[Seen], scheduler: str) -> Balance:
    """How connections were spread over the backends that may answer. `scheduler`: that of IPVS, or CHANCE."""
    counts = dict.fromkeys(ask.expected.backends, 0)
    for one in found:
        if one.backend in counts:
            counts[one.backend] += one.count
    numbers = list(counts.values())
    statistic, degrees = chi_square(numbers), len(numbers) - 1
    exact = scheduler in TURNS
    chance = p_value(statistic, degrees)
    even = max(numbers) - min(numbers) <= 1 if exact else chance > MISSED or scheduler != CHANCE
    return Balance(ask.sender, counts, statistic, degrees, chance, exact, even)


def uneven(made: Balance) -> str:
    """A balance that is none, in words."""
    extremes = sorted(made.counts.items(), key=lambda pair: pair[1])
    (least, few), (most, many) = extremes[0], extremes[-1]
    if made.exact:
        return f"the scheduler takes endpoints in turn, but {most} got {many} connections and {least} {few}"
    return (
        f"uneven: {most} got {many} connections and {least} {few} (chi-square {made.statistic:.1f}, p = {made.p_value:.1e})"
    )
