"""Owns what an agent uses while nothing changes in the cluster: CPU time, voluntary context switches, memory.

Its children count: those that it has waited for, and those that still run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hack.bench import processes
from hack.bench.agents import Running
from hack.bench.results import Cpu, Idle


@dataclass(frozen=True)
class Usage:
    """What a process has used up to a moment (monotonic seconds). `switches` are the voluntary ones, by thread."""

    moment: float
    cpu: Cpu
    switches: dict[str, int]
    rss_kib: int


def usage(pid: int) -> Usage:
    """What a process and its descendants have used so far. Raises OSError once the process is gone."""
    cpu, switches = processes.cpu(pid), _switches(pid)
    for descendant in _descendants(pid):
        with suppress(OSError):  # it has ended meanwhile
            cpu = Cpu(cpu.own, cpu.children + processes.cpu(descendant).total)
            switches |= _switches(descendant)
    return Usage(time.monotonic(), cpu, switches, processes.memory(pid).rss_kib)


def between(before: Usage, after: Usage) -> Idle:
    """What was used from one moment to another. Switches of threads that ended in between are not known."""
    seconds = after.moment - before.moment
    cpu = processes.difference(after.cpu, before.cpu)
    switches = sum(count - before.switches.get(thread, 0) for thread, count in after.switches.items())
    return Idle(
        seconds=seconds,
        cpu=cpu,
        cpu_ms_per_minute=cpu.total / seconds * 60_000,
        core_percent=cpu.total / seconds * 100,
        switches_per_second=switches / seconds,
        rss_before_kib=before.rss_kib,
        rss_after_kib=after.rss_kib,
    )


def watch(running: Running, seconds: float) -> Idle:
    """Leave an agent alone for so long. Raises AgentError if it ends."""
    before = usage(running.pid)
    time.sleep(seconds)
    running.check()
    return between(before, usage(running.pid))


def _descendants(pid: int) -> Iterator[int]:
    """Its children that run, and theirs."""
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in file.read_text().split():
                yield int(child)
                yield from _descendants(int(child))


def _switches(pid: int) -> dict[str, int]:
    """How many times each of its threads has waited for something."""
    found: dict[str, int] = {}
    for file in Path(f"/proc/{pid}/task").glob("*/status"):
        with suppress(OSError):
            for line in file.read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches:"):
                    found[file.parent.name] = int(line.split()[1])
    return found
