"""Owns how one node is changed, verified and taken back: a step at a time, each from what is observed.

Waiting -> Checking -> Changing -> Verifying -> Updated; from Changing, Verifying and Updated also RollingBack -> RolledBack.
"""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct

from nodeproxy.api.proxy_node import ProxyNodeSpec
from nodeproxy.operator.api import KUBE_PROXY, NODEPROXY, Check, Figures, NodeLine, NodePhase, NodeState
from nodeproxy.operator.turn import Turn
from nodeproxy.operator.verify import agent_checks, complaint, measured, verification_id
from nodeproxy.operator.world import (
    DeletePod,
    EndCleanup,
    ForgetNode,
    LabelNode,
    PodSeen,
    StartCleanup,
    StartProbes,
    TellNode,
)

_TRIES: Final = 2
_PAUSE_SECONDS: Final = 3.0


class Waiting(Struct, frozen=True):
    """Not yet: for what."""

    what: str


class Bad(Struct, frozen=True):
    """No more waiting helps: why."""

    why: str


def advance(turn: Turn, line: NodeLine) -> str | None:
    """Bring a node that is in flight forward, if what is observed allows it. Returns why it failed, where it did.

    A node that failed before it was touched is Failed; one that was touched goes back.
    """
    match line.phase:
        case NodePhase.CHECKING:
            return _check(turn, line)
        case NodePhase.CHANGING:
            return _change(turn, line)
        case NodePhase.VERIFYING:
            return _verify(turn, line)
        case NodePhase.ROLLING_BACK:
            _go_back(turn, line)
    return None


def gone(turn: Turn, line: NodeLine) -> bool:
    """Whether the Node is no more, or another one has its name; notes it."""
    seen = turn.world.nodes.get(line.name)
    if seen is not None and (line.uid is None or line.uid == seen.uid):
        return False
    turn.enter(line, NodePhase.GONE, "the node has left the cluster")
    return True


def _check(turn: Turn, line: NodeLine) -> str | None:
    result: Figures | Waiting | Bad = Figures()
    if turn.rollout.spec.checks.before:
        if turn.world.nodes[line.name].ready:
            spec = _told(turn, line)
            agent = turn.serving(line.name) == NODEPROXY
            result = _verification(turn, line, spec.mode, spec.configuration, agent=agent, before=None)
        else:
            result = _patience(turn, line, "the node is not Ready")
    if isinstance(result, Bad):
        turn.enter(line, NodePhase.FAILED, f"not well before anything was changed: {result.why}")
        return line.reason
    if isinstance(result, Waiting):
        line.reason = result.what
        return None
    line.figures_before, line.before, line.reason = result, _state(turn, line), None
    turn.enter(line, NodePhase.CHANGING)
    return None


def _change(turn: Turn, line: NodeLine) -> str | None:
    result = _converge(turn, line, _goal(turn, line))
    if isinstance(result, Waiting):
        result = _patience(turn, line, result.what)
    if result is None:
        line.reason = None
        turn.enter(line, NodePhase.VERIFYING)
        return None
    if isinstance(result, Bad):
        return result.why
    line.reason = result.what
    return None


def _verify(turn: Turn, line: NodeLine) -> str | None:
    goal = _goal(turn, line)
    result: Figures | Waiting | Bad | None = _converge(turn, line, goal, telling=False)
    if isinstance(result, Waiting):
        limit = turn.rollout.spec.timeouts.verification_seconds
        if turn.since(line.since) > limit:
            result = Bad(f"{result.what}, and so it was for {limit} s")
    if result is None:
        agent = goal.proxy == NODEPROXY
        before = line.figures_before or Figures()
        result = _verification(turn, line, goal.spec_mode, goal.spec_configuration, agent=agent, before=before)
    if isinstance(result, Bad):
        return result.why
    if isinstance(result, Waiting):
        line.reason = result.what
        return None
    assert result is not None
    if goal.proxy == KUBE_PROXY and (left := _let_go(turn, line, NodeState())) is not None:
        line.reason = left.what
        return None
    line.after, line.reason = _state(turn, line), None
    # What is for judging, and for those who look why a node failed, goes: a thousand lines must stay small.
    line.after.spec_mode = line.after.spec_configuration = None
    for figures in (line.figures_before, result):
        if figures is not None:
            figures.probes, figures.in_sync, figures.audit = [], None, None
    line.figures_after = result
    turn.enter(line, NodePhase.UPDATED)
    turn.tell("NodeUpdated", f"has {turn.rollout.spec.target}, verified", line.name)
    return None


