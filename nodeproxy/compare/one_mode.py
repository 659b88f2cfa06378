"""Owns the work for one mode: a throw-away node, an agent that programs the snapshot there, probes, figures.

`run_mode` does it in this process. As a program (`python -m nodeproxy.compare.one_mode`, here or in a VM) it reads a
`Job` as JSON from standard input, writes a line of JSON on standard error for each step of progress, and a `ModeRun` as
JSON on standard output.
"""

from __future__ import annotations

import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import msgspec
import structlog
from msgspec import Struct
from msgspec.structs import replace

from nodeproxy.compare import figures, judging
from nodeproxy.compare.node import ThrowAwayNode
from nodeproxy.compare.places import Places, PlacesError, find_places
from nodeproxy.compare.plan import Plan, make_plan
from nodeproxy.compare.probing import Fault, Probing, Progress
from nodeproxy.compare.results import Figures, FrontendResult, ModeResult
from nodeproxy.compare.sampling import choose
from nodeproxy.configuration.agent_config import Mode
from nodeproxy.forwarding.table import Family
from nodeproxy.kernel.errors import KernelError
from nodeproxy.sandbox.agent import AgentError, AgentProcess
from nodeproxy.sandbox.namespace import NamespaceError
from nodeproxy.snapshot.directory import load
from nodeproxy.snapshot.model import Snapshot, SnapshotError
from nodeproxy.snapshot.view import NodeView

FAILURES = (AgentError, NamespaceError, PlacesError, SnapshotError, KernelError, OSError)
AfterProgramming = Callable[[ThrowAwayNode, AgentProcess], None]


class Work(Struct, frozen=True):
    """What is to be done with a mode. `ready`: seconds that the first sync may take."""

    mode: Mode
    variant: Literal["legacy", "nft"]
    limit: int = 500
    seed: int = 1
    changes: int = 20
    connects: int = 500
    ready: float = 300.0


class Job(Struct, frozen=True):
    """A mode's work, and the snapshot as the archive that `nodeproxy.snapshot.directory.save` writes."""

    work: Work
    snapshot: bytes


class Step(Struct, frozen=True):
    """How far the work has come."""

    stage: str
    done: int
    of: int


class ModeRun(Struct, frozen=True):
    """What came out: the result, and what was not as expected, or by design not as the forwarding table says."""

    result: ModeResult
    faults: tuple[Fault, ...] = ()


def run_mode(
    snapshot: Snapshot, work: Work, progress: Progress, after_programming: AfterProgramming | None = None
) -> ModeRun:
    """Do the work of one mode here. Never raises for what goes wrong with it: `ModeResult.error` says so.

    `after_programming` is called once everything is programmed, before the first probe; it may stop the agent.
    """
    started = time.monotonic()
    work_here = _Work(snapshot, work, progress, after_programming)
    error = None
    try:
        work_here.run()
    except FAILURES as failure:
        error = f"{work_here.stage}: {failure}".strip()
    result = ModeResult(
        mode=str(work.mode),
        variant=work.variant,
        where=f"Linux {platform.release()}",
        error=error,
        figures=work_here.figures,
        frontends=tuple(work_here.frontends),
        notes=tuple(work_here.notes),
        seconds=time.monotonic() - started,
    )
    return ModeRun(result, tuple(work_here.faults))


class _Work:
    """The steps, and what there is of a result so far."""

    def __init__(self, snapshot: Snapshot, work: Work, progress: Progress, after: AfterProgramming | None) -> None:
        self._snapshot = snapshot
        self._work = work
        self._progress = progress
        self._after = after
        self.stage = "planning"
        self.figures = Figures()
        self.frontends: list[FrontendResult] = []
        self.faults: list[Fault] = []
        self.notes: list[str] = []

    def run(self) -> None:
        work = self._work
        # What IPVS mode does otherwise is told from the same table, so it is that of iptables mode for all.
        view = NodeView(self._snapshot, mode=Mode.IPTABLES)
        places = find_places(view)
        rows = choose(view.table, work.limit, work.seed)
        plan = make_plan(view, rows, places, work.mode)
        self.notes += plan.notes
        self._step("laying out the node")
        with ThrowAwayNode(view, plan, places) as node, node.agent(self._snapshot, work.mode, work.variant) as agent:
            self._step("first sync")
            agent.start()
            self.figures = figures.first_sync(self.figures, agent, work.ready)
            if self._after is not None:
                self._after(node, agent)
            scheduler = self._snapshot.config.ipvs_scheduler if work.mode is Mode.IPVS else judging.CHANCE
            probing = Probing(node, plan, places, scheduler, self._report)
            try:
                self.frontends = probing.run()
            finally:
                self.faults, self.notes = probing.faults, [*self.notes, *probing.notes]
            self._measure(node, agent, plan, places)

    def _measure(self, node: ThrowAwayNode, agent: AgentProcess, plan: Plan, places: Mapping[Family, Places]) -> None:
        """What is in the kernel, connections, changes. What cannot be measured is a note: the answers are known by now."""
        work = self._work
        self._step("counting what is in the kernel")
        self.figures = replace(self.figures, counts=figures.counts(node.box.node, work.mode, work.variant))
        try:
            connects = figures.connects(node, plan, work.connects, work.seed, self._report)
            self.figures = replace(self.figures, connects=connects)
            if agent.running():
                self.figures = figures.changes(self.figures, node, agent, places, wanted=work.changes, progress=self._report)
        except figures.NotMeasured as error:
            self.notes.append(f"not measured: {error}")

    def _step(self, stage: str) -> None:
        self._report(stage, 0, 1)

    def _report(self, stage: str, done: int, of: int) -> None:
        self.stage = stage
        self._progress(stage, done, of)


def main() -> None:
    """Read a job from standard input, do it, write what came out to standard output."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # standard output is for the answer
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    with tempfile.TemporaryDirectory(prefix="nodeproxy-compare-") as directory:
        archive = Path(directory, "snapshot.tar.gz")
        archive.write_bytes(job.snapshot)
        snapshot = load(archive)

    def report(stage: str, done: int, of: int) -> None:
        sys.stderr.buffer.write(msgspec.json.encode(Step(stage, done, of)) + b"\n")
        sys.stderr.flush()

    run = run_mode(snapshot, job.work, report)
    sys.stdout.buffer.write(msgspec.json.encode(run))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
