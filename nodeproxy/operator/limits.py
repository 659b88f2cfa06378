"""Owns what fits into the status of a roll-out: how long its texts may be, and whether its lines fit into one object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from nodeproxy.api.proxy_node import ProxyNodeSpec
from nodeproxy.operator.api import Figures, NodeLine, NodePhase, NodeState, ProbeFigures, ProxyRollout, RolloutStatus
from nodeproxy.operator.steps import Refused
from nodeproxy.operator.world import World

MAX_REASON: Final = 1024
"""Characters of `status.nodes[].reason`; a test holds these against the schema."""
MAX_MESSAGE: Final = 2048
"""Characters of `status.message` and of a condition's message."""
MAX_BYTES: Final = 1_200_000
"""Of a whole roll-out. etcd takes 1.5 MiB; the rest is for metadata and for what is said of nodes that are in flight."""
_TIME: Final = "2026-01-01T00:00:00.000Z"
_UID: Final = "01234567-89ab-cdef-0123-456789abcdef"
_REASON: Final = "x" * 64
_TARGET: Final = "x" * 64
_OWN_TARGETS: Final = 3


def shortened(status: RolloutStatus) -> RolloutStatus:
    """The status as the schema takes it: agents, webhooks and kubelets say more than fits, and none of them may stop us."""
    return msgspec.structs.replace(
        status,
        message=_cut(status.message, MAX_MESSAGE),
        conditions=[msgspec.structs.replace(one, message=_cut(one.message, MAX_MESSAGE) or "") for one in status.conditions],
        nodes=[
            msgspec.structs.replace(line, reason=_cut(line.reason, MAX_REASON))
            if line.reason is not None and len(line.reason) > MAX_REASON
            else line
            for line in status.nodes
        ],
    )


def _cut(text: str | None, limit: int) -> str | None:
    return text if text is None or len(text) <= limit else f"{text[: limit - 1]}…"


def check_weight(rollout: ProxyRollout, names: Sequence[str], world: World) -> None:
    """Raises `Refused` where the lines of these nodes would become too large for one object, half way through."""
    whole, configurations = weight(rollout, names, world)
    if whole > MAX_BYTES:
        raise Refused(
            "TooLarge",
            f"the lines of {len(names)} nodes would come to {whole // 1000} kB, of which"
            f" {configurations // 1000} kB are the configurations that their ProxyNodes have now, and a roll-out may have"
            f" {MAX_BYTES // 1000} kB: divide the nodes by labels",
        )


def weight(rollout: ProxyRollout, names: Sequence[str], world: World) -> tuple[int, int]:
    """Bytes of a roll-out at its end, estimated; and those of them that are the nodes' present configurations."""
    lines = [finished_line(rollout, name, world) for name in names]
    configurations = sum(
        len(msgspec.json.encode(line.before.spec_configuration))
        for line in lines
        if line.before is not None and line.before.spec_configuration is not None
    )
    spec = 2 * len(msgspec.json.encode(rollout.spec))  # kubectl apply keeps it in an annotation, too
    in_flight = min(rollout.spec.max_parallel, len(names)) * _bytes_in_flight(rollout)
    return sum(len(msgspec.json.encode(line)) + 1 for line in lines) + spec + in_flight, configurations


def finished_line(rollout: ProxyRollout, name: str, world: World) -> NodeLine:
    """A line as it is at its longest once nothing more happens to its node: changed, and taken back again."""
    seen = world.proxy_nodes.get(name)
    told = seen.spec if seen is not None else ProxyNodeSpec()
    present = world.daemon_set.image if world.daemon_set is not None else None

    def state(image: str | None, **told: Any) -> NodeState:
        return NodeState(proxy="kube-proxy", mode="iptables", image=image, **told)

    figures = Figures(sync_errors=1000, refused_service_ports=1000, sync_p99_seconds=0.012345678901234567)
    return NodeLine(
        name=name,
        phase=NodePhase.ROLLED_BACK,
        reason=_REASON,
        step=10,
        round=10,
        tries=1,
        since=_TIME,
        round_at=_TIME,
        started_at=_TIME,
        finished_at=_TIME,
        uid=world.nodes[name].uid if name in world.nodes else None,
        pod_uid=_UID,
        before=state(present, spec_mode=told.mode, spec_configuration=told.configuration),
        after=state(rollout.spec.target.image or present),
        figures_before=figures,
        figures_after=figures,
    )


def _bytes_in_flight(rollout: ProxyRollout) -> int:
    """What stands in a line besides, while its node is changed: why it waits, and what probes found, before and after."""
    one = ProbeFigures(target=_TARGET, sent=200, failed=200, p50_seconds=0.0123456, reason=_REASON)
    targets = rollout.spec.checks.probes.services + _OWN_TARGETS
    return MAX_REASON + 2 * targets * (len(msgspec.json.encode(one)) + 1)
