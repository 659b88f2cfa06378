"""Owns the judgement on one node: what a verification measured, and whether it is good enough. Pure."""

from __future__ import annotations

from zlib import crc32

from nodeproxy.operator.api import Check, Figures, NodeLine, ProbeFigures, ProxyRollout, Thresholds
from nodeproxy.operator.world import World

OWN_TARGETS = ("nodeproxy-probe", "nodeproxy-probe node port")
"""Targets of ours, which have to answer; those of others are held against what they were before."""


def verification_id(rollout: ProxyRollout, line: NodeLine) -> str:
    """Which verification this is. Good as the end of a pod's name, and never used twice."""
    return f"{(rollout.metadata.uid or '')[:8]}-{crc32(line.name.encode()):08x}-{line.round}"


def agent_checks(rollout: ProxyRollout) -> bool:
    """Whether something is asked of the agent itself."""
    return bool({Check.AGENT, Check.AUDIT, Check.METRICS} & set(rollout.spec.checks.which))


def measured(rollout: ProxyRollout, line: NodeLine, world: World, *, agent: bool) -> Figures | str:
    """What the present verification has measured, or what it waits for. `agent`: whether nodeproxy serves the node."""
    figures = Figures()
    which = rollout.spec.checks.which
    wanted = verification_id(rollout, line)
    if agent and agent_checks(rollout):
        seen = world.proxy_nodes.get(line.name)
        answer = seen.status.verification if seen else None
        if seen is None or answer is None or answer.id != wanted:
            return "the agent has not answered"
        figures.in_sync = seen.status.in_sync
        if Check.AUDIT in which:
            if seen.status.audit is None:
                return "the agent has not audited the kernel"
            figures.audit = seen.status.audit.clean
        figures.sync_errors = answer.sync_errors
        figures.refused_service_ports = answer.refused_service_ports
        figures.sync_p99_seconds = answer.sync_p99_seconds
    if Check.PROBES in which:
        probes = world.probes.get(wanted)
        if probes is None or not probes.done:
            return f"the probes have not ended{f' ({probes.trouble})' if probes and probes.trouble else ''}"
        figures.probes = list(probes.targets)
    return figures


def complaint(
    rollout: ProxyRollout,
    figures: Figures,
    before: Figures | None,
    *,
    differs: list[str] | None = None,
    restarted: bool = False,
) -> str | None:
    """Why these figures are not good enough, in words; None where they are.

    `before`: what was measured before the change; None: that is what is being judged, so that only what holds by itself
    counts. `restarted`: the agent's counters began anew.
    """
    which, limits = rollout.spec.checks.which, rollout.spec.checks.thresholds
    if Check.AGENT in which and figures.in_sync is False:
        return "the agent is not in sync"
    if Check.AUDIT in which and figures.audit is False:
        return f"the kernel does not hold what the agent wants: {_first(differs)}"
    if Check.METRICS in which and before is not None and (found := _worse(figures, before, limits, restarted)):
        return found
    if Check.PROBES in which:
        return _probes(figures.probes, before, limits)
    return None


def _first(differs: list[str] | None) -> str:
    return differs[0][:200] if differs else "the audit is not clean"


def _worse(figures: Figures, before: Figures, limits: Thresholds, restarted: bool) -> str | None:
    if figures.sync_errors is not None:
        since = (
            0 if restarted or before.sync_errors is None or before.sync_errors > figures.sync_errors else before.sync_errors
        )
        if figures.sync_errors - since > limits.sync_errors:
            return f"{figures.sync_errors - since} syncs failed since the change"
    if figures.refused_service_ports is not None:
        more = figures.refused_service_ports - (before.refused_service_ports or 0)
        if more > limits.refused_service_ports:
            return f"{more} more Service ports than before are not programmed"
    if (p99 := figures.sync_p99_seconds) is not None and before.sync_p99_seconds is not None:
        limit = before.sync_p99_seconds * limits.latency_factor + limits.latency_slack_seconds
        if p99 > limit:
            return f"the p99 of a sync takes {p99:.3g} s, {before.sync_p99_seconds:.3g} s before"
    return None


def _probes(probes: list[ProbeFigures], before: Figures | None, limits: Thresholds) -> str | None:
    known = {one.target: one for one in before.probes} if before is not None else {}
    if not any(one.target in OWN_TARGETS and one.sent for one in probes):
        return "no probe was sent to the probes' own Service"
    for one in probes:
        past = known.get(one.target)
        if past is None and one.target not in OWN_TARGETS:
            continue
        ratio = one.failed / one.sent if one.sent else 1.0
        past_ratio = past.failed / past.sent if past and past.sent else 0.0
        if ratio > past_ratio + limits.error_ratio:
            why = f": {one.reason}" if one.reason else ""
            return f"{one.failed} of {one.sent} probes through {one.target} failed{why}"
        if one.p50_seconds is not None and past is not None and past.p50_seconds is not None:
            limit = past.p50_seconds * limits.latency_factor + limits.latency_slack_seconds
            if one.p50_seconds > limit:
                return f"a connection through {one.target} takes {one.p50_seconds:.3g} s, {past.p50_seconds:.3g} s before"
    return None
