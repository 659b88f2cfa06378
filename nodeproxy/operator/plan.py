"""Owns the reconciliation of a roll-out, as a pure function of what is observed: its next status, and what is to be done.

The status is written before the actions are taken, and every action is asked for until it is seen to have happened. So an
operator that ends at any point is followed by one that goes on there.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from nodeproxy.operator.api import (
    FINALIZER,
    FINISHED,
    FORWARD,
    IN_FLIGHT,
    NODEPROXY,
    Condition,
    Counts,
    DaemonSetBefore,
    NodeLine,
    NodePhase,
    Phase,
    ProxyRollout,
    RolloutStatus,
    timestamp,
)
from nodeproxy.operator.limits import check_weight
from nodeproxy.operator.node_plan import advance, gone, image_on_the_way_back
from nodeproxy.operator.steps import Refused, accept, amounts, some
from nodeproxy.operator.turn import Turn
from nodeproxy.operator.verify import agent_checks, verification_id
from nodeproxy.operator.world import (
    Action,
    AddFinalizer,
    EndCleanup,
    EndProbes,
    ForgetNode,
    ReleaseFinalizer,
    SetImage,
    World,
)

ON_DELETE = {"type": "OnDelete"}
_MAY_LEAVE = IN_FLIGHT | {NodePhase.WAITING, NodePhase.UPDATED}
_COUNTING_SECONDS = 60.0
"""The DaemonSet's controller is given so long to count the pods of the last node."""


class Plan(Struct, frozen=True):
    """What comes next."""

    status: RolloutStatus
    actions: tuple[Action, ...]


def plan(rollout: ProxyRollout, world: World, now: float) -> Plan:
    """The next status of a roll-out and what is to be done. Pure; `now`: seconds since the epoch."""
    status = msgspec.convert(msgspec.to_builtins(rollout.status), RolloutStatus)
    turn = Turn(rollout, status, world, now)
    deleted = rollout.metadata.deletion_timestamp is not None
    has_finalizer = FINALIZER in (rollout.metadata.finalizers or [])
    if not status.nodes and not rollout.finished:
        if deleted:
            return Plan(rollout.status, (ReleaseFinalizer(),) if has_finalizer else ())
        if not has_finalizer:
            return Plan(rollout.status, (AddFinalizer(),))
        _accept(turn)
    elif not rollout.finished:
        _proceed(turn, deleted)
    left = _clear_away(turn)
    # Not in the pass that ends it: what is asked for there may be lost, and what is left of it be seen only afterwards.
    seen = rollout.finished or not status.nodes
    if status.phase in FINISHED and has_finalizer and seen and not left:
        turn.actions.append(ReleaseFinalizer())
    status.observed_generation = rollout.metadata.generation
    _summarise(turn)
    return Plan(status, tuple(turn.actions))


def _accept(turn: Turn) -> None:
    """Begin it, or refuse it for good."""
    status, rollout = turn.status, turn.rollout
    status.target = str(rollout.spec.target)
    status.started_at = turn.time
    if rollout.spec.abort is not None:
        _finish(turn, Phase.ABORTED, "aborted before it began")
        return
    try:
        names, left_out = accept(rollout, turn.world)
        check_weight(rollout, names, turn.world)
    except Refused as error:
        _condition(turn, "Accepted", "False", error.reason, str(error))
        _finish(turn, Phase.FAILED, f"refused: {error}")
        turn.tell("Refused", str(error), warning=True)
        return
    but = f"; left out, because the DaemonSet nodeproxy does not run there: {some(left_out)}" if left_out else ""
    _condition(turn, "Accepted", "True", "Accepted", f"{len(names)} nodes belong to it{but}")
    status.nodes = [NodeLine(name=name, phase=NodePhase.WAITING, uid=turn.world.nodes[name].uid or None) for name in names]
    status.phase, status.step = Phase.PROGRESSING, 1
    status.message = f"{len(names)} nodes shall have {rollout.spec.target}{but}"
    turn.tell("Started", status.message)


def _proceed(turn: Turn, deleted: bool) -> None:
    status, spec = turn.status, turn.rollout.spec
    for line in status.nodes:
        if line.phase in _MAY_LEAVE:
            gone(turn, line)
    if status.outcome is None and (deleted or spec.abort is not None):
        why = "deleted" if deleted else "aborted"
        _stop(
            turn,
            Phase.ABORTED,
            f"{why} after {_count(turn, NodePhase.UPDATED)} of {len(status.nodes)} nodes",
            spec.abort == "Rollback",
        )
    elif status.outcome is Phase.ABORTED and spec.abort == "Rollback" and not deleted:
        status.take_back = True
    if status.outcome is None:
        for line in [one for one in status.nodes if one.phase in FORWARD]:
            reason = advance(turn, line)
            if reason is not None:
                _fail(turn, line, reason)
                break
    if status.outcome is None:
        _forward(turn)
    if status.outcome is not None:
        _backward(turn)


