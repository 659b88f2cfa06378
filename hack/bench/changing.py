"""Owns single changes: the probe's endpoint moved, one at a time, until packets follow and the agent rests again."""

from __future__ import annotations

import random
import statistics
import time
from functools import partial
from typing import Final

from hack.bench import idle, processes
from hack.bench.agents import Running
from hack.bench.node import ASK, PODS, REST_SHARE, Progress, Say, Stage, settle, wait
from hack.bench.results import Changes, Cpu, Idle, spread
from nodeproxy.sandbox.pace import scaled

CHANGE_TIMEOUT: Final = 120.0
BACKGROUND: Final = 4.0

_PAUSE = 0.0005  # between connections
_BACKGROUND_TRIES = 3
_RANDOM_PAUSE = 0.5  # before a change
_TICK = 0.01  # of the slowest kernel's clock


def measure_changes(stage: Stage, count: int, *, background: float = BACKGROUND, timeout: float, say: Say) -> Changes:
    """Move the probe's endpoint so many times, and once before that to warm up. It begins at the first pod.

    Raises AgentError or NoAnswer.
    """
    running = stage.running
    seconds: list[float] = []
    writes: list[float] = []
    used: list[Cpu] = []
    resting = _background(running, background, timeout)
    tell = Progress(say, lambda: f"{running.contender.name}: {len(used)} of {count + 1} changes")
    at = 0
    for _ in range(count + 1):
        _pause_at_random()
        at = 1 - at
        before = processes.cpu(running.pid)
        started = time.monotonic()
        stage.feed.point_to(PODS[at])
        writes.append(time.monotonic() - started)
        limit = started + scaled(CHANGE_TIMEOUT)
        seconds.append(wait(running, limit, tell, partial(stage.witness.wait_for, at, ASK, _PAUSE)) - started)
        settle(running, timeout)
        share = (time.monotonic() - started) / resting.seconds
        spent = processes.difference(processes.cpu(running.pid), before)
        used.append(Cpu(spent.own - resting.cpu.own * share, spent.children - resting.cpu.children * share))
    return Changes(
        seconds=seconds[1:],
        write_seconds=writes[1:],
        warm_up_seconds=seconds[0],
        spread=spread(seconds[1:]),
        cpu_seconds=[cpu.total for cpu in used[1:]],
        cpu_per_change=Cpu(
            max(0.0, statistics.fmean(cpu.own for cpu in used[1:])),
            max(0.0, statistics.fmean(cpu.children for cpu in used[1:])),
        ),
    )


def _background(running: Running, seconds: float, timeout: float) -> Idle:
    """What it uses while it rests, with no periodic sync in that time if possible."""
    tries = []
    for _ in range(_BACKGROUND_TRIES):
        settle(running, timeout)
        tries.append(idle.watch(running, seconds))
        if tries[-1].cpu.total < REST_SHARE * tries[-1].seconds:
            break
    return min(tries, key=lambda one: one.cpu.total)


def _pause_at_random() -> None:
    """So that changes march in step neither with a timer of the agent, nor with the kernel's ticks.

    Where CPU time is counted in ticks, what always happens at the same time between two of them counts for nothing, or for
    a whole tick.
    """
    time.sleep(random.uniform(0.0, _RANDOM_PAUSE))
    end = time.monotonic() + random.uniform(0.0, 2 * _TICK)
    while time.monotonic() < end:
        pass
