"""Owns the process of one generator: reads its plan, makes the load until told to stop, and reports.

python -m nodeproxy.sandbox.load.client      # a Plan as a JSON line; later any other line: stop and report
"""

from __future__ import annotations

import gc
import os
import select
import sys
import time
from collections.abc import Sequence

import msgspec

from nodeproxy.sandbox.load.children import enter
from nodeproxy.sandbox.load.datagrams import FreshFlows, KeptFlows
from nodeproxy.sandbox.load.loop import Engine, Loop
from nodeproxy.sandbox.load.plan import CONNECTION, FRESH_FLOW, KEPT_FLOW, STREAM, Plan, Report, Target
from nodeproxy.sandbox.load.short import ShortConnections
from nodeproxy.sandbox.load.sources import Sources
from nodeproxy.sandbox.load.streams import Streams
from nodeproxy.sandbox.load.tally import Notes, Tally

_SLACK = 1.0  # after the time-out of the last request


class Generator:
    """All the load of one place."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._loop = Loop()
        self._began = time.monotonic()
        self._notes = Notes()
        self._tallies: list[Tally] = []
        self._engines: list[Engine] = []
        self._short: ShortConnections | None = None
        self._make_engines(plan)

    def _make_engines(self, plan: Plan) -> None:
        loop, timeout = self._loop, plan.timeout
        sources, udp_sources = Sources(plan.sources, plan.tcp), Sources(plan.sources, plan.udp)
        if plan.tcp and plan.rate > 0:
            self._short = ShortConnections(loop, sources, self._of(CONNECTION, plan.tcp), plan.rate, timeout)
            self._engines.append(self._short)
        lasting = [target for target in plan.tcp if not target.sticky]
        if lasting and plan.streams > 0:
            each, seconds = plan.streams, plan.stream_seconds
            tallies = self._of(STREAM, lasting)
            self._engines.append(
                Streams(
                    loop,
                    sources,
                    tallies,
                    each=each,
                    interval=plan.interval,
                    lifetime=seconds,
                    timeout=timeout,
                    seed=plan.seed,
                )
            )
        if plan.udp and plan.kept_flows > 0:
            tallies = self._of(KEPT_FLOW, plan.udp)
            flows = KeptFlows(loop, udp_sources, tallies, each=plan.kept_flows, interval=plan.interval, timeout=timeout)
            self._engines.append(flows)
        if plan.udp and plan.fresh_rate > 0:
            tallies = self._of(FRESH_FLOW, plan.udp)
            self._engines.append(FreshFlows(loop, udp_sources, tallies, rate=plan.fresh_rate, timeout=timeout))

    def _of(self, kind: str, targets: Sequence[Target]) -> list[Tally]:
        made = [Tally(self._plan.place, kind, target, self._began, self._notes) for target in targets]
        self._tallies += made
        return made

    def run(self) -> Report:
        """Until there is something on standard input, and then until every request has ended."""
        stopping: list[int] = []
        self._loop.add(sys.stdin.fileno(), select.EPOLLIN, stopping.append)
        while not stopping:
            self._loop.turn(self._engines)
        self._loop.unregister(sys.stdin.fileno())
        end = time.monotonic()
        late, late_at = self._loop.late, self._loop.late_at
        for engine in self._engines:
            engine.stop()
        deadline = end + self._plan.timeout + _SLACK
        while any(engine.pending() for engine in self._engines) and time.monotonic() < deadline:
            self._loop.turn(self._engines)
        return Report(
            seconds=round(end - self._began, 3),
            outcomes=tuple(tally.outcome(end) for tally in self._tallies),
            failures=tuple(self._notes.failures),
            slow=tuple(self._notes.slow),
            moves=tuple(self._notes.moves),
            skipped=self._short.skipped if self._short else 0,
            late=round(late, 4),
            late_at=round(max(0.0, late_at - self._began), 4),
        )


def main() -> None:
    """Read the plan, say that the load begins, make it, and report."""
    line = b""
    while not line.endswith(b"\n"):
        data = os.read(sys.stdin.fileno(), 1 << 16)
        if not data:
            return
        line += data
    plan = msgspec.json.decode(line, type=Plan)
    enter(plan.namespace)
    generator = Generator(plan)
    gc.freeze()
    gc.disable()  # bounded in time and count: no pause may be taken for one of the network
    _say(time.monotonic())
    _say(generator.run())


def _say(message: object) -> None:
    line = msgspec.json.encode(message) + b"\n"
    while line:
        line = line[os.write(sys.stdout.fileno(), line) :]


if __name__ == "__main__":
    main()