def _forward(turn: Turn) -> None:
    """Begin further nodes, as far as the step and parallelism allow; end the step."""
    status, spec = turn.status, turn.rollout.spec
    total = sum(line.phase is not NodePhase.GONE for line in status.nodes)
    limits = amounts(spec.steps, total)
    status.step = min(max(status.step, 1), len(limits))
    allowed = limits[status.step - 1]
    updated = _count(turn, NodePhase.UPDATED)
    if updated >= allowed and not _in_flight(turn):
        if _soak(turn, last=status.step >= len(limits)):
            return
    else:
        status.soak_since = status.soak_until = None
        status.phase = Phase.PAUSED if spec.paused else Phase.PROGRESSING
        if not spec.paused:
            _begin(turn, allowed)
        _say_what_is_done(turn)
    if status.outcome is None:
        _template(turn)


def _begin(turn: Turn, allowed: int) -> None:
    status, spec = turn.status, turn.rollout.spec
    begun = sum(line.phase not in (NodePhase.WAITING, NodePhase.GONE) for line in status.nodes)
    room = min(allowed - begun, spec.max_parallel - len(_in_flight(turn)))
    waiting = [line for line in status.nodes if line.phase is NodePhase.WAITING]
    waiting.sort(key=lambda line: not turn.world.nodes[line.name].ready)  # those that are not Ready come last
    for line in waiting[: max(room, 0)]:
        line.started_at, line.step = turn.time, status.step
        turn.enter(line, NodePhase.CHECKING)


def _soak(turn: Turn, *, last: bool) -> bool:
    """Watch the nodes of the step for a while; then the next step, or the end. Whether it comes to its end."""
    status, spec = turn.status, turn.rollout.spec
    begins, ends = status.soak_until is None, turn.rollout.soak_ends
    if begins or ends is None:
        ends = turn.now + spec.soak_seconds
        status.soak_since = turn.time
        turn.tell("StepDone", f"step {status.step} of {len(spec.steps)} is done: {_count(turn, NodePhase.UPDATED)} nodes")
    status.soak_until = timestamp(ends)
    said = _look_at_finished(turn, observed=not begins)
    if status.outcome is not None:
        return False
    if begins or said is not None or turn.now < ends:
        status.phase = Phase.PAUSED if spec.paused else Phase.SOAKING
        until = f"step {status.step} is done; watching its nodes until {status.soak_until[:19]}Z"
        status.message = until if said is None else f"{said}; looking again"
        return False
    if not last:
        if spec.paused:
            status.phase, status.message = Phase.PAUSED, f"paused after step {status.step}"
            return False
        status.step, status.phase = status.step + 1, Phase.PROGRESSING
        status.soak_since = status.soak_until = None
        status.message = f"step {status.step} begins"
        return False
    if _template(turn, completed=True):
        message = f"{_count(turn, NodePhase.UPDATED)} nodes have {spec.target}"
        _finish(turn, Phase.COMPLETED, message)
        turn.tell("Completed", message)
    else:
        status.phase, status.message = Phase.PROGRESSING, "all nodes are done; the DaemonSet gets its update strategy again"
    return True


def _look_at_finished(turn: Turn, *, observed: bool) -> str | None:
    """What is said against a finished node while it soaks. One of which it is said for too long fails."""
    spec = turn.rollout.spec
    found: str | None = None
    for line in [one for one in turn.status.nodes if one.phase is NodePhase.UPDATED]:
        why = _spoiled(turn, line) if observed else None
        if why is None or spec.paused:  # paused, nothing fails; nor does the soak time end with such a node
            line.unwell_since = None
        else:
            line.unwell_since = line.unwell_since or turn.time
            patience = spec.timeouts.verification_seconds
            if not turn.world.nodes[line.name].ready:  # it may be started anew, for reasons of its own
                patience = max(patience, spec.timeouts.node_ready_seconds)
            if turn.since(line.unwell_since) > patience:
                _fail(turn, line, f"in the soak time {why}, and so it was for {patience} s")
                return None
        if why is not None:
            found = found or f"node {line.name}: {why}"
    return found


