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


class Contest(Struct, kw_only=True):
    """One agent on one node, in one mode and variant of iptables, with so many Services of so many endpoints each.

    `error` says in a line why figures are missing; `timed_out` whether that is because it took too long.
    """

    agent: str
    mode: str
    variant: str
    source: str
    program: str
    services: int
    endpoints: int
    error: str | None = None
    timed_out: bool = False

    @property
    def way(self) -> str:
        """Mode and variant in a word."""
        return way(self.mode, self.variant)

    @property
    def title(self) -> str:
        """Who it is, for tables and plots."""
        return f"{self.agent} {self.way} ({self.source})"

    @property
    def shape(self) -> tuple[int, int]:
        """Services, and endpoints of each."""
        return self.services, self.endpoints


class Run(Contest, kw_only=True):
    """The scenarios startup, change and idle, with one process of the agent. `ipvs` is there in IPVS mode only."""

    first_sync: FirstSync | None = None
    changes: Changes | None = None
    memory: Memory | None = None
    rules: dict[str, RuleCount] = field(default_factory=dict)
    ipvs: IpvsCount | None = None
    idle: Idle | None = None


class RollingUpdate(Contest, kw_only=True):
    """A Deployment of `replicas` pods replaced one by one, under a load of connections to its Service.

    `joined_seconds`: for each new pod, from the write that says it is ready to the first connection that reached it.
    `left_seconds`: for each old pod, from the write that says it is terminating to the last connection that reached it (0:
    none did). Both are as exact as connections are frequent: `resolution_seconds` is between two of them to the same pod.
    A terminating pod ends `grace_seconds` after that write; a connection that reaches it later is `failed`, as is one that
    is refused or not made in time. `failures` are the first of them in words.
    `writes` is how many times the EndpointSlice was written; `cpu` what the agent used for all that.
    """

    replicas: int
    grace_seconds: float
    joined_seconds: list[float] = field(default_factory=list)
    left_seconds: list[float] = field(default_factory=list)
    joined: Spread | None = None
    left: Spread | None = None
    resolution_seconds: float = 0.0
    writes: int = 0
    seconds: float = 0.0
    connections: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    cpu: Cpu | None = None
    cpu_per_write: float = 0.0
    core_percent: float = 0.0


class Churn(Contest, kw_only=True):
    """`rate` endpoints a second moved for `seconds`, each of a Service chosen at random.

    `latency_seconds`: meanwhile the probe's endpoint is moved, too, now and then, and each sample is the time until packets
    follow; `first_half` and `second_half` (medians) tell whether it grows. `drain_seconds`: after the last change, until the
    agent rested. `keeps_up`: that was soon, and all changes are in the kernel. `missing`: endpoints that were written last
    but are not in the kernel afterwards.
    """

    rate: float
    seconds: float = 0.0
    changes: int = 0
    achieved_rate: float = 0.0
    latency_seconds: list[float] = field(default_factory=list)
    latency: Spread | None = None
    first_half: float | None = None
    second_half: float | None = None
    drain_seconds: float | None = None
    keeps_up: bool | None = None
    missing: int | None = None
    cpu: Cpu | None = None
    core_percent: float = 0.0
    rss_before_kib: int = 0
    rss_after_kib: int = 0
    peak_kib: int = 0


def way(mode: str, variant: str) -> str:
    """Mode and variant in a word: `legacy`, `ipvs-nft`."""
    return variant if mode == "iptables" else f"{mode}-{variant}"


class ConnectTarget(Struct):
    """connect() to one cluster IP, from a pod. `position` is its place in the kernel among all Services: first or last."""

    services: int
    position: str
    address: str
    microseconds: list[float]
    spread: Spread


class ConnectRun(Struct):
    """Connect latency against the number of Services. `variant` is the way: mode and variant.

    `ratio`: median for the last of the most Services, over the last of the fewest.
    """

    agent: str
    variant: str
    targets: list[ConnectTarget] = field(default_factory=list)
    ratio: float | None = None
    error: str | None = None

    @property
    def title(self) -> str:
        """Who it is, for tables and plots."""
        return f"{self.agent} {self.variant}"


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


class Part(Struct, frozen=True):
    """One call of the benchmark: when it started (RFC 3339), how, and on what."""

    command: str
    started: str
    modes: list[str]
    machine: Machine


class Report(Struct):
    """Everything of one call of the benchmark, or of several together."""

    parts: list[Part]
    runs: list[Run] = field(default_factory=list)
    rolling: list[RollingUpdate] = field(default_factory=list)
    churn: list[Churn] = field(default_factory=list)
    connect: list[ConnectRun] = field(default_factory=list)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Services and endpoints each of all runs, the least first."""
        return sorted({run.shape for run in self.runs})

    @property
    def failed(self) -> list[tuple[str, str, str]]:
        """Who failed, in what, and why."""
        contests: list[tuple[str, list[Contest]]] = [
            ("", [*self.runs]),
            (", rolling update", [*self.rolling]),
            (", churn", [*self.churn]),
        ]
        found = [
            (one.agent, f"{one.title}, {one.services:,} Services x {one.endpoints}{what}", one.error)
            for what, ones in contests
            for one in ones
            if one.error
        ]
        return found + [(run.agent, f"{run.title}, connect", run.error) for run in self.connect if run.error]


def merged(reports: Sequence[Report]) -> Report:
    """Several reports as one."""
    return Report(
        parts=[part for report in reports for part in report.parts],
        runs=[run for report in reports for run in report.runs],
        rolling=[one for report in reports for one in report.rolling],
        churn=[one for report in reports for one in report.churn],
        connect=[run for report in reports for run in report.connect],
    )
