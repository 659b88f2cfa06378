"""What verdicts of probes mean, and what a mode may do otherwise than the table says."""

from __future__ import annotations

import pytest

from nodeproxy.compare.judging import CHANCE, Ground, balance, changed_endpoint, faults, seen, uneven
from nodeproxy.compare.plan import BESIDE_REASON, LOOPBACK_REASON, Ask, Target, in_mode
from nodeproxy.compare.results import Expected, Sender, SenderKind
from nodeproxy.configuration.agent_config import Mode
from nodeproxy.forwarding.table import IPProtocol
from nodeproxy.sandbox.client import Answered, Dropped, NoListener, Rejected, Unreachable, Verdict

A, B = "10.2.0.1:8080", "10.2.0.2:8080"
NODE = "192.168.0.2"
GROUND = Ground({NODE, "100.64.0.2"}, lambda name: name.startswith(f"{NODE}:"))
POD = "10.1.0.9"


def target(address: str = "10.96.0.10") -> Target:
    return Target(address, 80, IPProtocol.TCP, None, None)


def ask(expected: Expected, sender: str = POD) -> Ask:
    return Ask(target(), Sender(SenderKind.POD, sender), expected, expected)


def judged(expected: Expected, *verdicts: Verdict, sender: str = POD, complete: bool = False) -> list[str]:
    asked = ask(expected, sender)
    return faults(asked, seen(asked, verdicts), GROUND, complete=complete)


def answered(name: str = A, source: str = POD) -> Answered:
    return Answered(name, source, 12345)


KEPT = Expected("forward", (A, B))
MASQUERADED = Expected("forward", (A, B), masquerade=True)


@pytest.mark.parametrize(
    ("expected", "verdict"),
    [
        (KEPT, answered()),
        (MASQUERADED, answered(source="100.64.0.2")),
        (
            Expected("forward", (f"{NODE}:80",), masquerade=True),
            answered(f"{NODE}:80"),
        ),  # nothing is masqueraded on the node
        (Expected("reject"), Rejected()),
        (Expected("drop"), Dropped()),
        (Expected("no match"), answered("10.96.0.10:80")),
        (Expected("no match"), answered("node")),
        (Expected("no match"), NoListener()),
    ],
)
def test_what_is_right(expected: Expected, verdict: Verdict) -> None:
    assert judged(expected, verdict) == []


@pytest.mark.parametrize(
    ("expected", "verdict", "reason"),
    [
        (KEPT, Dropped(), "should be forwarded, but was dropped"),
        (KEPT, answered("10.96.0.10:80"), "should be forwarded, but was left alone (no rule matched)"),
        (KEPT, answered("10.9.9.9:80"), "forwarded to 10.9.9.9:80, which is not one of its endpoints"),
        (KEPT, answered(source=NODE), f"should keep its source, but was masqueraded: {NODE} arrived at {A}"),
        (MASQUERADED, answered(), f"should be masqueraded, but its own source {POD} arrived at {A}"),
        (MASQUERADED, answered(source="9.9.9.9"), "masqueraded as 9.9.9.9, which is no address of the node"),
        (Expected("reject"), Dropped(), "should be rejected (no usable endpoint), but was dropped"),
        (Expected("drop"), answered(), f"should be dropped, but was forwarded to {A}"),
        (Expected("no match"), Rejected(), "should be left alone, but was rejected"),
        (
            Expected("no match"),
            answered("node", NODE),
            f"should be left alone, but was masqueraded: source {NODE} arrived",
        ),
        (KEPT, Unreachable("no route"), "should be forwarded, but was unreachable (no route)"),
    ],
)
def test_what_is_wrong(expected: Expected, verdict: Verdict, reason: str) -> None:
    assert judged(expected, verdict) == [reason]


def test_a_hairpin_is_masqueraded_and_others_are_not() -> None:
    expected = Expected("forward", (A, B), hairpins=(A,))
    assert judged(expected, answered(A, NODE), answered(B, "10.2.0.1"), sender="10.2.0.1") == []
    (reason,) = judged(expected, answered(A, "10.2.0.1"), sender="10.2.0.1")
    assert reason.startswith("should be masqueraded: the endpoint reaches itself")


def test_a_missing_endpoint_is_wrong_only_where_all_must_show() -> None:
    assert judged(KEPT, *[answered(A)] * 40) == []
    (reason,) = judged(KEPT, *[answered(A)] * 40, complete=True)
    assert reason == f"never forwarded to {B} in 40 connections, though it is one of its endpoints"


def test_part_of_the_probes() -> None:
    (reason,) = judged(KEPT, answered(), Dropped(), answered())
    assert reason == "should be forwarded, but was dropped 1 of 3 times"


def test_affinity() -> None:
    asked = ask(KEPT)
    assert changed_endpoint(seen(asked, [answered(A)] * 3)) is None
    assert changed_endpoint(seen(asked, [answered(A), answered(B)])) is not None


@pytest.mark.parametrize(
    ("scheduler", "counts", "even"),
    [
        (CHANCE, (55, 45), True),
        (CHANCE, (95, 5), False),
        ("rr", (50, 51), True),
        ("rr", (49, 51), False),
        ("lc", (95, 5), True),  # its aim is another one
    ],
)
def test_balance(scheduler: str, counts: tuple[int, int], even: bool) -> None:
    asked = ask(KEPT)
    found = balance(asked, seen(asked, [answered(A)] * counts[0] + [answered(B)] * counts[1]), scheduler)
    assert found.even == even
    assert found.counts == dict(zip((A, B), counts, strict=True))
    if not even:
        assert f"got {max(counts)} connections" in uneven(found)


def test_what_ipvs_mode_does_otherwise() -> None:
    forward, nothing = KEPT, Expected("no match")
    own = {NODE}
    assert in_mode(Mode.IPTABLES, target("127.0.0.1"), forward, own) == (forward, None)
    assert in_mode(Mode.IPVS, target("127.0.0.1"), forward, own) == (nothing, LOOPBACK_REASON)
    assert in_mode(Mode.IPVS, target("127.0.0.1"), nothing, own) == (nothing, None)
    assert in_mode(Mode.IPVS, target(), forward, own) == (forward, None)
    assert in_mode(Mode.IPVS, target(), nothing, own) == (Expected("reject"), BESIDE_REASON)
    assert in_mode(Mode.IPVS, target(NODE), nothing, own) == (nothing, None)
