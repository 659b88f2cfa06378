"""Owns the operator's metrics."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from nodeproxy.operator.api import NodePhase, Phase, ProxyRollout, RolloutStatus, seconds
from nodeproxy.operator.world import ProbesSeen

_BUCKETS = (5, 10, 20, 40, 80, 160, 320, 640, 1280, 3600)


class Metrics:
    """Counts of this replica since it started; gauges are of what it last saw, and 0 while another one acts."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.leader = Gauge("nodeproxy_operator_leader", "1 while this replica acts", registry=registry)
        self.passes = Counter(
            "nodeproxy_operator_reconciliations", "Passes over all roll-outs", ("result",), registry=registry
        )
        self.actions = Counter(
            "nodeproxy_operator_actions", "Actions carried out, by kind", ("action", "result"), registry=registry
        )
        self.failures = Counter(
            "nodeproxy_operator_rollout_failures",
            "Looks at one roll-out that failed, by a request or by a fault of the operator",
            ("kind",),
            registry=registry,
        )
        self._rollouts = Gauge("nodeproxy_rollouts", "Roll-outs by phase", ("phase",), registry=registry)
        self._nodes = Counter(
            "nodeproxy_rollout_nodes", "Nodes that came to an end, by which", ("phase",), registry=registry
        )
        self._seconds = Histogram(
            "nodeproxy_rollout_node_duration_seconds",
            "From a node's turn until it was updated and verified",
            buckets=_BUCKETS,
            registry=registry,
        )
        self._probes = Counter(
            "nodeproxy_rollout_probes", "Connections of probes, by result", ("result",), registry=registry
        )
        self._counted: set[str] = set()
        for phase in (NodePhase.UPDATED, NodePhase.ROLLED_BACK, NodePhase.FAILED, NodePhase.GONE):
            self._nodes.labels(phase=phase.value)
        for kind in ("request", "fault"):
            self.failures.labels(kind=kind)
        for result in ("ok", "failed"):
            self._probes.labels(result=result)
        self.rollouts(())

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self.registry)

    def rollouts(self, rollouts: Iterable[ProxyRollout]) -> None:
        """What roll-outs there are."""
        found = Tally(rollout.status.phase or Phase.PENDING for rollout in rollouts)
        for phase in Phase:
            self._rollouts.labels(phase=phase.value).set(found[phase])

    def changed(self, old: RolloutStatus, new: RolloutStatus) -> None:
        """A status was written: count the nodes that came to an end."""
        phases = {line.name: line.phase for line in old.nodes}
        for line in new.nodes:
            if phases.get(line.name) is line.phase or line.finished_at is None:
                continue
            if line.phase in (NodePhase.UPDATED, NodePhase.ROLLED_BACK, NodePhase.FAILED, NodePhase.GONE):
                self._nodes.labels(phase=line.phase.value).inc()
            if line.phase is NodePhase.UPDATED and line.started_at is not None:
                self._seconds.observe(seconds(line.finished_at) - seconds(line.started_at))

    def probes(self, id: str, seen: ProbesSeen) -> None:
        """Probes have ended: each verification counts once."""
        if seen.done and id not in self._counted:
            self._counted.add(id)
            for target in seen.targets:
                self._probes.labels(result="failed").inc(target.failed)
                self._probes.labels(result="ok").inc(target.sent - target.failed)

    def forget_probes(self, present: Iterable[str]) -> None:
        """Verifications that are no longer there cannot come again."""
        self._counted &= set(present)