def _spoiled(turn: Turn, line: NodeLine) -> str | None:
    """What is to be seen against a finished node, without asking its agent: an agent that is dead says nothing new."""
    world, proxy = turn.world, turn.serving(line.name)
    if not world.nodes[line.name].ready:
        return "the node is not Ready"
    pod = (world.agents if proxy == NODEPROXY else world.kube_proxies).get(line.name)
    if pod is None or pod.deleting or not pod.ready:
        return f"{proxy}'s pod is not ready{f': {pod.trouble}' if pod and pod.trouble else ''}"
    seen = world.proxy_nodes.get(line.name)
    if seen is None or not agent_checks(turn.rollout) or proxy != NODEPROXY:
        return None
    if not seen.status.in_sync:
        return "the agent is not in sync"
    if seen.status.audit is not None and not seen.status.audit.clean:
        return "the kernel does not hold what the agent wants"
    if seen.status.message:
        return f"the agent says: {seen.status.message}"
    return None


def _fail(turn: Turn, line: NodeLine, reason: str) -> None:
    """A node failed: it goes back, and the roll-out stops."""
    message = f"node {line.name}: {reason}"
    if line.phase is not NodePhase.FAILED:
        turn.enter(line, NodePhase.ROLLING_BACK, reason)
        line.finished_at = None
    turn.tell("NodeFailed", reason, line.name, warning=True)
    _stop(turn, Phase.FAILED, message, turn.rollout.spec.auto_rollback)


def _stop(turn: Turn, outcome: Phase, message: str, take_back: bool) -> None:
    turn.status.outcome, turn.status.message, turn.status.take_back = outcome, message, take_back
    turn.tell("Stopping", message, warning=True)


def _backward(turn: Turn) -> None:
    """Take back what is in flight, and what is finished where that is wanted; then end."""
    status, spec = turn.status, turn.rollout.spec
    assert status.outcome is not None
    status.phase, status.soak_since, status.soak_until = Phase.ROLLING_BACK, None, None
    for line in status.nodes:
        if line.phase is NodePhase.CHECKING:
            turn.enter(line, NodePhase.WAITING)
            line.started_at, line.reason = None, None
        elif line.phase in FORWARD:
            turn.enter(line, NodePhase.ROLLING_BACK, "the roll-out stopped")
    if status.take_back:
        finished = [line for line in reversed(status.nodes) if line.phase is NodePhase.UPDATED]
        for line in finished[: max(spec.max_parallel - len(_in_flight(turn)), 0)]:
            turn.enter(line, NodePhase.ROLLING_BACK, "the roll-out is taken back")
            line.finished_at = None
    for line in status.nodes:
        if line.phase is NodePhase.ROLLING_BACK:
            advance(turn, line)
    at_rest = _template(turn)
    left = status.take_back and _count(turn, NodePhase.UPDATED)
    if at_rest and not _in_flight(turn) and not left:
        stuck = [line.name for line in status.nodes if line.phase is NodePhase.FAILED and line.before is not None]
        if stuck and "not taken back" not in (status.message or ""):
            status.message = f"{status.message}; not taken back: {', '.join(stuck[:3])}"
        _finish(turn, status.outcome, status.message or "")
        turn.tell(status.outcome.value, status.message or "", warning=True)


def _template(turn: Turn, *, completed: bool = False) -> bool:
    """Ask for image and strategy of the DaemonSet as they must be now. Whether they are."""
    status, daemon_set, image = turn.status, turn.world.daemon_set, turn.rollout.spec.target.image
    if image is None or daemon_set is None:
        return True
    before = status.daemon_set
    if before is None:
        if not any(line.phase in (NodePhase.CHANGING, NodePhase.VERIFYING) for line in status.nodes):
            return True
        before = DaemonSetBefore(
            image=daemon_set.image,
            update_strategy=daemon_set.update_strategy,
            template_generation=daemon_set.template_generation,
        )
        status.daemon_set = before
    if completed:
        counting = not daemon_set.observed or daemon_set.updated < daemon_set.desired <= _count(turn, NodePhase.UPDATED)
        if not before.restored and counting and turn.since(status.soak_until) < _COUNTING_SECONDS:
            return False
        # Its strategy would exchange the pods of nodes that are not of this roll-out, unverified.
        before.restored = before.restored or (daemon_set.observed and daemon_set.updated >= daemon_set.desired)
        strategy = before.update_strategy if before.restored else ON_DELETE
    elif status.outcome is None:
        strategy = ON_DELETE
    else:
        # Pods of nodes on their way back may be older than the template was; then it is as it was.
        image = image_on_the_way_back(turn) or before.image
        with_new = any(
            line.phase in (NodePhase.UPDATED, NodePhase.ROLLING_BACK, NodePhase.FAILED) and line.before
            for line in status.nodes
        )
        strategy = ON_DELETE if with_new else before.update_strategy
        before.restored = not with_new
    if (daemon_set.image, daemon_set.update_strategy) == (image, strategy):
        return True
    turn.actions.append(SetImage(image=image, update_strategy=strategy))
    return False


