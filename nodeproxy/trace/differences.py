"""Owns the comparison of what the table says with what the kernel's rules do: each difference, in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from nodeproxy.forwarding.verdict import Outcome, Packet, Verdict
from nodeproxy.programmer.rules.names import FIREWALL, IPVS_FILTER, MARK_MASQ, is_ours
from nodeproxy.trace.ends import endpoint_text
from nodeproxy.trace.results import Agreement
from nodeproxy.trace.walk import End, Way

_TOLERANCE: Final = 0.02
"""Of a chance: the kernel keeps 31 bits of a probability, and text ten digits."""

_Place = tuple[str, int]


class Comparison(NamedTuple):
    """What differs, what is worth saying though it does not differ, and the verdict on both."""

    agreement: Agreement
    differences: tuple[str, ...]
    notes: tuple[str, ...]


def compare(packet: Packet, verdict: Verdict, ways: Sequence[Way]) -> Comparison:
    """Compare a verdict with the ways that the kernel's rules leave the packet."""
    differences: list[str] = []
    notes: list[str] = []
    notes += _unknown(ways)
    known = [way for way in ways if way.end is not End.UNKNOWN]
    if verdict.outcome is Outcome.FORWARD:
        differences += _forwarding(packet, verdict, known, complete=len(known) == len(ways), notes=notes)
    elif verdict.outcome in (Outcome.REJECT, Outcome.DROP):
        wanted = End.REJECTED if verdict.outcome is Outcome.REJECT else End.DROPPED
        differences += (f"expected: {wanted}; {text}" for text in _otherwise(known, wanted))
    elif verdict.outcome is Outcome.ACCEPT:
        differences += (f"expected: {End.DELIVERED}; {text}" for text in _otherwise(known, End.DELIVERED))
    else:
        _untouched(known, differences, notes)
    without = Agreement.AGREES if len(known) == len(ways) else Agreement.UNKNOWN
    return Comparison(Agreement.DIFFERS if differences else without, tuple(differences), tuple(notes))


def _unknown(ways: Sequence[Way]) -> Iterator[str]:
    chances: defaultdict[str, float] = defaultdict(float)
    for way in ways:
        if way.end is End.UNKNOWN:
            chances[way.reason] += way.chance
    for reason, chance in chances.items():
        yield f"{_percent(chance)}{reason}"


def _percent(chance: float) -> str:
    """Nothing where it is certain."""
    return "" if chance > 1 - 1e-9 else f"{chance:.1%} of connections: "


def _forwarding(packet: Packet, verdict: Verdict, ways: Sequence[Way], *, complete: bool, notes: list[str]) -> Iterator[str]:
    wanted: dict[_Place, bool] = {
        (one.address, one.port): verdict.masquerade or one in verdict.hairpins for one in verdict.backends
    }
    chances: defaultdict[_Place, float] = defaultdict(float)
    masqueraded: defaultdict[_Place, dict[bool, str]] = defaultdict(dict)
    for way in ways:
        if _went_to_backend(way):
            place = (way.packet.destination, way.packet.port)
            chances[place] += way.chance
            if way.end is End.SENT:  # what stays on the node keeps or loses its source, and nobody is the worse for it
                masqueraded[place][way.packet.masqueraded] = _by_rule(way)
    yield from _not_forwarded(ways)
    for place in sorted(chances.keys() - wanted.keys()):
        yield f"the kernel also sends it to {endpoint_text(*place)} ({chances[place]:.1%}), which is no backend for it"
    missing = sorted(wanted.keys() - chances.keys())
    held = _held(ways) if verdict.row is not None and verdict.row.affinity_seconds is not None else ""
    if held and chances and missing:
        notes.append(f"session affinity: {held}, so only {', '.join(endpoint_text(*place) for place in sorted(chances))}")
    elif complete and chances:  # where nothing arrives anywhere, it is said what becomes of it instead
        for place in missing:
            yield f"the kernel never sends it to {endpoint_text(*place)}, which is one of {len(wanted)} backends"
        if not missing and not chances.keys() - wanted.keys():
            yield from _uneven(chances)
    for place in sorted(masqueraded.keys() & wanted.keys()):
        for found, rule in masqueraded[place].items():
            if found and not wanted[place]:
                yield f"to {endpoint_text(*place)} the kernel masquerades it, and should not: {rule}"
            elif wanted[place] and not found:
                yield f"to {endpoint_text(*place)} the kernel does not masquerade it, and should"


