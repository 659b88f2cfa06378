"""Owns the run of one agent on one node: first sync (startup), then as asked for changes of an endpoint, and idling."""

from __future__ import annotations

from dataclasses import dataclass

from hack.bench import idle, processes, rules, virtual_servers
from hack.bench.changing import BACKGROUND, measure_changes
from hack.bench.feeds import Feed
from hack.bench.node import Entrant, Node, Progress, Say, Stage, first_sync, settle, staged, told_in
from hack.bench.objects import PROBE_ADDRESS, addresses_of
from hack.bench.results import Run
from hack.controlplane.load import Shape
from nodeproxy.sandbox.agent import Variant


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do in each run; times in seconds. `idle` 0: not measured. `floor`: time iptables-restore alone, too.

    `background`: how long it is looked at what the agent uses when nothing changes.
    """

    shape: Shape
    changes: int = 15
    idle: float = 0.0
    floor: bool = False
    background: float = BACKGROUND
    timeout: float = 300.0


def measure(entrant: Entrant, feed: Feed, plan: Plan, say: Say) -> Run:
    """One agent in one variant, from start to end. What goes wrong is told in the result."""
    run = entrant.enter(Run, feed, plan.shape)
    with told_in(run, say), staged(entrant, feed) as stage:
        _measure_on(stage, plan, run, say)
    return run


def _measure_on(stage: Stage, plan: Plan, run: Run, say: Say) -> None:
    node, running = stage.node, stage.running
    addresses = addresses_of(plan.shape)
    waiting = Progress(say, lambda: f"{run.title}: {_so_far(node, run.mode, len(addresses) + 1)}")
    ends = [addresses[0], addresses[-1]]
    run.first_sync = sync = first_sync(stage, ends, timeout=plan.timeout, waiting=waiting)
    say(f"{run.title}: first sync {sync.seconds:.2f} s")
    settle(running, plan.timeout)
    text = _read(node, stage.variant, plan, run)
    run.memory = processes.memory(running.pid)
    if plan.changes:
        run.changes = done = measure_changes(stage, plan.changes, background=plan.background, timeout=plan.timeout, say=say)
        run.memory = processes.memory(running.pid)
        say(f"{run.title}: {plan.changes} changes, median {done.spread.median * 1000:.0f} ms")
    if plan.idle:
        run.idle = idle.watch(running, plan.idle)
        say(f"{run.title}: idle for {plan.idle:g} s, {run.idle.cpu.total:.2f} s of CPU")
    if plan.floor and run.mode == "iptables":
        sync.floor_seconds = rules.restore_seconds(text, stage.variant)
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
