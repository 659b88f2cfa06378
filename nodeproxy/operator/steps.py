"""Owns how many nodes a step comes to, and whether a ProxyRollout makes sense in this cluster."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nodeproxy.operator.api import KUBE_PROXY, MAX_NODES, NODEPROXY, Check, ProxyRollout
from nodeproxy.operator.world import DaemonSetSeen, NodeSeen, World

MODES = ("iptables", "ipvs")


class Refused(ValueError):
    """The roll-out is not begun: one word and one sentence that say why."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def amount(step: int | str, total: int) -> int:
    """How many of `total` nodes have changed after this step; a share is rounded up. Raises ValueError."""
    text = str(step)
    if text.endswith("%"):
        return -(-total * int(text[:-1]) // 100)
    return min(int(text), total)


def amounts(steps: Sequence[int | str], total: int) -> list[int]:
    """The same for each step; never fewer than at the step before."""
    found: list[int] = []
    for step in steps:
        found.append(max(amount(step, total), found[-1] if found else 0))
    return found


def chosen(rollout: ProxyRollout, world: World) -> tuple[list[str], list[str]]:
    """The nodes it is about, by name, and those with its labels on which no agent can run. Raises `Refused`."""
    wanted = rollout.spec.nodes
    missing = [name for name in wanted.names if name not in world.nodes]
    if missing:
        raise Refused("NoSuchNode", f"there is no node {some(missing)}")
    lacking = {} if world.daemon_set is None else _lacking(world.daemon_set, world.nodes.values())
    if hopeless := [name for name in wanted.names if name in lacking]:
        raise Refused(
            "NoAgentThere",
            f"spec.nodes.names: the DaemonSet nodeproxy does not run on {some(hopeless)}, which lacks the label"
            f" {lacking[hopeless[0]]}",
        )
    names = set(wanted.names)
    if wanted.selector is not None:
        names |= {node.name for node in world.nodes.values() if wanted.selector.matches(node.labels)}
    left_out = sorted(names & lacking.keys())
    names -= lacking.keys()
    if not names:
        but = f", but for {some(left_out)}, on which the DaemonSet nodeproxy does not run" if left_out else ""
        raise Refused("NoMatchingNode", f"no node has the labels that spec.nodes.selector asks for{but}")
    return sorted(names), left_out


def _lacking(daemon_set: DaemonSetSeen, nodes: Iterable[NodeSeen]) -> dict[str, str]:
    """Nodes on which no agent can run, and the label that each lacks for it."""
    found = {node.name: daemon_set.keeps_off(node) for node in nodes}
    return {name: label for name, label in found.items() if label is not None}


def accept(rollout: ProxyRollout, world: World) -> tuple[list[str], list[str]]:
    """The nodes of a roll-out that may begin, and those left out, as of `chosen`. Raises `Refused` where it makes no sense
    here; looks, and touches nothing."""
    _check_spec(rollout)
    names, left_out = chosen(rollout, world)
    if len(names) > MAX_NODES:
        raise Refused(
            "TooManyNodes", f"{len(names)} nodes are more than the {MAX_NODES} of one roll-out: divide them by labels"
        )
    _check_steps(rollout, len(names))
    for name in names:
        if name in world.claims:
            others = sorted({world.claims[name] for name in names if name in world.claims})
            raise Refused("Overlaps", f"node {name} belongs to roll-out {others[0]}, which has not ended")
    _check_proxies(rollout, names, world)
    return names, left_out


def _check_spec(rollout: ProxyRollout) -> None:
    spec = rollout.spec
    target, checks = spec.target, spec.checks
    if target.mode is not None and target.mode not in MODES:
        raise Refused("UnknownMode", f"spec.target.mode: {target.mode[:40]!r} is none of {', '.join(MODES)}")
    if target.proxy not in (None, NODEPROXY, KUBE_PROXY):
        raise Refused("UnknownProxy", f"spec.target.proxy: {target.proxy[:40]!r} is neither {NODEPROXY} nor {KUBE_PROXY}")
    if not str(target):
        raise Refused("NoTarget", "spec.target: says nothing that could be changed")
    if target.proxy == KUBE_PROXY and (target.concerns_agent or target.image):
        raise Refused("NoSense", "spec.target: kube-proxy has neither mode, configuration nor image here")
    thresholds = checks.thresholds
    if Check.PROBES in checks.which:
        if not 0 <= thresholds.error_ratio <= 0.5:
            raise Refused("Thresholds", "spec.checks.thresholds.errorRatio: must be from 0 to 0.5")
        longest = checks.probes.count * checks.probes.timeout_seconds / 10  # ten at the same time
        if longest > spec.timeouts.verification_seconds:
            raise Refused(
                "Thresholds",
                f"spec.timeouts.verificationSeconds: {spec.timeouts.verification_seconds} s are too short for"
                f" {checks.probes.count} probes of {checks.probes.timeout_seconds:g} s each: up to {longest:.0f} s",
            )
    if thresholds.latency_factor < 1:
        raise Refused("Thresholds", "spec.checks.thresholds.latencyFactor: below 1 no node could pass")
    if target.proxy == KUBE_PROXY and Check.PROBES not in checks.which:
        raise Refused("Thresholds", "spec.checks.which: only probes can tell how kube-proxy does, and they are not there")


def _check_steps(rollout: ProxyRollout, total: int) -> None:
    steps = rollout.spec.steps
    try:
        found = [amount(step, total) for step in steps]
    except ValueError:
        raise Refused("Steps", "spec.steps: a step is a number of nodes, or a share as 10%") from None
    if not found or found[-1] < total:
        raise Refused("Steps", "spec.steps: the last step must be 100%")
    for i in range(1, len(found)):
        if found[i] < found[i - 1]:
            raise Refused(
                "Steps",
                f"spec.steps[{i}]: {steps[i]} of {total} nodes are fewer than those of the step before ({steps[i - 1]})",
            )


def _check_proxies(rollout: ProxyRollout, names: Iterable[str], world: World) -> None:
    target, daemon_set = rollout.spec.target, world.daemon_set
    if daemon_set is None:
        raise Refused("NoDaemonSet", "there is no DaemonSet nodeproxy in the operator's namespace")
    if target.image is not None and world.image_claim is not None:
        raise Refused("Overlaps", f"roll-out {world.image_claim}, which has not ended, changes the DaemonSet's image")
    if target.proxy is not None:
        if not daemon_set.by_label:
            raise Refused(
                "NotByLabel", "the DaemonSet nodeproxy does not go by the label nodeproxy.io/proxy: apply deploy/migration"
            )
        if not world.kube_proxy_there:
            raise Refused("NoKubeProxy", "there is no DaemonSet kube-proxy that the nodes could come from or go back to")
        return
    if daemon_set.by_label:
        strangers = [name for name in names if world.nodes[name].proxy != NODEPROXY]
        if strangers:
            raise Refused(
                "NotServed", f"nodeproxy does not serve {some(strangers)}: add spec.target.proxy, or choose others"
            )


def some(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
