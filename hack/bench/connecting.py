"""Owns the connect scenario: connect() among few Services and among many, from pods, after the agents have ended.

Agents leave their rules in place when they end, so nothing but the kernel is measured. All nodes are there at the same time,
and connections are made to all in turn, in small batches: what else the machine does hits all alike.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

from hack.bench import datapath, rules, virtual_servers
from hack.bench.agents import Running
from hack.bench.feeds import Feed, open_feed
from hack.bench.node import FAILURES, PODS, Entrant, Node, Progress, Say, Stage, first_sync
from hack.bench.objects import SERVICE_PORT, addresses_of, shape_of
from hack.bench.results import ConnectRun, ConnectTarget, spread, way
from nodeproxy.sandbox.agent import Variant
from nodeproxy.sandbox.namespace import Namespace

_BATCH = 50
_WARM_UP_BATCHES = 2


@dataclass(frozen=True, kw_only=True)
class ConnectPlan:
    """Connect latency among so many Services of one endpoint each (the least first), `connections` to each address."""

    sizes: Sequence[int] = (10, 10_000)
    connections: int = 2000
    timeout: float = 300.0


@dataclass
class _Target:
    client: Namespace
    listener: socket.socket
    result: ConnectTarget
    samples: list[float] = field(default_factory=list)
    failed: bool = False


class ConnectScenario:
    """Programs nodes, then measures on all of them; use it in a `with` block."""

    def __init__(self, plan: ConnectPlan, say: Say) -> None:
        self._plan = plan
        self._say = say
        self._stack = ExitStack()
        self._runs: dict[str, ConnectRun] = {}
        self._targets: list[tuple[ConnectRun, _Target]] = []

    def __enter__(self) -> ConnectScenario:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def program(self, entrants: Sequence[Entrant], source: str) -> None:
        """Has every contender that the source suits program one node for each number of Services.

        Who fails at one is not tried with more.
        """
        chosen = [entrant for entrant in entrants if source in entrant.contender.sources]
        if not chosen:
            return
        with closing(open_feed(source, PODS[0])) as feed:
            there = 0
            for services in self._plan.sizes:
                feed.add(shape_of(services - there, 1, first=there))
                there = services
                for entrant in chosen:
                    made = ConnectRun(entrant.contender.name, way(entrant.contender.mode, entrant.variant))
                    run = self._runs.setdefault(entrant.title, made)
                    if run.error is None:
                        self._program_one(entrant, feed, services, run)

    def measure(self) -> list[ConnectRun]:
        """Connects to the first and the last Service, by their order in the kernel, of every node."""
        batches = max(1, self._plan.connections // _BATCH)
        for number in range(-_WARM_UP_BATCHES, batches):
            for run, target in random.sample(self._targets, len(self._targets)):
                if not target.failed:
                    self._connect(run, target, counts=number >= 0)
        for run, target in self._targets:
            if not target.failed:
                target.result.microseconds = [round(sample, 1) for sample in target.samples]
                target.result.spread = spread(target.samples)
                run.targets.append(target.result)
        for run in self._runs.values():
            last = {target.services: target.spread.median for target in run.targets if target.position == "last"}
            if len(last) > 1:
                run.ratio = last[max(last)] / last[min(last)]
        return list(self._runs.values())

    def _connect(self, run: ConnectRun, target: _Target, *, counts: bool) -> None:
        service = (target.result.address, SERVICE_PORT)
        try:
            samples = datapath.connect_microseconds(target.client, service, target.listener, _BATCH)
        except datapath.NoAnswer as error:
            run.error = f"{target.result.services} Services: {error}"
            target.failed = True
            return
        if counts:
            target.samples += samples

    def _program_one(self, entrant: Entrant, feed: Feed, services: int, run: ConnectRun) -> None:
        """The node stays until the end; its agent ends once everything is programmed."""
        title = f"{run.title}, {services} Services"
        contender, variant = entrant.contender, entrant.variant
        addresses = addresses_of(shape_of(services, 1))
        try:
            node = Node(self._stack, contender.mode)
            with (
                feed.reachable_from(node.box),
                node.witness() as witness,
                Running(contender, node.box, feed, variant) as running,
            ):
                waiting = Progress(self._say, lambda: f"{title}: first sync not done yet")
                stage = Stage(node, witness, running, feed, variant)
                done = first_sync(stage, [], timeout=self._plan.timeout, waiting=waiting)
            order = _in_order(node, contender.mode, variant, addresses)
        except FAILURES as error:
            run.error = f"{services} Services: {error}"
            self._say(f"{title}: {error}")
            return
        self._say(f"{title}: programmed in {done.seconds:.2f} s")
        for position, address in (("first", order[0]), ("last", order[-1])):
            result = ConnectTarget(services, position, address, [], spread([0.0]))
            self._targets.append((run, _Target(node.client, node.listener, result)))


def _in_order(node: Node, mode: str, variant: Variant, addresses: Sequence[str]) -> list[str]:
    """The cluster IPs in the order that the kernel has them in. Raises NotProgrammed if any is missing."""
    if mode == "iptables":
        text = rules.saved(node.box.node, variant)
        rules.check_all_there(text, addresses)
        return rules.in_order(text, addresses)
    found = virtual_servers.listed(node.box.node)
    virtual_servers.check_all_there(found, 1, addresses)
    wanted = set(addresses)
    return [address for address in found.serving if address in wanted]
