"""Owns reading /proc: CPU time (seconds) and memory (bytes) of a process."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final, NamedTuple

_TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
_CPU_CLOCK: Final = 2  # CPUCLOCK_SCHED: with the process id above it, the clock of all its threads together


class Cpu(NamedTuple):
    """CPU time in seconds: of a process itself, and of its children that have ended."""

    own: float
    children: float

    def since(self, earlier: Cpu) -> Cpu:
        """What was used in between."""
        return Cpu(self.own - earlier.own, self.children - earlier.children)


class Memory(NamedTuple):
    """Resident memory in bytes, now and at most."""

    rss: int
    peak: int


def cpu(pid: int) -> Cpu:
    """CPU time used so far: its own exactly, that of its children to 10 ms. Raises OSError once the process is gone."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = sum(int(fields[place]) for place in (13, 14)) / _TICKS_PER_SECOND
    return Cpu(time.clock_gettime(~pid << 3 | _CPU_CLOCK), children)


def memory(pid: int) -> Memory:
    """Resident memory. Raises OSError once the process is gone."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kib = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if value.endswith(" kB")}
    return Memory(int(kib["VmRSS"]) * 1024, int(kib["VmHWM"]) * 1024)
