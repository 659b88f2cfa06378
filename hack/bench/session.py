"""Owns carrying out the chosen scenarios: who runs from which source with what state, and who not again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from hack.bench import churning, rolling, startup
from hack.bench.agents import Contender, KubeProxy, Nodeproxy
from hack.bench.changing import BACKGROUND
from hack.bench.connecting import ConnectPlan, ConnectScenario
from hack.bench.feeds import SERVERS, SOURCES, ApiServerFeed, Feed, ServerFeed, StaticFeed, open_feed, open_server
from hack.bench.node import PODS, Entrant, Result, warm_up
from hack.bench.objects import shape_of
from hack.bench.options import Options, Shapes
from hack.bench.profiled import print_top
from hack.bench.results import Churn, Contest, Report, RollingUpdate, Run
from hack.controlplane.load import Shape
from nodeproxy.sandbox.pace import scaled


class Session:
    """One call of the benchmark; what it finds is added to the report as it comes."""

    def __init__(self, options: Options, report: Report, programs: Sequence[Path], profile: Path | None) -> None:
        self._options = options
        self._report = report
        self._profile = profile
        self._started = time.monotonic()
        self._warm: set[tuple[str, str]] = set()
        self._timed_out: dict[tuple[str, str, str], tuple[int, str]] = {}
        ours: list[Contender] = [Nodeproxy(mode, periodic=options.periodic, profile=profile) for mode in options.modes]
        theirs: list[Contender] = [
            KubeProxy(mode, program, periodic=options.periodic) for mode in options.modes for program in programs
        ]
        self._ours = [Entrant(one, variant) for one in ours for variant in options.variants_of(one.mode)]
        self._peers = [Entrant(one, variant) for one in theirs for variant in options.variants_of(one.mode)]

    def run(self) -> None:
        """All scenarios that are asked for."""
        wanted = self._options.scenarios
        if {"startup", "change", "idle"} & set(wanted):
            options = self._options
            self._start_all(
                "startup",
                [(services, options.endpoints) for services in options.services],
                changes=options.changes if "change" in wanted else 0,
                idle=options.idle if "idle" in wanted else 0.0,
            )
        if "scale" in wanted:
            self._start_all("scale", self._options.shapes, changes=self._options.changes, idle=0.0)
        if "rolling" in wanted:
            self._rolling()
        if "churn" in wanted:
            self._churn()
        if "connect" in wanted:
            self._connect()

    def say(self, text: str) -> None:
        """A line of progress, with the time since the start."""
        first_line = text.partition("\n")[0]
        print(f"[{time.monotonic() - self._started:6.1f} s] {first_line}", file=sys.stderr, flush=True)

    def _start_all(self, scenario: str, shapes: Shapes, *, changes: int, idle: float) -> None:
        """First sync and what else, of every shape. Manifests come first: no API server then takes processor time."""
        for source, entrants in self._by_source().items():
            for endpoints in dict.fromkeys(endpoints for _, endpoints in shapes):
                with closing(open_feed(source, PODS[0])) as feed:
                    self._warm_up(entrants, feed)
                    there = 0
                    for services in sorted(services for services, each in shapes if each == endpoints):
                        self.say(f"{source}: making {services:,} Services x {endpoints} endpoints")
                        feed.add(shape_of(services - there, endpoints, first=there))
                        there = services
                        self._start(scenario, entrants, feed, shape_of(services, endpoints), changes=changes, idle=idle)

    def _start(
        self, scenario: str, entrants: Sequence[Entrant], feed: Feed, shape: Shape, *, changes: int, idle: float
    ) -> None:
        def measure(entrant: Entrant) -> Run:
            timeout = self._timeout(entrant)
            plan = startup.Plan(
                shape=shape,
                changes=changes,
                idle=idle,
                floor=self._options.floor,
                background=1.0 if self._options.quick else BACKGROUND,
                timeout=timeout,
            )
            return startup.measure(entrant, feed, plan, self.say)

        def absent(entrant: Entrant) -> Run:
            return entrant.enter(Run, feed, shape)

        self._in_turn(scenario, entrants, shape, results=self._report.runs, measure=measure, absent=absent)

    def _rolling(self) -> None:
        options = self._options
        source, entrants = self._served()
        with closing(open_server(source, PODS[0], rolling.objects(options.replicas))) as feed:
            self._warm_up(entrants, feed)
            there = 0
            for services in options.services:
                self.say(f"{source}: making {services:,} Services x {options.endpoints} endpoints, {options.replicas} pods")
                feed.add(shape_of(services - there, options.endpoints, first=there))
                there = services
                self._roll(entrants, feed, shape_of(services, options.endpoints))

    def _roll(self, entrants: Sequence[Entrant], feed: ServerFeed, shape: Shape) -> None:
        replicas, grace = self._options.replicas, self._options.grace

        def measure(entrant: Entrant) -> RollingUpdate:
            plan = rolling.RollingPlan(shape=shape, replicas=replicas, grace=grace, timeout=self._timeout(entrant))
            return rolling.measure(entrant, feed, plan, self.say)

        def absent(entrant: Entrant) -> RollingUpdate:
            return entrant.enter(RollingUpdate, feed, shape, replicas=replicas, grace_seconds=grace)

        self._in_turn("rolling", entrants, shape, results=self._report.rolling, measure=measure, absent=absent)

    def _churn(self) -> None:
        source, entrants = self._served()
        for services in self._options.services:
            shape = shape_of(services, self._options.endpoints)
            with closing(open_server(source, PODS[0])) as feed:
                self._warm_up(entrants, feed)
                self.say(f"{source}: making {services:,} Services x {shape.endpoints} endpoints, for churn")
                feed.add(shape)
                self._churn_with(entrants, feed, shape)

    def _churn_with(self, entrants: Sequence[Entrant], feed: ServerFeed, shape: Shape) -> None:
        rate, seconds = self._options.churn_rate, self._options.churn_seconds
        state = churning.Churning(shape, feed)

        def measure(entrant: Entrant) -> Churn:
            plan = churning.ChurnPlan(shape=shape, rate=rate, seconds=seconds, timeout=self._timeout(entrant))
            return churning.measure(entrant, feed, state, plan, self.say)

        def absent(entrant: Entrant) -> Churn:
            return entrant.enter(Churn, feed, shape, rate=rate)

        self._in_turn("churn", entrants, shape, results=self._report.churn, measure=measure, absent=absent)

    def _connect(self) -> None:
        """Latency of connect(). What is in the kernel does not depend on the source: one is enough."""
        options = self._options
        timeout = max(self._timeout(entrant) for entrant in self._ours)
        plan = ConnectPlan(sizes=options.connect_services, connections=options.connections, timeout=timeout)
        ours = options.sources[0]
        with ConnectScenario(plan, self.say) as scenario:
            if self._peers and ours not in SERVERS:
                scenario.program(self._ours, ours)
                scenario.program(self._peers, ApiServerFeed.name)
            else:
                scenario.program(_alternating(self._ours, self._peers), ours)
            self.say(f"connecting {options.connections} times to each address")
            self._report.connect += scenario.measure()

    def _in_turn(
        self,
        scenario: str,
        entrants: Sequence[Entrant],
        shape: Shape,
        *,
        results: list[Result],
        measure: Callable[[Entrant], Result],
        absent: Callable[[Entrant], Result],
    ) -> None:
        """Every entrant as often as asked for. Who timed out in a scenario does not run in it with more."""
        size = shape.services * (shape.endpoints + 1)
        for _ in range(self._options.rounds):
            for entrant in entrants:
                key = (scenario, entrant.title, entrant.variant)
                beaten_by, what = self._timed_out.get(key, (size + 1, ""))
                if size >= beaten_by:
                    result = absent(entrant)
                    result.error, result.timed_out = f"not run: timed out at {what}", True
                    self.say(f"{result.title}: {result.error}")
                else:
                    result = measure(entrant)
                    self._show_profile(result)
                    if result.timed_out:
                        self._timed_out[key] = size, f"{shape.services:,} Services x {shape.endpoints}"
                results.append(result)

    def _by_source(self) -> dict[str, list[Entrant]]:
        """Who runs from which source: kube-proxy from each that it can use, or else from an API server."""
        sources = [source for source in SOURCES if source in self._options.sources]
        if not self._peers:
            return dict.fromkeys(sources, self._ours)
        with_peers = [source for source in sources if source in SERVERS] or [ApiServerFeed.name]
        found = {source: self._ours for source in sources if source not in with_peers}
        for source in with_peers:
            found[source] = _alternating(self._ours, self._peers) if source in sources else self._peers
        return found

    def _served(self) -> tuple[str, list[Entrant]]:
        """An API server that all run from, as where many write manifests cannot be."""
        source = next((source for source in self._options.sources if source in SERVERS), StaticFeed.name)
        return source, _alternating(self._ours, self._peers)

    def _warm_up(self, entrants: Sequence[Entrant], feed: Feed) -> None:
        for entrant in entrants:
            contender = entrant.contender
            if (contender.program, contender.mode) not in self._warm:
                self._warm.add((contender.program, contender.mode))
                self.say(f"{feed.name}: warming up {contender.name}, {contender.mode}")
                warm_up(entrant, feed, self._timeout(entrant), self.say)

    def _timeout(self, entrant: Entrant) -> float:
        return scaled(self._options.timeout_of(entrant.contender.mode))

    def _show_profile(self, result: Contest) -> None:
        if self._profile is not None and self._profile.exists():
            print(f"\n{result.title}, {result.services:,} Services x {result.endpoints}")
            print_top(self._profile)
            self._profile.unlink()


def _alternating(ours: Sequence[Entrant], peers: Sequence[Entrant]) -> list[Entrant]:
    """Ours and the peers', by mode and variant: what is compared runs one after the other."""
    ways = dict.fromkeys((entrant.contender.mode, entrant.variant) for entrant in (*ours, *peers))
    return [one for way in ways for one in (*ours, *peers) if (one.contender.mode, one.variant) == way]
