"""Owns the runs of one agent on one node: first sync, changes of an endpoint, idling. The node is gone afterwards."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from subprocess import SubprocessError
from typing import Final

from hack.bench import datapath, idle, processes, rules, virtual_servers
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
from nodeproxy.kernel.errors import KernelError
from nodeproxy.sandbox.agent import AgentError, Variant
from nodeproxy.sandbox.namespace import NamespaceError
from nodeproxy.sandbox.pace import scaled
from nodeproxy.sandbox.topology import Sandbox

CLIENT: Final = "10.244.0.2"
PODS: Final = ("10.244.0.11", "10.244.0.12")  # where the probe's endpoint can be

FAILURES: Final = (AgentError, NoAnswer, NamespaceError, KernelError, rules.NotProgrammed, SubprocessError, OSError)

_TELL_EVERY = 30.0
_ASK = 1.0  # for so long at a time packets are sent, before the agent is looked after
_FIRST_SYNC_PAUSE, _CHANGE_PAUSE = 0.01, 0.0005  # between connections
_BACKGROUND = 4.0
_BACKGROUND_TRIES = 3
_QUIET_SECONDS = 1.0
_QUIET_SHARE = 0.2  # of a processor; beyond, an agent is at work
_RANDOM_PAUSE = 0.5  # before a change
_TICK = 0.01  # of the slowest kernel's clock
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


class Progress:
    """Says every half a minute how far something has come that takes long."""

    def __init__(self, say: Say, text: Callable[[], str]) -> None:
        self._say = say
        self._text = text
        self._next = time.monotonic() + _TELL_EVERY

    def __call__(self) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _TELL_EVERY
            self._say(self._text())


class Node:
    """A node without rules, with a client and the pods between which the probe's endpoint moves.

    All other endpoints are outside, where `listener` accepts their connections.
    """

    def __init__(self, stack: ExitStack, mode: str) -> None:
        self.box = stack.enter_context(Sandbox(node_addresses=[NODE_ADDRESS]))
        if mode == "ipvs":
            stack.callback(virtual_servers.remove_all, self.box.node)
        self.client, *self._pods = self.box.add_pods([[CLIENT], *([pod] for pod in PODS)])
        self.listener = stack.enter_context(datapath.listen(self.box.outside, "", TARGET_PORT))

    def witness(self) -> Witness:
        """Who sees which pod the probe leads to."""
        return Witness(self.client, (PROBE_ADDRESS, SERVICE_PORT), list(zip(self._pods, PODS, strict=True)), TARGET_PORT)


def warm_up(contender: Contender, feed: Feed, variant: Variant, timeout: float, say: Say) -> None:
    """Let a program do a first sync of a small state, unmeasured: its files are in memory then, and Python's compiled."""
    waiting = Progress(say, lambda: f"{contender.name}: not warm yet")
    try:
        with ExitStack() as stack:
            node = Node(stack, contender.mode)
            stack.enter_context(feed.reachable_from(node.box))
            witness = stack.enter_context(node.witness())
            running = stack.enter_context(Running(contender, node.box, feed, variant))
            first_sync(running, node, witness, [], timeout=timeout, waiting=waiting)
    except FAILURES as error:
        say(f"{contender.name}, warming up: {error}")


def first_sync(
    running: Running, node: Node, witness: Witness, services: Sequence[str], *, timeout: float, waiting: Callable[[], None]
) -> FirstSync:
    """Wait for the first sync: by packets to the probe and to these cluster IPs, and by what the agent says.

    Raises AgentError or NoAnswer. What was answered once stays so: the last of all counts. `waiting` is called in between.
    """
    deadline = running.started + timeout
    answered = _wait(running, deadline, waiting, partial(witness.wait_any, _ASK, _FIRST_SYNC_PAUSE))
    for address in services:
        connected = partial(datapath.wait_connected, node.client, (address, SERVICE_PORT), _ASK, _FIRST_SYNC_PAUSE)
        answered = _wait(running, deadline, waiting, connected)
    ready = running.wait_ready(deadline, waiting)
    answered_seconds = answered - running.started
    return FirstSync(max(answered_seconds, ready), answered_seconds, ready, processes.cpu(running.pid))


def _wait(running: Running, deadline: float, waiting: Callable[[], None], attempt: Callable[[], float | None]) -> float:
    """When an attempt succeeded; it is repeated as long as the agent runs. Raises AgentError or NoAnswer."""
    began = time.monotonic()
    while time.monotonic() < deadline:
        running.check()
        waiting()
        if (answered := attempt()) is not None:
            return answered
    raise NoAnswer(f"no answer within {time.monotonic() - began:.0f} s\n{running.log_tail()}")


