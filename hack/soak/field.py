"""Owns the node of one load test with all that is on it: pods that serve, the feed, the agent, and the plan of the load."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from hack.soak import agents
from hack.soak.cluster import (
    BACKEND_PORT,
    NODE_ADDRESS,
    Life,
    Pod,
    fixed_objects,
    new_pods,
    slices,
    tcp_targets,
    udp_targets,
)
from hack.soak.feeds import ApiFeed, Feed, ManifestFeed
from nodeproxy.kernel.ipvs import IPVS
from nodeproxy.sandbox.agent import AgentProcess, Variant
from nodeproxy.sandbox.load.generator import Backends, Protocol
from nodeproxy.sandbox.load.plan import Plan
from nodeproxy.sandbox.namespace import Namespace
from nodeproxy.sandbox.pace import scaled
from nodeproxy.sandbox.topology import Sandbox

_LOCAL_PODS, _REMOTE_PODS = 3, 2
_POD_CLIENTS: Final = [f"10.244.90.{number}" for number in range(1, 5)] + ["fd00:10:244:90::1"]
_OUTSIDE_CLIENTS: Final = [f"203.0.113.{number}" for number in range(1, 5)]
_GRACE, _LONGEST_GRACE = 0.4, 1.5
# Connections that ended leave the table sooner than by default (120 s), so that it holds what a long load makes.
_NODE_SYSCTLS: Final = {"net.netfilter.nf_conntrack_tcp_timeout_time_wait": 20}


class FieldError(Exception):
    """The node does not do what the test needs of it; the text says what, with the agent's log."""


