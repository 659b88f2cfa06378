"""Owns the figures of a benchmark as they go into its JSON file. Durations are in seconds where no name says otherwise."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from msgspec import Struct, field


class Cpu(Struct, frozen=True):
    """CPU time, user and system, that a process used itself and that its children used which it has waited for."""

    own: float
    children: float

    @property
    def total(self) -> float:
        """Both together."""
        return self.own + self.children


class Spread(Struct, frozen=True):
    """Median, least and greatest of some samples, and what 99 of 100 keep to (of few samples: close to the greatest)."""

    median: float
    min: float
    max: float
    p99: float


def spread(samples: Sequence[float]) -> Spread:
    """Of at least one sample."""
    p99 = statistics.quantiles(samples, n=100, method="inclusive")[98] if len(samples) > 1 else samples[0]
    return Spread(statistics.median(samples), min(samples), max(samples), p99)


class RuleCount(Struct, frozen=True):
    """Rules and chains that iptables-save prints, all tables of one family together."""

    rules: int
    chains: int


class IpvsCount(Struct, frozen=True):
    """What IPVS mode keeps in the kernel, of both families. `addresses` are those of its interface."""

    virtual_servers: int
    real_servers: int
    sets: int
    set_entries: int
    addresses: int


class FirstSync(Struct):
    """From the start of the process until the kernel has everything.

    `seconds` is the later of two moments: `answered_seconds`, when connections to the first Service, the last one and the
    probe had all got through, and `ready_seconds`, when the agent said that it is done (nodeproxy: healthz is 200;
    kube-proxy: the time in its metric of the last sync, of both families). `cpu` is what it had used up to then.
    `floor_seconds` is how long iptables-restore alone takes for the same IPv4 rules in an empty namespace, where that was
    asked for.
    """

    seconds: float
    answered_seconds: float
    ready_seconds: float
    cpu: Cpu
    floor_seconds: float | None = None


class Changes(Struct):
    """One endpoint moved, so many times: from then until a connection went to the new one.

    `seconds` are the samples, which include those of `write_seconds` (the request to the API server, or the file moved into
    place); `warm_up_seconds` is the first change, which does not count. `cpu_seconds` is what the agent and its children
    used for each, from the change until they rested again, without what they use in the same time when nothing changes;
    `cpu_per_change` is the mean.
    """

    seconds: list[float]
    write_seconds: list[float]
    warm_up_seconds: float
    spread: Spread
    cpu_seconds: list[float]
    cpu_per_change: Cpu


class Memory(Struct, frozen=True):
    """Resident memory of the agent's process after all changes, and the greatest it ever had."""

    rss_kib: int
    peak_kib: int


class Idle(Struct, frozen=True):
    """What an agent uses over a while in which nothing changes.

    `switches_per_second` are voluntary context switches, of its threads and of children that live on: how often it wakes up.
    `rss_before_kib` and `rss_after_kib` are its resident memory at both ends.
    """

    seconds: float
    cpu: Cpu
    cpu_ms_per_minute: float
    core_percent: float
    switches_per_second: float
    rss_before_kib: int
    rss_after_kib: int


class Run(Struct):
    """One agent on one node, in one mode and variant of iptables. `error` says why later figures are missing.

    `ipvs` is there in IPVS mode only.
    """

    agent: str
    mode: str
    variant: str
    source: str
    program: str
    services: int
    endpoints: int
    first_sync: FirstSync | None = None
    changes: Changes | None = None
    memory: Memory | None = None
    rules: dict[str, RuleCount] = field(default_factory=dict)
    ipvs: IpvsCount | None = None
    idle: Idle | None = None
    error: str | None = None

    @property
    def title(self) -> str:
        """Who it is, for tables and plots."""
        return f"{self.agent} {way(self.mode, self.variant)} ({self.source})"


def way(mode: str, variant: str) -> str:
    """Mode and variant in a word: `legacy`, `ipvs-nft`."""
    return variant if mode == "iptables" else f"{mode}-{variant}"


class ConnectTarget(Struct):
    """connect() to one cluster IP, from a pod. `position` is its place in the kernel among all Services."""

    services: int
    position: str
    address: str
    microseconds: list[float]
    spread: Spread


class ConnectRun(Struct):
    """Connect latency with few Services and with many. `ratio`: median for the last of many, over the last of few."""

    agent: str
    variant: str
    targets: list[ConnectTarget] = field(default_factory=list)
    ratio: float | None = None
    error: str | None = None


class Machine(Struct, frozen=True):
    """What it ran on; the load average is that of the minute before.

    `time_factor` is by how much time limits were multiplied, as the machine is slow (emulated).
    """

    cores: int
    kernel: str
    iptables: str
    python: str
    load_average: float
    time_factor: float


class Report(Struct):
    """Everything of one call of the benchmark."""

    command: str
    started: str
    machine: Machine
    mode: str
    services: list[int]
    endpoints: int
    runs: list[Run] = field(default_factory=list)
    connect: list[ConnectRun] = field(default_factory=list)
