"""Owns what an agent uses, as figures of a benchmark: CPU time, also of children that still run, and memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from hack.bench.results import Cpu, Memory
from nodeproxy.sandbox import processes

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def cpu(pid: int) -> Cpu:
    """CPU time used so far: its own exactly, that of its children to 10 ms. Raises OSError once the process is gone."""
    return Cpu(*processes.cpu(pid))


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
    found = processes.memory(pid)
    return Memory(rss_kib=found.rss // 1024, peak_kib=found.peak // 1024)
