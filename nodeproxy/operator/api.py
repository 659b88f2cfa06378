"""Owns the shape of `ProxyRollout` (nodeproxy.io/v1alpha1). `deploy/operator/crds/proxyrollouts.yaml` is its schema.

Status structs are mutable: `plan` works on a copy of its own. Times are RFC 3339 in UTC; durations seconds.
"""

from __future__ import annotations

import enum
from datetime import UTC, datetime
from typing import Any, Final

from msgspec import Struct, field

from nodeproxy.api.proxy_node import API_VERSION, ApiObjectBase, ObjectMeta

PROXY_ROLLOUTS: Final = f"/apis/{API_VERSION}/proxyrollouts"
FINALIZER: Final = "nodeproxy.io/rollout"
MAX_NODES: Final = 1000
"""Of one roll-out: their lines are one object, which etcd takes up to 1.5 MB of."""

NODEPROXY: Final = "nodeproxy"
KUBE_PROXY: Final = "kube-proxy"


class Phase(enum.StrEnum):
    """Where a roll-out stands."""

    PENDING = "Pending"
    PROGRESSING = "Progressing"
    SOAKING = "Soaking"
    PAUSED = "Paused"
    ROLLING_BACK = "RollingBack"
    COMPLETED = "Completed"
    FAILED = "Failed"
    ABORTED = "Aborted"


FINISHED: Final = frozenset({Phase.COMPLETED, Phase.FAILED, Phase.ABORTED})


class NodePhase(enum.StrEnum):
    """Where one node of a roll-out stands."""

    WAITING = "Waiting"
    CHECKING = "Checking"
    """It is its turn: it is verified before anything is changed."""
    CHANGING = "Changing"
    VERIFYING = "Verifying"
    UPDATED = "Updated"
    ROLLING_BACK = "RollingBack"
    ROLLED_BACK = "RolledBack"
    FAILED = "Failed"
    """It could not be taken back, or was not well before."""
    GONE = "Gone"
    """The Node object is no more."""


FORWARD: Final = frozenset({NodePhase.CHECKING, NodePhase.CHANGING, NodePhase.VERIFYING})
IN_FLIGHT: Final = FORWARD | {NodePhase.ROLLING_BACK}


class Check(enum.StrEnum):
    """What is looked at on each node."""

    AGENT = "agent"
    AUDIT = "audit"
    METRICS = "metrics"
    PROBES = "probes"


class Target(ApiObjectBase, frozen=True):
    """What the nodes shall have; what is None stays as it is."""

    proxy: str | None = None
    mode: str | None = None
    configuration: dict[str, Any] | None = None
    image: str | None = None

    def __str__(self) -> str:
        words = [
            self.proxy or "",
            f"mode {self.mode}" if self.mode else "",
            f"image {self.image}" if self.image else "",
            "configuration" if self.configuration else "",
        ]
        return ", ".join(word for word in words if word)

    @property
    def concerns_agent(self) -> bool:
        """Whether the agents of its nodes are told something."""
        return self.mode is not None or self.configuration is not None


class MatchExpression(ApiObjectBase, frozen=True):
    """One expression of a label selector."""

    key: str
    operator: str
    values: tuple[str, ...] = ()


class Selector(ApiObjectBase, frozen=True):
    """A label selector; an empty one matches everything."""

    match_labels: dict[str, str] = field(default_factory=dict)
    match_expressions: tuple[MatchExpression, ...] = ()

    def matches(self, labels: dict[str, str]) -> bool:
        """As the API defines it: all hold; NotIn and DoesNotExist also where there is no such label."""
        return all(labels.get(key) == value for key, value in self.match_labels.items()) and all(
            _holds(expression, labels) for expression in self.match_expressions
        )


def _holds(expression: MatchExpression, labels: dict[str, str]) -> bool:
    value = labels.get(expression.key)
    match expression.operator:
        case "In":
            return value in expression.values
        case "NotIn":
            return value not in expression.values
        case "Exists":
            return value is not None
        case _:
            return value is None


class Nodes(ApiObjectBase, frozen=True):
    """Which nodes: those named and those that the selector matches."""

    names: tuple[str, ...] = ()
    selector: Selector | None = None


class Thresholds(ApiObjectBase, frozen=True):
    """How much worse than before a node may be."""

    error_ratio: float = 0.0
    latency_factor: float = 3.0
    latency_slack_seconds: float = 0.5
    sync_errors: int = 0
    refused_service_ports: int = 0


class Probes(ApiObjectBase, frozen=True):
    """Connections through a node: `count` to each target."""

    count: int = 20
    timeout_seconds: float = 2.0
    services: int = 5