def _clear_away(turn: Turn) -> bool:
    """Remove what nobody waits for any more: probes, cleanups, what nodes that are gone were told. Whether any is left."""
    already = len(turn.actions)
    mine = (turn.rollout.metadata.uid or "")[:8]
    wanted = {verification_id(turn.rollout, line) for line in turn.status.nodes if line.phase in IN_FLIGHT and line.round_at}
    for id in turn.world.probes:
        if id.startswith(f"{mine}-") and id not in wanted:
            turn.actions.append(EndProbes(verification=id))
    phases = {line.name: line.phase for line in turn.status.nodes if line.name not in turn.world.claims}
    for node in turn.world.cleanups:
        if node in phases and phases[node] not in IN_FLIGHT:
            turn.actions.append(EndCleanup(node=node))
    for line in turn.status.nodes:
        if line.phase is NodePhase.GONE and line.name in phases:
            _forget(turn, line)
    return len(turn.actions) > already


def _forget(turn: Turn, line: NodeLine) -> None:
    """Another Node of the same name must not have what this one was told."""
    told, node = turn.world.proxy_nodes.get(line.name), turn.world.nodes.get(line.name)
    if told is None or told.metadata.deletion_timestamp is not None:
        return
    told_before = node is None or line.before is not None  # by an operator that did not write down for which Node
    if told.node_uid == line.uid if told.node_uid and line.uid else told_before:
        turn.actions.append(ForgetNode(node=line.name, uid=told.metadata.uid))


def _finish(turn: Turn, phase: Phase, message: str) -> None:
    turn.status.phase, turn.status.message, turn.status.finished_at = phase, message, turn.time
    turn.status.soak_since = turn.status.soak_until = None


def _in_flight(turn: Turn) -> list[NodeLine]:
    return [line for line in turn.status.nodes if line.phase in IN_FLIGHT]


def _count(turn: Turn, *phases: NodePhase) -> int:
    return sum(line.phase in phases for line in turn.status.nodes)


def _say_what_is_done(turn: Turn) -> None:
    flying = _in_flight(turn)
    if flying:
        line = flying[0]
        more = f" (and {len(flying) - 1} more)" if len(flying) > 1 else ""
        turn.status.message = f"node {line.name}: {line.phase.value}{f', {line.reason}' if line.reason else ''}{more}"
    elif turn.rollout.spec.paused:
        turn.status.message = f"paused after {_count(turn, NodePhase.UPDATED)} of {len(turn.status.nodes)} nodes"


def _summarise(turn: Turn) -> None:
    status = turn.status
    if status.nodes:
        status.counts = Counts(
            total=len(status.nodes),
            updated=_count(turn, NodePhase.UPDATED),
            in_progress=len(_in_flight(turn)),
            failed=_count(turn, NodePhase.FAILED),
            rolled_back=_count(turn, NodePhase.ROLLED_BACK),
            gone=_count(turn, NodePhase.GONE),
        )
        status.progress = f"{status.counts.updated}/{len(status.nodes)}"
        steps = turn.rollout.spec.steps
        if 1 <= status.step <= len(steps):
            status.step_text = f"{status.step}/{len(steps)} ({steps[status.step - 1]})"
    phase, message = status.phase, status.message or ""
    if phase is None:
        return
    running = "False" if phase in FINISHED or phase is Phase.PAUSED else "True"
    _condition(turn, "Progressing", running, phase.value, message)
    succeeded = {Phase.COMPLETED: "True", Phase.FAILED: "False", Phase.ABORTED: "False"}.get(phase, "Unknown")
    _condition(turn, "Succeeded", succeeded, phase.value, message)


def _condition(turn: Turn, type: str, status: str, reason: str, message: str) -> None:
    """Set a condition; the time is that of the last change of its status."""
    conditions = turn.status.conditions
    old = next((one for one in conditions if one.type == type), None)
    when = old.last_transition_time if old is not None and old.status == status else turn.time
    new = Condition(
        type=type,
        status=status,
        reason=reason,
        message=message[:2048],
        last_transition_time=when,
        observed_generation=turn.rollout.metadata.generation,
    )
    turn.status.conditions = [new if one is old else one for one in conditions] + ([new] if old is None else [])