def settle(running: Running, timeout: float) -> None:
    """Wait until the agent has nearly rested for a second: what it does may go on long after packets find their way."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        began, before = time.monotonic(), processes.activity(running.pid)
        time.sleep(_QUIET_SECONDS)
        running.check()
        # A child that ends while both are summed up may count twice once, and be missed the next time.
        if abs(processes.activity(running.pid) - before) < _QUIET_SHARE * (time.monotonic() - began):
            return


def background(running: Running, timeout: float) -> Idle:
    """What it uses while it rests, with no periodic sync in that time if possible."""
    tries = []
    for _ in range(_BACKGROUND_TRIES):
        settle(running, timeout)
        tries.append(idle.watch(running, _BACKGROUND))
        if tries[-1].cpu.total < _QUIET_SHARE * tries[-1].seconds:
            break
    return min(tries, key=lambda one: one.cpu.total)


def _pause_at_random() -> None:
    """So that changes march in step neither with a timer of the agent, nor with the kernel's ticks.

    Where CPU time is counted in ticks, what always happens at the same time between two of them counts for nothing, or for
    a whole tick.
    """
    time.sleep(random.uniform(0.0, _RANDOM_PAUSE))
    end = time.monotonic() + random.uniform(0.0, 2 * _TICK)
    while time.monotonic() < end:
        pass


def changes(running: Running, witness: Witness, feed: Feed, count: int, *, timeout: float, say: Say) -> Changes:
    """Move the probe's endpoint so many times, and once before that to warm up. It begins at the first pod."""
    seconds: list[float] = []
    writes: list[float] = []
    used: list[Cpu] = []
    resting = background(running, timeout)
    tell = Progress(say, lambda: f"{running.contender.name}: {len(used)} of {count + 1} changes")
    at = 0
    for _ in range(count + 1):
        _pause_at_random()
        at = 1 - at
        before = processes.cpu(running.pid)
        started = time.monotonic()
        feed.point_to(PODS[at])
        writes.append(time.monotonic() - started)
        limit = started + scaled(_CHANGE_TIMEOUT)
        seconds.append(_wait(running, limit, tell, partial(witness.wait_for, at, _ASK, _CHANGE_PAUSE)) - started)
        settle(running, timeout)
        share = (time.monotonic() - started) / resting.seconds
        spent = processes.difference(processes.cpu(running.pid), before)
        used.append(Cpu(spent.own - resting.cpu.own * share, spent.children - resting.cpu.children * share))
    return Changes(
        seconds=seconds[1:],
        write_seconds=writes[1:],
        warm_up_seconds=seconds[0],
        spread=spread(seconds[1:]),
        cpu_seconds=[cpu.total for cpu in used[1:]],
        cpu_per_change=Cpu(
            max(0.0, statistics.fmean(cpu.own for cpu in used[1:])),
            max(0.0, statistics.fmean(cpu.children for cpu in used[1:])),
        ),
    )


def measure(contender: Contender, feed: Feed, variant: Variant, plan: Plan, say: Say) -> Run:
    """One agent in one variant, from start to end. What goes wrong is told in the result."""
    run = Run(
        agent=contender.name,
        mode=contender.mode,
        variant=variant,
        source=feed.name,
        program=contender.program,
        services=plan.shape.services,
        endpoints=plan.shape.endpoints,
    )
    feed.point_to(PODS[0])
    try:
        with ExitStack() as stack:
            node = Node(stack, contender.mode)
            stack.enter_context(feed.reachable_from(node.box))
            witness = stack.enter_context(node.witness())
            running = stack.enter_context(Running(contender, node.box, feed, variant))
            _measure_on(node, running, witness, feed, plan=plan, variant=variant, run=run, say=say)
    except FAILURES as error:
        run.error = str(error)
        say(f"{run.title}: {error}")
    return run


def _measure_on(
    node: Node, running: Running, witness: Witness, feed: Feed, *, plan: Plan, variant: Variant, run: Run, say: Say
) -> None:
    addresses = addresses_of(plan.shape)
    waiting = Progress(say, lambda: f"{run.agent}: {_so_far(node, run.mode, len(addresses) + 1)}")
    ends = [addresses[0], addresses[-1]]
    run.first_sync = sync = first_sync(running, node, witness, ends, timeout=plan.timeout, waiting=waiting)
    say(f"{run.title}: first sync {sync.seconds:.2f} s")
    settle(running, plan.timeout)
    text = _read(node, variant, plan, run)
    if plan.changes:
        run.changes = done = changes(running, witness, feed, plan.changes, timeout=plan.timeout, say=say)
        say(f"{run.title}: {plan.changes} changes, median {done.spread.median * 1000:.0f} ms")
    run.memory = processes.memory(running.pid)
    if plan.idle:
        run.idle = idle.watch(running, plan.idle)
        say(f"{run.title}: idle for {plan.idle:g} s, {run.idle.cpu.total:.2f} s of CPU")
    if plan.floor and run.mode == "iptables":
        sync.floor_seconds = rules.restore_seconds(text, variant)
        say(f"{run.title}: iptables-restore alone {sync.floor_seconds:.2f} s")


def _so_far(node: Node, mode: str, wanted: int) -> str:
    """How far the first sync has come, as far as that costs little to see."""
    if mode == "iptables":
        return "first sync not done yet"
    servers, entries = virtual_servers.count_so_far(node.box.node)
    return f"{servers:,} of {wanted:,} virtual servers, {entries:,} set entries"


def _read(node: Node, variant: Variant, plan: Plan, run: Run) -> str:
    """Count what is in the kernel, and check that every Service is; returns the IPv4 rules."""
    where = node.box.node
    text = rules.saved(where, variant)
    run.rules = {"ipv4": rules.count(text), "ipv6": rules.count(rules.saved(where, variant, "ipv6"))}
    addresses = addresses_of(plan.shape)
    if run.mode == "ipvs":
        found = virtual_servers.listed(where)
        run.ipvs = virtual_servers.count(where, found)
        virtual_servers.check_all_there(found, plan.shape.endpoints, addresses)
        virtual_servers.check_all_there(found, 1, [PROBE_ADDRESS])
    else:
        rules.check_all_there(text, [*addresses, PROBE_ADDRESS])
    return text


def measure_all(
    contenders: Sequence[Contender], feed: Feed, variants: Sequence[Variant], plan: Plan, say: Say
) -> Iterator[Run]:
    """Every contender in every variant, in turn."""
    for variant in variants:
        for contender in contenders:
            yield measure(contender, feed, variant, plan, say)