class Checks(ApiObjectBase, frozen=True):
    """What is looked at, before (unless `before` is False) and after."""

    which: tuple[str, ...] = tuple(Check)
    before: bool = True
    thresholds: Thresholds = Thresholds()
    probes: Probes = Probes()


class Timeouts(ApiObjectBase, frozen=True):
    """After which time a node has failed."""

    node_ready_seconds: int = 600
    verification_seconds: int = 180


class RolloutSpec(ApiObjectBase, frozen=True):
    """What is wanted. `abort`: Stop or Rollback."""

    target: Target
    nodes: Nodes
    steps: tuple[int | str, ...] = (1, "10%", "100%")
    soak_seconds: int = 60
    max_parallel: int = 1
    checks: Checks = Checks()
    paused: bool = False
    auto_rollback: bool = False
    abort: str | None = None
    timeouts: Timeouts = Timeouts()


class _Status(Struct, rename="camel", omit_defaults=True, kw_only=True):
    """Base of what is written into the status."""


class NodeState(_Status):
    """What a node has. `spec_mode`, `spec_configuration`: of its ProxyNode, to be put back."""

    proxy: str | None = None
    mode: str | None = None
    image: str | None = None
    spec_mode: str | None = None
    spec_configuration: dict[str, Any] | None = None


class ProbeFigures(_Status):
    """Connections to one target. `reason`: why some failed."""

    target: str
    sent: int = 0
    failed: int = 0
    p50_seconds: float | None = field(default=None, name="p50Seconds")
    reason: str | None = None


class Figures(_Status):
    """What a verification measured."""

    sync_errors: int | None = None
    refused_service_ports: int | None = None
    sync_p99_seconds: float | None = field(default=None, name="syncP99Seconds")
    in_sync: bool | None = None
    audit: bool | None = None
    probes: list[ProbeFigures] = []


class NodeLine(_Status):
    """One node of a roll-out."""

    name: str
    phase: NodePhase
    reason: str | None = None
    step: int = 0
    round: int = 0
    tries: int = 0
    since: str | None = None
    round_at: str | None = None
    started_at: str | None = None
    finished_at: str | None = None
    uid: str | None = None
    pod_uid: str | None = None
    """The pod that was deleted in this phase, so that one with the other image comes."""
    unwell_since: str | None = None
    """While it soaks: since when something is said against this node."""
    before: NodeState | None = None
    after: NodeState | None = None
    figures_before: Figures | None = None
    figures_after: Figures | None = None


class Condition(_Status):
    """As of the API conventions."""

    type: str
    status: str
    reason: str
    message: str
    last_transition_time: str
    observed_generation: int = 0


class DaemonSetBefore(_Status):
    """What the DaemonSet had before its image was changed."""

    image: str
    update_strategy: dict[str, Any]
    template_generation: str | None = None
    restored: bool = False


class Counts(_Status, omit_defaults=False):
    """Nodes by phase."""

    total: int = 0
    updated: int = 0
    in_progress: int = 0
    failed: int = 0
    rolled_back: int = 0
    gone: int = 0


class RolloutStatus(_Status):
    """Where a roll-out stands."""

    observed_generation: int = 0
    phase: Phase | None = None
    message: str | None = None
    step: int = 0
    step_text: str | None = None
    target: str | None = None
    progress: str | None = None
    soak_since: str | None = None
    soak_until: str | None = None
    """`soak_since` and `spec.soakSeconds`, anew in each pass. None: it does not soak."""
    outcome: Phase | None = None
    take_back: bool = False
    started_at: str | None = None
    finished_at: str | None = None
    counts: Counts | None = None
    conditions: list[Condition] = []
    daemon_set: DaemonSetBefore | None = None
    nodes: list[NodeLine] = []


class ProxyRollout(ApiObjectBase, frozen=True):
    """A ProxyRollout."""

    metadata: ObjectMeta
    spec: RolloutSpec
    status: RolloutStatus = field(default_factory=RolloutStatus)

    @property
    def finished(self) -> bool:
        """Whether nothing more happens."""
        return self.status.phase in FINISHED

    @property
    def soak_ends(self) -> float | None:
        """When, in seconds since the epoch, as the spec says now. None: it does not soak."""
        status = self.status
        if status.soak_since is not None:
            return seconds(status.soak_since) + self.spec.soak_seconds
        return seconds(status.soak_until) if status.soak_until is not None else None


def timestamp(now: float) -> str:
    """Seconds since the epoch as RFC 3339, in milliseconds."""
    return datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def seconds(time: str) -> float:
    """RFC 3339 as seconds since the epoch."""
    return datetime.fromisoformat(time).timestamp()
