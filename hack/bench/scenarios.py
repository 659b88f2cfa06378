"""Owns the runs of one agent on one node: first sync, changes of an endpoint, idling. The node is gone afterwards."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Final

from hack.bench import processes, rules
from hack.bench.agents import Contender, Running
from hack.bench.datapath import NoAnswer, Witness
from hack.bench.feeds import (
    NODE_ADDRESS,
    PROBE_ADDRESS,
    SERVICE_PORT,
    TARGET_PORT,
    Feed,
    addresses_of,
)
from hack.bench.results import Changes, Cpu, FirstSync, Idle, Run, spread
from hack.controlplane.load import Shape
from nodeproxy.sandbox.agent import AgentError, Variant
from nodeproxy.sandbox.namespace import NamespaceError
from nodeproxy.sandbox.topology import Sandbox

CLIENT: Final = "10.244.0.2"
PODS: Final = ("10.244.0.11", "10.244.0.12")  # where the probe's endpoint can be

FAILURES: Final = (AgentError, NoAnswer, NamespaceError, rules.NotProgrammed, OSError)

_SETTLE = 3.0
_PAUSE = (1.0, 1.5)  # between changes; at random, so that they do not march in step with any timer of the agent
_CHANGE_TIMEOUT = 120.0

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do in each run; times in seconds. `idle` 0: not measured. `floor`: time iptables-restore alone, too."""

    shape: Shape
    changes: int = 15
    idle: float = 0.0
    floor: bool = False
    timeout: float = 300.0


class Node:
    """A node without rules, with a client and the pods between which the probe's endpoint moves."""

    def __init__(self, stack: ExitStack) -> None:
        self.box = stack.enter_context(Sandbox(node_addresses=[NODE_ADDRESS]))
        self.client, *self._pods = self.box.add_pods([[CLIENT], *([pod] for pod in PODS)])

    def witness(self) -> Witness:
        """Who sees which pod the probe leads to."""
        return Witness(self.client, (PROBE_ADDRESS, SERVICE_PORT), list(zip(self._pods, PODS, strict=True)), TARGET_PORT)


def warm_up(contender: Contender, feed: Feed, timeout: float) -> None:
    """Let a program do its first sync once, unmeasured: its files are in memory then, and Python's bytecode is compiled."""
    with ExitStack() as stack, suppress(*FAILURES):
        node = Node(stack)
        stack.enter_context(feed.reachable_from(node.box))
        witness = stack.enter_context(node.witness())
        first_sync(stack.enter_context(Running(contender, node.box, feed, "legacy")), witness, timeout)


def first_sync(running: Running, witness: Witness, timeout: float) -> FirstSync:
    """Wait for the first sync: by packets, and by what the agent says. Raises AgentError."""
    deadline = running.started + timeout
    answered: float | None = None
    while answered is None:
        running.check()
        if time.monotonic() > deadline:
            raise AgentError(f"first sync not done within {timeout:g} s")
        answered = witness.wait_any(timeout=0.5, pause=0.01)
    ready = running.wait_ready(deadline, pause=0.02)
    answered_seconds = answered - running.started
    return FirstSync(max(answered_seconds, ready), answered_seconds, ready, processes.cpu(running.pid))


def idle(running: Running, seconds: float) -> Idle:
    """CPU time used while nothing changes."""
    before = processes.cpu(running.pid)
    time.sleep(seconds)
    running.check()
    return Idle(seconds, processes.difference(processes.cpu(running.pid), before))


def changes(running: Running, witness: Witness, feed: Feed, count: int, background: Idle) -> Changes:
    """Move the probe's endpoint so many times, and once before that to warm up. It begins at the first pod."""
    seconds: list[float] = []
    writes: list[float] = []
    at, began, before = 0, 0.0, Cpu(0, 0)
    for number in range(-1, count):
        if number == 0:
            time.sleep(_SETTLE)
            began, before = time.monotonic(), processes.cpu(running.pid)
        time.sleep(random.uniform(*_PAUSE))
        at = 1 - at
        started = time.monotonic()
        feed.point_to(PODS[at])
        writes.append(time.monotonic() - started)
        seconds.append(witness.wait_for(at, _CHANGE_TIMEOUT) - started)
    time.sleep(_PAUSE[0])
    share = (time.monotonic() - began) / background.seconds
    used = processes.difference(processes.cpu(running.pid), before)
    return Changes(
        seconds=seconds[1:],
        write_seconds=writes[1:],
        warm_up_seconds=seconds[0],
        spread=spread(seconds[1:]),
        cpu_per_change=Cpu(
            max(0.0, used.own - background.cpu.own * share) / count,
            max(0.0, used.children - background.cpu.children * share) / count,
        ),
    )


def measure(contender: Contender, feed: Feed, variant: Variant, plan: Plan, say: Say) -> Run:
    """One agent in one variant, from start to end. What goes wrong is told in the result."""
    run = Run(agent=contender.name, variant=variant, source=feed.name, program=contender.program)
    feed.point_to(PODS[0])
    try:
        with ExitStack() as stack:
            node = Node(stack)
            stack.enter_context(feed.reachable_from(node.box))
            witness = stack.enter_context(node.witness())
            running = stack.enter_context(Running(contender, node.box, feed, variant))
            _measure_on(node, running, witness, feed, plan=plan, run=run, say=say)
    except FAILURES as error:
        run.error = str(error)
        say(f"{run.title}: {error}")
    return run


def _measure_on(node: Node, running: Running, witness: Witness, feed: Feed, *, plan: Plan, run: Run, say: Say) -> None:
    variant: Variant = "legacy" if run.variant == "legacy" else "nft"
    run.first_sync = sync = first_sync(running, witness, plan.timeout)
    say(f"{run.title}: first sync {sync.seconds:.2f} s")
    text = rules.saved(node.box.node, variant)
    run.rules = {"ipv4": rules.count(text), "ipv6": rules.count(rules.saved(node.box.node, variant, "ipv6"))}
    rules.check_all_there(text, [*addresses_of(plan.shape), PROBE_ADDRESS])
    time.sleep(_SETTLE)
    background = idle(running, plan.idle or 2 * _SETTLE)
    if plan.idle:
        run.idle = background
        say(f"{run.title}: idle for {plan.idle:g} s, {background.cpu.total:.2f} s of CPU")
    if plan.changes:
        run.changes = done = changes(running, witness, feed, plan.changes, background)
        say(f"{run.title}: {plan.changes} changes, median {done.spread.median * 1000:.0f} ms")
    run.memory = processes.memory(running.pid)
    if plan.floor:
        sync.floor_seconds = rules.restore_seconds(text, variant)
        say(f"{run.title}: iptables-restore alone {sync.floor_seconds:.2f} s")


def measure_all(
    contenders: Sequence[Contender], feed: Feed, variants: Sequence[Variant], plan: Plan, say: Say
) -> Iterator[Run]:
    """Every contender in every variant, in turn."""
    for variant in variants:
        for contender in contenders:
            yield measure(contender, feed, variant, plan, say)
