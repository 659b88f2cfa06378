"""Owns one pass over a roll-out: what it looks at, the status it works on, and the actions it asks for."""

from __future__ import annotations

from dataclasses import dataclass, field

from nodeproxy.operator.api import (
    KUBE_PROXY,
    NODEPROXY,
    NodeLine,
    NodePhase,
    ProxyRollout,
    RolloutStatus,
    seconds,
    timestamp,
)
from nodeproxy.operator.world import Action, Tell, World


@dataclass
class Turn:
    """One pass. `status` is a copy that is changed; `now`: seconds since the epoch."""

    rollout: ProxyRollout
    status: RolloutStatus
    world: World
    now: float
    actions: list[Action] = field(default_factory=list)

    @property
    def time(self) -> str:
        """Now, as it is written."""
        return timestamp(self.now)

    def since(self, time: str | None) -> float:
        """Seconds since then; none since never."""
        return self.now - seconds(time) if time else 0.0

    def enter(self, line: NodeLine, phase: NodePhase, reason: str | None = None) -> None:
        """The node comes to another phase."""
        line.phase, line.since, line.tries, line.round_at = phase, self.time, 0, None
        line.pod_uid = line.unwell_since = None
        if reason is not None:
            line.reason = reason
        if phase in (NodePhase.UPDATED, NodePhase.ROLLED_BACK, NodePhase.FAILED, NodePhase.GONE):
            line.finished_at = self.time

    def tell(self, reason: str, message: str, node: str | None = None, *, warning: bool = False) -> None:
        """Ask for an Event."""
        self.actions.append(Tell(reason=reason, message=message, node=node, warning=warning))

    def serving(self, node: str) -> str:
        """Which proxy a node has, by its label where that counts."""
        seen, daemon_set = self.world.nodes.get(node), self.world.daemon_set
        by_label = daemon_set is not None and daemon_set.by_label
        return KUBE_PROXY if by_label and (seen is None or seen.proxy != NODEPROXY) else NODEPROXY