def _went_to_backend(way: Way) -> bool:
    return (way.packet.translated or way.packet.carried) and way.end in (End.SENT, End.DELIVERED)


def _by_rule(way: Way) -> str:
    """The rule that masquerades."""
    rules = [step.where for step in way.steps() if "-j MASQUERADE" in step.text or "-j SNAT" in step.text]
    return rules[-1] if rules else ""


def _not_forwarded(ways: Sequence[Way]) -> Iterator[str]:
    chances: defaultdict[str, float] = defaultdict(float)
    for way in ways:
        if _went_to_backend(way):
            continue
        at = endpoint_text(way.packet.destination, way.packet.port)
        if way.packet.translated or way.packet.carried:
            chances[f"{_after(way)} on its way to {at}"] += way.chance
        elif way.end in (End.SENT, End.DELIVERED):
            chances[f"no rule and no virtual server takes it: it is {way.end}, still to {at}"] += way.chance
        else:
            chances[_after(way)] += way.chance
    for text, chance in chances.items():
        yield f"expected: forwarded; {_percent(chance)}{text}"


def _after(way: Way) -> str:
    return f"{way.end}: {way.reason}" if way.reason else str(way.end)


def _otherwise(ways: Sequence[Way], wanted: End) -> Iterator[str]:
    chances: defaultdict[str, float] = defaultdict(float)
    for way in ways:
        if way.end is not wanted:
            at = endpoint_text(way.packet.destination, way.packet.port)
            where = f" to {at}" if way.end in (End.SENT, End.DELIVERED) else ""
            chances[f"the kernel's rules: {_after(way)}{where}"] += way.chance
    for text, chance in chances.items():
        yield f"{_percent(chance)}{text}"


def _uneven(chances: dict[_Place, float]) -> Iterator[str]:
    share = 1 / len(chances)
    for place in sorted(chances):
        if abs(chances[place] - share) > share * _TOLERANCE:
            yield f"{endpoint_text(*place)} gets {chances[place]:.1%} of connections, and should get {share:.1%}"


def _held(ways: Sequence[Way]) -> str:
    """How affinity binds the source to an endpoint, "" where it is free."""
    for way in ways:
        for step in way.steps():
            if "-m recent --rcheck" in step.text or "--match-set KUBE-AFFINITY" in step.text:
                return "the source is bound to an endpoint by an earlier connection"
    return ""


def _untouched(ways: Sequence[Way], differences: list[str], notes: list[str]) -> None:
    """No frontend takes the packet: nothing of ours may touch it. What others do to it is their business, and is said."""
    for way in ways:
        at = endpoint_text(way.packet.destination, way.packet.port)
        chain = way.trail.step.chain if way.trail is not None else ""
        if way.packet.carried:
            differences.append(f"no frontend takes it, but a virtual server sends it to {at}")
        elif way.packet.translated:
            by = next((step for step in reversed(way.steps()) if " DNAT" in step.text or " REDIRECT" in step.text), None)
            text = f"{by.where if by else 'a rule'} sends it to {at}"
            (differences if by is not None and is_ours(by.chain) else notes).append(f"no frontend takes it, but {text}")
        elif way.end in (End.DROPPED, End.REJECTED, End.UNROUTABLE):
            ours = is_ours(chain) and chain not in (IPVS_FILTER, FIREWALL)
            (differences if ours else notes).append(f"no frontend takes it, and it is {_after(way)}")
            if chain == IPVS_FILTER:
                notes.append("IPVS mode has service addresses on the node: what no Service takes there is rejected")
        elif any(is_ours(step.chain) and step.text.endswith(f"-j {MARK_MASQ}") for step in way.steps()):
            differences.append("no frontend takes it, but it is masqueraded")