def _go_back(turn: Turn, line: NodeLine) -> None:
    assert line.before is not None
    goal = NodeState(
        proxy=line.before.proxy if turn.rollout.spec.target.proxy else None,
        image=image_before(turn, line),
        spec_mode=line.before.spec_mode,
        spec_configuration=line.before.spec_configuration,
    )
    goal.proxy = goal.proxy or turn.serving(line.name)
    if goal.image not in (None, image_on_the_way_back(turn)):
        line.since = turn.time  # the template has the image of another node first: its turn has not come
    left = _let_go(turn, line, goal) if goal.proxy == KUBE_PROXY else None
    result = _converge(turn, line, goal) or left
    if result is None:
        turn.enter(line, NodePhase.ROLLED_BACK)
        turn.tell("NodeRolledBack", f"is as before the roll-out: {line.reason}", line.name, warning=True)
        return
    waiting = result.what if isinstance(result, Waiting) else result.why
    limit = turn.rollout.spec.timeouts.node_ready_seconds
    if turn.since(line.since) > limit:
        turn.enter(line, NodePhase.FAILED, f"{line.reason}; not taken back within {limit} s: {waiting}")
        turn.tell("NodeNotRolledBack", line.reason or "", line.name, warning=True)


def image_before(turn: Turn, line: NodeLine) -> str | None:
    """The agent's image that a node gets back. None: images are not touched, or it had kube-proxy."""
    daemon_set, before = turn.status.daemon_set, line.before
    if daemon_set is None or before is None or (turn.rollout.spec.target.proxy and before.proxy == KUBE_PROXY):
        return None
    # Not that of the template in the first place: its strategy may be OnDelete, and pods be older than it.
    return before.image or daemon_set.image


def image_on_the_way_back(turn: Turn) -> str | None:
    """What the template must have while nodes go back: the image of the first of them. None: as it was."""
    going = [line for line in turn.status.nodes if line.phase is NodePhase.ROLLING_BACK]
    return next((image for line in going if (image := image_before(turn, line)) is not None), None)


def _let_go(turn: Turn, line: NodeLine, before: NodeState) -> Waiting | None:
    """The ProxyNode of a node that kube-proxy serves again: as it was, or none. A later agent would go by it."""
    seen = turn.world.proxy_nodes.get(line.name)
    if seen is None or seen.metadata.deletion_timestamp is not None or turn.serving(line.name) != KUBE_PROXY:
        return None
    if line.name in turn.world.agents and turn.world.nodes[line.name].ready:
        return Waiting("nodeproxy still runs")
    if before.spec_mode is None and before.spec_configuration is None:
        turn.actions.append(ForgetNode(node=line.name, uid=seen.metadata.uid))
        return Waiting("what the agent was told is being removed")
    _tell(turn, line, before.spec_mode, before.spec_configuration, None)
    as_before = (seen.spec.mode, seen.spec.configuration) == (before.spec_mode, before.spec_configuration)
    return None if as_before else Waiting("what the agent was told is being taken back")


def _patience(turn: Turn, line: NodeLine, what: str) -> Waiting | Bad:
    limit = turn.rollout.spec.timeouts.node_ready_seconds
    return Bad(f"not ready within {limit} s: {what}") if turn.since(line.since) > limit else Waiting(what)


def _goal(turn: Turn, line: NodeLine) -> NodeState:
    """What the node shall have."""
    target, before = turn.rollout.spec.target, line.before or NodeState()
    return NodeState(
        proxy=target.proxy or before.proxy or turn.serving(line.name),
        image=target.image,
        spec_mode=target.mode or before.spec_mode,
        spec_configuration=target.configuration if target.configuration is not None else before.spec_configuration,
    )


def _told(turn: Turn, line: NodeLine) -> ProxyNodeSpec:
    seen = turn.world.proxy_nodes.get(line.name)
    return seen.spec if seen is not None else ProxyNodeSpec()


