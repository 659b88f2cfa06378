"""Owns the connect scenario: connect() with few Services and with many, from pods, after the agents have ended.

Agents leave their rules in place when they end, so nothing but the kernel is measured. All nodes are there at the same time,
and connections are made to all in turn, in small batches: what else the machine does hits all alike.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from hack.bench import datapath, rules
from hack.bench.agents import Contender, Running
from hack.bench.feeds import SERVICE_PORT, TARGET_PORT, ApiServerFeed, Feed, ManifestFeed, addresses_of, shape_of
from hack.bench.results import ConnectRun, ConnectTarget, spread
from hack.bench.scenarios import FAILURES, PODS, Node, Say, first_sync
from nodeproxy.sandbox.agent import Variant
from nodeproxy.sandbox.namespace import Namespace

_BATCH = 50
_WARM_UP_BATCHES = 2


@dataclass(frozen=True, kw_only=True)
class ConnectPlan:
    """Connect latency with `few` and with `many` Services of one endpoint each, `connections` to each address."""

    few: int = 10
    many: int = 10_000
    connections: int = 2000
    timeout: float = 300.0


@dataclass
class _Target:
    client: Namespace
    listener: socket.socket
    result: ConnectTarget
    samples: list[float] = field(default_factory=list)


class ConnectScenario:
    """Programs nodes, then measures on all of them; use it in a `with` block."""

    def __init__(self, plan: ConnectPlan, say: Say) -> None:
        self._plan = plan
        self._say = say
        self._stack = ExitStack()
        self._runs: dict[tuple[str, str], ConnectRun] = {}
        self._targets: list[tuple[ConnectRun, _Target]] = []

    def __enter__(self) -> ConnectScenario:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def program(self, contenders: Sequence[Contender], source: str, variants: Sequence[Variant]) -> None:
        """Has every contender that the source suits program one node with few Services and one with many."""
        chosen = [contender for contender in contenders if source in contender.sources]
        if not chosen:
            return
        for services, feed in _feeds(source, self._plan):
            for variant in variants:
                for contender in chosen:
                    run = self._runs.setdefault((contender.name, variant), ConnectRun(contender.name, variant))
                    if run.error is None:
                        self._program_one(contender, feed, variant, services, run)

    def measure(self) -> list[ConnectRun]:
        """Connects to the first and the last Service, by the order of the rules, of every node."""
        batches = max(1, self._plan.connections // _BATCH)
        for number in range(-_WARM_UP_BATCHES, batches):
            for run, target in random.sample(self._targets, len(self._targets)):
                if run.error is None:
                    self._connect(run, target, counts=number >= 0)
        for run, target in self._targets:
            if run.error is None:
                target.result.microseconds = [round(sample, 1) for sample in target.samples]
                target.result.spread = spread(target.samples)
                run.targets.append(target.result)
        for run in self._runs.values():
            last = {target.services: target.spread.median for target in run.targets if target.position == "last"}
            if len(last) == 2:
                run.ratio = last[self._plan.many] / last[self._plan.few]
        return list(self._runs.values())

    def _connect(self, run: ConnectRun, target: _Target, *, counts: bool) -> None:
        service = (target.result.address, SERVICE_PORT)
        try:
            samples = datapath.connect_microseconds(target.client, service, target.listener, _BATCH)
        except datapath.NoAnswer as error:
            run.error = str(error)
            return
        if counts:
            target.samples += samples

    def _program_one(self, contender: Contender, feed: Feed, variant: Variant, services: int, run: ConnectRun) -> None:
        """The node stays until the end; its agent ends once everything is programmed."""
        title = f"{contender.name} {variant}, {services} Services"
        addresses = addresses_of(shape_of(services, 1))
        try:
            node = Node(self._stack)
            listener = self._stack.enter_context(datapath.listen(node.box.outside, "", TARGET_PORT))
            with (
                feed.reachable_from(node.box),
                node.witness() as witness,
                Running(contender, node.box, feed, variant) as running,
            ):
                done = first_sync(running, witness, self._plan.timeout)
            text = rules.saved(node.box.node, variant)
            rules.check_all_there(text, addresses)
            order = rules.in_order(text, addresses)
        except FAILURES as error:
            run.error = str(error)
            self._say(f"{title}: {error}")
            return
        self._say(f"{title}: programmed in {done.seconds:.2f} s")
        for position, address in (("first", order[0]), ("last", order[-1])):
            result = ConnectTarget(services, position, address, [], spread([0.0]))
            self._targets.append((run, _Target(node.client, listener, result)))


@contextmanager
def _opened(feed: Feed) -> Iterator[Feed]:
    try:
        yield feed
    finally:
        feed.close()


def _feeds(source: str, plan: ConnectPlan) -> Iterator[tuple[int, Feed]]:
    """A cluster with few Services, then one with many; an API server is kept and gets more."""
    if source == ManifestFeed.name:
        for services in (plan.few, plan.many):
            with _opened(ManifestFeed(shape_of(services, 1), PODS[0])) as feed:
                yield services, feed
        return
    cluster = ApiServerFeed(shape_of(plan.few, 1), PODS[0])
    with _opened(cluster):
        yield plan.few, cluster
        cluster.add(shape_of(plan.many - plan.few, 1, first=plan.few))
        yield plan.many, cluster
