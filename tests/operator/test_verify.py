"""Whether a node is good enough: what was measured after a change, held against what was before."""

from __future__ import annotations

from typing import Any

import pytest

from nodeproxy.api.proxy_node import ObjectMeta
from nodeproxy.operator.api import Check, Checks, Figures, Nodes, ProbeFigures, ProxyRollout, RolloutSpec, Target, Thresholds
from nodeproxy.operator.steps import amounts
from nodeproxy.operator.verify import complaint

OWN = "nodeproxy-probe"


def rollout(which: tuple[str, ...] = tuple(Check), **thresholds: Any) -> ProxyRollout:
    checks = Checks(which=which, thresholds=Thresholds(**thresholds))
    spec = RolloutSpec(target=Target(mode="ipvs"), nodes=Nodes(names=("n1",)), checks=checks)
    return ProxyRollout(metadata=ObjectMeta(name="r"), spec=spec)


def figures(own: int = 0, theirs: int = 0, p50: float = 0.001, **fields: Any) -> Figures:
    probes = [
        ProbeFigures(target=OWN, sent=20, failed=own, p50_seconds=p50),
        ProbeFigures(
            target="shop/web", sent=20, failed=theirs, p50_seconds=p50, reason="connection refused" if theirs else None
        ),
    ]
    good = {"sync_errors": 2, "refused_service_ports": 1, "sync_p99_seconds": 0.1, "in_sync": True, "audit": True}
    return Figures(**{**good, "probes": probes, **fields})


@pytest.mark.parametrize(
    ("after", "thresholds", "words"),
    [
        (figures(), {}, None),
        (figures(in_sync=False), {}, "the agent is not in sync"),
        (figures(audit=False), {}, "the kernel does not hold what the agent wants: KUBE-SERVICES lacks a rule"),
        (figures(sync_errors=3), {}, "1 syncs failed since the change"),
        (figures(sync_errors=3), {"sync_errors": 1}, None),
        (figures(sync_errors=1), {}, "1 syncs failed since the change"),  # it began to count anew, and counts one
        (figures(refused_service_ports=2), {}, "1 more Service ports than before are not programmed"),
        (figures(refused_service_ports=0), {}, None),
        (figures(sync_p99_seconds=0.79), {}, None),
        (figures(sync_p99_seconds=0.81), {}, "the p99 of a sync takes 0.81 s, 0.1 s before"),
        (figures(own=1), {}, "1 of 20 probes through nodeproxy-probe failed"),
        (figures(own=1), {"error_ratio": 0.05}, None),
        (figures(theirs=1), {}, "1 of 20 probes through shop/web failed: connection refused"),
        (figures(p50=0.6), {}, "a connection through nodeproxy-probe takes 0.6 s, 0.001 s before"),
        (figures(probes=[]), {}, "no probe was sent to the probes' own Service"),
    ],
)
def test_it_may_not_be_worse_than_before(after: Figures, thresholds: dict[str, Any], words: str | None) -> None:
    differs = ["KUBE-SERVICES lacks a rule", "and another"]
    assert complaint(rollout(**thresholds), after, figures(), differs=differs) == words


def test_an_agent_that_was_started_anew_counts_from_nothing() -> None:
    assert complaint(rollout(), figures(sync_errors=2), figures(), restarted=True) == "2 syncs failed since the change"
    assert complaint(rollout(), figures(sync_errors=0), figures(), restarted=True) is None


def test_a_service_that_failed_before_may_fail_after_and_ours_may_not_even_before() -> None:
    assert complaint(rollout(), figures(theirs=20), figures(theirs=20)) is None
    assert complaint(rollout(), figures(theirs=20), None) is None, "before a change others have nothing to be held against"
    assert complaint(rollout(), figures(own=20), None) == "20 of 20 probes through nodeproxy-probe failed"
    gone = figures()
    gone.probes = gone.probes[:1]
    assert complaint(rollout(), figures(theirs=20), gone) is None, "a Service that was not probed before"


def test_only_what_is_asked_for_is_judged() -> None:
    bad = figures(own=20, in_sync=False, audit=False, sync_errors=9)
    for which, words in (
        (("agent",), "the agent is not in sync"),
        (("audit",), "the kernel does not hold what the agent wants: the audit is not clean"),
        (("metrics",), "7 syncs failed since the change"),
        (("probes",), "20 of 20 probes through nodeproxy-probe failed"),
    ):
        assert complaint(rollout(which), bad, figures()) == words


def test_steps_come_to_numbers_of_nodes() -> None:
    assert amounts((1, "10%", "100%"), 25) == [1, 3, 25]
    assert amounts(("1", "10%", "100%"), 3) == [1, 1, 3]
    assert amounts((5, "100%"), 3) == [3, 3]
    assert amounts(("100%",), 0) == [0]
