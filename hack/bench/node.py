"""Owns one agent on one node as all scenarios need it: node, first sync, waiting until it rests, what can go wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from subprocess import SubprocessError
from typing import Any, Final, TypeVar

from hack.bench import datapath, processes, rules, virtual_servers
from hack.bench.agents import Contender, Running
from hack.bench.datapath import NoAnswer, Witness
from hack.bench.feeds import Feed
from hack.bench.objects import NODE_ADDRESS, PROBE_ADDRESS, SERVICE_PORT, TARGET_PORT
from hack.bench.results import Contest, FirstSync, way
from hack.controlplane.access import ApiError
from hack.controlplane.load import Shape
from nodeproxy.kernel.errors import KernelError
from nodeproxy.sandbox.agent import AgentError, Variant
from nodeproxy.sandbox.namespace import NamespaceError
from nodeproxy.sandbox.topology import Sandbox

CLIENT: Final = "10.244.0.2"
PODS: Final = ("10.244.0.11", "10.244.0.12")  # where the probe's endpoint can be
ASK: Final = 1.0  # for so long at a time packets are sent, before the agent is looked after
REST_SECONDS, REST_SHARE = 1.0, 0.2  # an agent that uses less than this share of a processor for so long rests

FAILURES: Final = (
    AgentError,
    NoAnswer,
    NamespaceError,
    KernelError,
    ApiError,
    rules.NotProgrammed,
    SubprocessError,
    OSError,
)

_TELL_EVERY = 30.0
_PAUSE = 0.01  # between connections

Say = Callable[[str], None]
Result = TypeVar("Result", bound=Contest)


@dataclass(frozen=True)
class Entrant:
    """A contender, and the variant of iptables that it runs with."""

    contender: Contender
    variant: Variant

    @property
    def title(self) -> str:
        """As `nodeproxy ipvs-nft`."""
        return f"{self.contender.name} {way(self.contender.mode, self.variant)}"

    def enter(self, kind: type[Result], feed: Feed, shape: Shape, **more: Any) -> Result:
        """The result, without figures yet, of this contender with this state."""
        return kind(
            agent=self.contender.name,
            mode=self.contender.mode,
            variant=self.variant,
            source=feed.name,
            program=self.contender.program,
            services=shape.services,
            endpoints=shape.endpoints,
            **more,
        )


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


@dataclass(frozen=True)
class Stage:
    """A node on which an agent has been started, and who looks at it."""

    node: Node
    witness: Witness
    running: Running
    feed: Feed
    variant: Variant


@contextmanager
def staged(entrant: Entrant, feed: Feed) -> Iterator[Stage]:
    """A new node with a running agent, both gone afterwards. The probe is at the first pod."""
    feed.point_to(PODS[0])
    with ExitStack() as stack:
        node = Node(stack, entrant.contender.mode)
        stack.enter_context(feed.reachable_from(node.box))
        witness = stack.enter_context(node.witness())
        running = stack.enter_context(Running(entrant.contender, node.box, feed, entrant.variant))
        yield Stage(node, witness, running, feed, entrant.variant)


@contextmanager
def told_in(result: Contest, say: Say) -> Iterator[None]:
    """What goes wrong inside is told in the result, and is not the end of the benchmark."""
    try:
        yield
    except FAILURES as error:
        result.error = str(error)
        result.timed_out = isinstance(error, NoAnswer)
        say(f"{result.title}: {error}")


def warm_up(entrant: Entrant, feed: Feed, timeout: float, say: Say) -> None:
    """Let a program do a first sync of a small state, unmeasured: its files are in memory then, and Python's compiled."""
    waiting = Progress(say, lambda: f"{entrant.title}: not warm yet")
    try:
        with staged(entrant, feed) as stage:
            first_sync(stage, [], timeout=timeout, waiting=waiting)
    except FAILURES as error:
        say(f"{entrant.title}, warming up: {error}")


def first_sync(stage: Stage, services: Sequence[str], *, timeout: float, waiting: Callable[[], None]) -> FirstSync:
    """Wait for the first sync: by packets to the probe and to these cluster IPs, and by what the agent says.

    Raises AgentError where the agent ends, NoAnswer after the time-out. What was answered once stays so: the last of all
    counts. `waiting` is called in between.
    """
    running = stage.running
    deadline = running.started + timeout
    answered = wait(running, deadline, waiting, partial(stage.witness.wait_any, ASK, _PAUSE))
    for address in services:
        connected = partial(datapath.wait_connected, stage.node.client, (address, SERVICE_PORT), ASK, _PAUSE)
        answered = wait(running, deadline, waiting, connected)
    ready = running.wait_ready(deadline, waiting)
    if ready is None:
        raise NoAnswer(f"timed out: answers, but is not done within {timeout:.0f} s\n{running.log_tail()}")
    answered_seconds = answered - running.started
    return FirstSync(max(answered_seconds, ready), answered_seconds, ready, processes.cpu(running.pid))


def wait(running: Running, deadline: float, waiting: Callable[[], None], attempt: Callable[[], float | None]) -> float:
    """When an attempt succeeded; it is repeated as long as the agent runs. Raises AgentError or, in the end, NoAnswer."""
    began = time.monotonic()
    while time.monotonic() < deadline:
        running.check()
        waiting()
        if (answered := attempt()) is not None:
            return answered
    raise NoAnswer(f"timed out: no answer within {time.monotonic() - began:.0f} s\n{running.log_tail()}")


def settle(running: Running, timeout: float) -> bool:
    """Wait until the agent has nearly rested for a second: what it does may go on long after packets find their way.

    False if it has not within the time-out.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        began, before = time.monotonic(), processes.activity(running.pid)
        time.sleep(REST_SECONDS)
        running.check()
        # A child that ends while both are summed up may count twice once, and be missed the next time.
        if abs(processes.activity(running.pid) - before) < REST_SHARE * (time.monotonic() - began):
            return True
    return False