def _state(turn: Turn, line: NodeLine) -> NodeState:
    """What the node has now."""
    seen, pod, spec = turn.world.proxy_nodes.get(line.name), turn.world.agents.get(line.name), _told(turn, line)
    proxy = turn.serving(line.name)
    return NodeState(
        proxy=proxy,
        mode=seen.status.mode if seen is not None and proxy == NODEPROXY else None,
        image=_image(turn, pod) if pod is not None and proxy == NODEPROXY else None,
        spec_mode=spec.mode,
        spec_configuration=spec.configuration,
    )


def _converge(turn: Turn, line: NodeLine, goal: NodeState, *, telling: bool = True) -> Waiting | Bad | None:
    """Ask for what brings the node to its goal. None: it is there. `telling`: the agent is told here."""
    node = turn.world.nodes[line.name]
    target = turn.rollout.spec.target
    if (result := _image_in_template(turn, goal)) is not None:
        return result
    if goal.proxy == NODEPROXY and line.name in turn.world.cleanups:
        turn.actions.append(EndCleanup(node=line.name))
        return Waiting("a cleanup of the node is being stopped")
    # Before the label: an agent that comes to the node finds what it is told.
    says = goal.spec_mode is not None or goal.spec_configuration is not None
    told = goal.proxy == NODEPROXY and (says or target.concerns_agent or agent_checks(turn.rollout))
    if told and telling:
        _tell(turn, line, goal.spec_mode, goal.spec_configuration, _told(turn, line).verification)
    if target.proxy is not None and turn.serving(line.name) != goal.proxy:
        turn.actions.append(LabelNode(node=line.name, value=NODEPROXY if goal.proxy == NODEPROXY else None))
        return Waiting(f"the node is not labelled for {goal.proxy}")
    if not node.ready:
        return Waiting("the node is not Ready")
    if goal.proxy == KUBE_PROXY:
        return _kube_proxy_serves(turn, line)
    return _agent_runs(turn, line, goal) or (_agent_obeys(turn, line, goal) if target.concerns_agent else None)


def _image_in_template(turn: Turn, goal: NodeState) -> Waiting | None:
    if goal.image is None or goal.proxy != NODEPROXY:
        return None
    daemon_set = turn.world.daemon_set
    if daemon_set is None:
        return Waiting("there is no DaemonSet nodeproxy")
    if daemon_set.image != goal.image or not daemon_set.observed:
        return Waiting("the DaemonSet does not have the image yet")
    return None


def _image(turn: Turn, pod: PodSeen) -> str:
    """The image that a pod was made with, as its template says where that is known: a webhook may rewrite it."""
    for one in (turn.world.daemon_set, turn.status.daemon_set):  # the present template, and that of before
        if one is not None and pod.template_generation is not None and pod.template_generation == one.template_generation:
            return one.image
    return pod.image


def _agent_runs(turn: Turn, line: NodeLine, goal: NodeState) -> Waiting | Bad | None:
    pod = turn.world.agents.get(line.name)
    if turn.rollout.spec.target.proxy is not None and line.name in turn.world.kube_proxies:
        return Waiting("kube-proxy still runs")
    if pod is None or pod.deleting:
        return Waiting("the agent's pod has not come")
    if goal.image is not None and goal.image not in (pod.image, _image(turn, pod)):
        if line.pod_uid not in (None, pod.uid):  # deleting it again would bring the same
            return Bad(f"the agent's pod came with image {pod.image}, and the DaemonSet has {goal.image}")
        line.pod_uid = pod.uid
        turn.actions.append(DeletePod(node=line.name, name=pod.name, uid=pod.uid))
        return Waiting(f"the agent's pod has image {pod.image}")
    if not pod.ready:
        return Waiting(f"the agent's pod is not ready{f': {pod.trouble}' if pod.trouble else ''}")
    return None


