"""Owns reading /proc: CPU time and memory of an agent."""

from __future__ import annotations

import os
from pathlib import Path

from hack.bench.results import Cpu, Memory

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def cpu(pid: int) -> Cpu:
    """CPU time used so far, to 10 ms. Raises OSError once the process is gone."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system, children_user, children_system = (int(value) / _TICKS_PER_SECOND for value in fields[11:15])
    return Cpu(user + system, children_user + children_system)


def difference(later: Cpu, earlier: Cpu) -> Cpu:
    """CPU time used in between."""
    return Cpu(later.own - earlier.own, later.children - earlier.children)


def memory(pid: int) -> Memory:
    """Resident memory, now and at most. Raises OSError once the process is gone."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    values = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return Memory(rss_kib=int(values["VmRSS"].split()[0]), peak_kib=int(values["VmHWM"].split()[0]))