class Field:
    """A node under test. Use as a context manager.

    `bystanders`: so many Services besides those that are loaded. `pods` are those that slices name; `leaving` tells when
    (monotonic) each pod that is replaced began to terminate.
    """

    def __init__(
        self, mode: str, variant: Variant, *, rate: float, seed: int = 0, api: bool = False, bystanders: int = 20
    ) -> None:
        self.mode = mode
        self.variant: Variant = variant
        self.random = random.Random(seed)
        self.pods: dict[Pod, Life] = {}
        self.leaving: dict[str, float] = {}
        self.programming_timeout = 15.0
        self.slowest_programming = 0.0
        self.timeline: list[tuple[float, str]] = []
        self._seed = seed
        self._rate = rate
        self._api = api
        self._bystanders = bystanders
        self._namespaces: dict[Pod, Namespace] = {}
        self._new_local, self._new_remote = new_pods()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def _build(self) -> None:
        self.box = self._stack.enter_context(Sandbox(node_addresses=[NODE_ADDRESS]))
        self.box.node.sysctl(_NODE_SYSCTLS, optional=True)
        self._backends = self._stack.enter_context(Backends())
        self._pod_client = self.box.add_pod(*_POD_CLIENTS)
        self._outside_client = self.box.add_client(*_OUTSIDE_CLIENTS)
        self.feed: Feed = (ApiFeed if self._api else ManifestFeed)(self.box, fixed_objects(self._bystanders))
        self._stack.callback(self.feed.close)
        for local in [True] * _LOCAL_PODS + [False] * _REMOTE_PODS:
            self.pods[self.new_pod(local=local)] = Life.READY
        self.feed.put(slices(self.pods))
        self.agent = agents.nodeproxy(self.box, self.feed, self.mode, self.variant)
        self._stack.callback(lambda: self.agent.stop(scaled(10)))

    @property
    def api(self) -> ApiFeed:
        """The API server, where the field was made with one."""
        assert isinstance(self.feed, ApiFeed)
        return self.feed

    def use(self, agent: AgentProcess) -> AgentProcess:
        """From now on this is the agent of the node: whose log is shown, and which is stopped at the end."""
        self.agent = agent
        return agent

    def mark(self, what: str) -> float:
        """Note that something happens now, so that failures can be told by what came before them. Returns now."""
        now = time.monotonic()
        self.timeline.append((now, what))
        return now

    def new_pod(self, *, local: bool) -> Pod:
        """A pod that serves, which no slice names yet."""
        pod = next(self._new_local if local else self._new_remote)
        where = self.box.add_pod(pod.address, pod.address6) if local else self.box.outside
        self._namespaces[pod] = where
        for address, protocol in _listeners(pod):
            self._backends.serve(where, address, BACKEND_PORT, protocol, pod.name)
        return pod

    def end_pod(self, pod: Pod) -> None:
        """A pod takes nothing new, and lives on for the connections that it has: its grace period is long."""
        for address, protocol in _listeners(pod):
            self._backends.stop_listening(self._namespaces[pod], address, BACKEND_PORT, protocol, pod.name)

    def replace(self, old: list[Pod], *, interrupt: Callable[[], None] | None = None) -> None:
        """Replace pods, as a Deployment does that surges by as many.

        The EndpointSlices say: the new ones are ready and the old ones terminate, but serve; then those do not serve any
        more; then they are gone. The old ones take connections until some time after the kernel has the first of these.
        `interrupt` is called right after the first change was written, and must end with an agent that works.
        """
        new = [self.new_pod(local=pod.local) for pod in old]
        self.pods |= dict.fromkeys(new, Life.READY) | dict.fromkeys(old, Life.TERMINATING)
        names = ", ".join(pod.name for pod in old)
        self.leaving |= {pod.name: time.monotonic() for pod in old}
        self._put(f"{names} terminating, {', '.join(pod.name for pod in new)} ready")
        if interrupt is not None:
            interrupt()
        self.wait_programmed(new, old)
        time.sleep(min(scaled(_GRACE), _LONGEST_GRACE))
        self.pods |= dict.fromkeys(old, Life.FINISHED)
        self._put(f"{names} not serving any more")
        time.sleep(min(scaled(_GRACE), _LONGEST_GRACE))
        for pod in old:
            self.end_pod(pod)
        self.pods = {pod: life for pod, life in self.pods.items() if pod not in old}
        self._put(f"{names} gone")

    def _put(self, what: str) -> None:
        self.mark(what)
        self.feed.put(slices(self.pods))

    def wait_programmed(self, new: list[Pod], old: list[Pod]) -> None:
        """Wait until new connections may go to each of the new pods and to none of the old ones."""
        start = time.monotonic()
        while True:
            lines = self.forwarding()
            there = all(any(address in line for line in lines) for pod in new for address in _endpoints(pod))
            if there and not any(address in line for line in lines for pod in old for address in _endpoints(pod)):
                break
            if time.monotonic() - start > scaled(self.programming_timeout):
                what = f"{[pod.name for pod in new]} for {[pod.name for pod in old]}"
                raise FieldError(f"not programmed in {self.programming_timeout:g} s: {what}\n{self.agent.log_tail()}")
            time.sleep(0.05)
        self.slowest_programming = max(self.slowest_programming, time.monotonic() - start)

    def forwarding(self) -> list[str]:
        """The lines of the kernel's state that name an endpoint which gets new connections."""
        if self.mode == "ipvs":
            return self.box.node.run(_weighted_real_servers)
        tools = (f"iptables-{self.variant}-save", f"ip6tables-{self.variant}-save")
        saved = [self.box.node.command([tool, "-t", "nat"], check=False) for tool in tools]
        if any(done.returncode for done in saved):
            return []  # legacy: an ipset went while its rule was being printed
        text = "".join(done.stdout for done in saved)
        return [f"{line} " for line in text.splitlines() if "DNAT" in line and "--to-destination" in line]

    def plans(self) -> list[Plan]:
        """The load: a third of the rate from each of the pod, the node and the outside."""
        places = [
            ("pod", self._pod_client, tuple(_POD_CLIENTS), True),
            ("node", self.box.node, (), True),
            ("outside", self._outside_client, tuple(_OUTSIDE_CLIENTS), False),
        ]
        slow = max(1.0, 300 / self._rate)  # the streams of a slow machine speak less often, too
        return [
            Plan(
                place=place,
                namespace=where.name,
                tcp=tcp_targets(inside=inside),
                udp=udp_targets(),
                sources=sources,
                rate=self._rate / 3,
                fresh_rate=self._rate / 30,
                interval=0.05 * min(slow, 4),
                seed=self._seed,
            )
            for place, where, sources, inside in places
        ]

    def conntrack(self) -> dict[str, int]:
        """Entries of the node's conntrack table, and how often one could not be inserted or was dropped, so far."""
        return self.box.node.run(_conntrack)

    def traces(self, ports: Sequence[int]) -> list[str]:
        """What the node's kernel remembers of connections from these client ports: conntrack entries, IPVS connections."""
        listed = self.box.node.command(["conntrack", "-L", "-o", "extended"], check=False).stdout.splitlines()
        found = [f"conntrack: {line}" for line in listed if any(f"sport={port} " in line for port in ports)]
        connections = self.box.node.run(_ipvs_connections)
        marks = [f" {port:04X} " for port in ports]
        return found + [f"IPVS: {line}" for line in connections if any(mark in line for mark in marks)]


def _listeners(pod: Pod) -> list[tuple[str, Protocol]]:
    return [(pod.address, "TCP"), (pod.address, "UDP"), (pod.address6, "TCP")]


def _endpoints(pod: Pod) -> tuple[str, str]:
    return f" {pod.address}:{BACKEND_PORT} ", f" [{pod.address6}]:{BACKEND_PORT} "


def _weighted_real_servers() -> list[str]:
    with IPVS() as ipvs:
        servers = ipvs.virtual_servers()
        return [f" {real.server} " for server in servers for real in ipvs.real_servers(server) if real.weight]


def _ipvs_connections() -> list[str]:
    """Runs in the node."""
    file = Path("/proc/thread-self/net/ip_vs_conn")
    return file.read_text().splitlines()[1:] if file.exists() else []


def _conntrack() -> dict[str, int]:
    """Runs in the node. One line for each processor; the first column is the same in all."""
    with open("/proc/thread-self/net/stat/nf_conntrack") as file:  # noqa: PTH123 - of this thread's namespace
        head, *rows = [line.split() for line in file]
    columns = {name: [int(row[place], 16) for row in rows] for place, name in enumerate(head)}
    found: dict[str, int] = {name: sum(columns[name]) for name in ("drop", "early_drop", "insert_failed") if name in columns}
    found["entries"] = columns["entries"][0]
    return found