def _agent_obeys(turn: Turn, line: NodeLine, goal: NodeState) -> Waiting | Bad | None:
    seen = turn.world.proxy_nodes.get(line.name)
    if seen is None or seen.status.observed_generation < seen.metadata.generation:
        return Waiting("the agent has not taken what it is told")
    if (seen.spec.mode, seen.spec.configuration) != (goal.spec_mode, goal.spec_configuration):
        return Waiting("the agent has not been told")
    if seen.status.message:
        return Bad(f"the agent says: {seen.status.message}")
    if goal.spec_mode is not None and seen.status.mode != goal.spec_mode:
        return Waiting(f"mode {seen.status.mode} is in force")
    return None


def _kube_proxy_serves(turn: Turn, line: NodeLine) -> Waiting | None:
    world = turn.world
    if line.name in world.agents:
        return Waiting("nodeproxy still runs")
    pod = world.kube_proxies.get(line.name)
    if pod is None or pod.deleting or not pod.ready:
        return Waiting(f"kube-proxy's pod is not ready{f': {pod.trouble}' if pod and pod.trouble else ''}")
    if turn.rollout.spec.target.proxy is not None and not world.cleanups.get(line.name, False):
        if line.name not in world.cleanups and line.phase is not NodePhase.VERIFYING:
            drain = turn.rollout.spec.timeouts.node_ready_seconds / 2
            turn.actions.append(StartCleanup(node=line.name, drain_seconds=drain))
        if line.phase is not NodePhase.VERIFYING:
            return Waiting("what nodeproxy left is being removed")
    return None


def _tell(turn: Turn, line: NodeLine, mode: str | None, configuration: dict[str, Any] | None, id: str | None) -> None:
    seen, uid = turn.world.proxy_nodes.get(line.name), turn.world.nodes[line.name].uid
    spec = ProxyNodeSpec(mode=mode, configuration=configuration, verification=id)
    if seen is None or seen.spec != spec or (uid and seen.node_uid != uid):
        turn.actions.append(TellNode(node=line.name, uid=uid, mode=mode, configuration=configuration, verification=id))


def _verification(
    turn: Turn,
    line: NodeLine,
    mode: str | None,
    configuration: dict[str, Any] | None,
    *,
    agent: bool,
    before: Figures | None,
) -> Figures | Waiting | Bad:
    """Have the node looked at, twice if need be: figures that are good enough, or why they are not."""
    rollout = turn.rollout
    limit = rollout.spec.timeouts.verification_seconds
    if line.round_at is None:
        line.round, line.tries, line.round_at = line.round + 1, line.tries + 1, turn.time
    id = verification_id(rollout, line)
    if agent and agent_checks(rollout):
        _tell(turn, line, mode, configuration, id)
    probes = turn.world.probes.get(id)
    if Check.PROBES in rollout.spec.checks.which and (probes is None or not probes.started):
        elsewhere, address = _elsewhere(turn, line), turn.world.nodes[line.name].address
        turn.actions.append(StartProbes(verification=id, node=line.name, elsewhere=elsewhere, address=address))
    figures = measured(rollout, line, turn.world, agent=agent)
    if isinstance(figures, str):
        if turn.since(line.round_at) > limit / _TRIES:
            if line.tries >= _TRIES:
                return Bad(f"{figures} within {limit} s")
            line.round_at = None  # once more, and from another node
        return Waiting(figures)
    seen = turn.world.proxy_nodes.get(line.name)
    differs = seen.status.audit.differs if seen is not None and seen.status.audit is not None else None
    restarted = rollout.spec.target.image is not None or rollout.spec.target.proxy is not None
    why = complaint(rollout, figures, before, differs=differs, restarted=restarted)
    if why is None:
        return figures
    catching_up = figures.in_sync is False and turn.since(line.since) < limit
    if line.tries >= _TRIES and not catching_up:
        if before is not None:
            line.figures_after = figures
        return Bad(why)
    if turn.since(line.round_at) >= _PAUSE_SECONDS:
        line.round_at = None
    return Waiting(f"{why}; looking again")


def _elsewhere(turn: Turn, line: NodeLine) -> str:
    """Another node that is well, to probe from; another one for each round. This one where there is no other."""
    world = turn.world
    others = sorted(
        other.name
        for other in world.nodes.values()
        if other.ready and other.name != line.name and (world.daemon_set is None or not world.daemon_set.keeps_off(other))
    )
    others.sort(key=lambda other: other < line.name)  # not the same one for all
    return others[(line.round - 1) % len(others)] if others else line.name
