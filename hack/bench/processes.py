"""Owns reading /proc: CPU time and memory of an agent."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from hack.bench.results import Cpu, Memory

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_CPU_CLOCK = 2  # CPUCLOCK_SCHED: with the process id above it, the clock of all its threads together


def cpu(pid: int) -> Cpu:
    """CPU time used so far: its own exactly, that of its children to 10 ms. Raises OSError once the process is gone."""
    return Cpu(time.clock_gettime(~pid << 3 | _CPU_CLOCK), sum(_ticks(_stat(pid), 13, 14)))


def activity(pid: int) -> float:
    """CPU time used so far by a process and its children, those that still run included, to 10 ms."""
    used = 0.0
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            if int((fields := _stat(int(file.parent.name)))[1]) == pid:
                used += sum(_ticks(fields, 11, 12))
    return used + sum(_ticks(_stat(pid), 11, 12, 13, 14))


def _stat(pid: int) -> list[str]:
    """What /proc/PID/stat has after the name of the program."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _ticks(fields: Sequence[str], *places: int) -> Iterator[float]:
    return (int(fields[place]) / _TICKS_PER_SECOND for place in places)


def difference(later: Cpu, earlier: Cpu) -> Cpu:
    """CPU time used in between."""
    return Cpu(later.own - earlier.own, later.children - earlier.children)


def memory(pid: int) -> Memory:
    """Resident memory, now and at most. Raises OSError once the process is gone."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    values = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return Memory(rss_kib=int(values["VmRSS"].split()[0]), peak_kib=int(values["VmHWM"].split()[0]))
