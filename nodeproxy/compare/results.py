"""Owns what a comparison tells: plain values, made by `nodeproxy compare`, shown as table, JSON and HTML.

JSON is `msgspec.json.encode(comparison)`. Times are in seconds unless a name says otherwise, memory in bytes, addresses
canonical text. Texts that come from the cluster (names of Services) are as the cluster has them: who shows them escapes.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

from msgspec import Struct


class SenderKind(enum.StrEnum):
    """Who sends a probe."""

    POD = "pod"
    """A pod of this node that is no endpoint."""
    NODE = "node"
    OUTSIDE = "outside"
    """A client that is neither the node nor a pod of it."""
    ENDPOINT = "endpoint"
    """One of the frontend's own endpoints on this node: it may get itself (hairpin)."""
    ALLOWED = "allowed source"
    """A client within the frontend's source ranges."""
    REFUSED = "refused source"
    """A client outside them."""


class Sender(Struct, frozen=True):
    """Who sends a probe, and the source address that it has when it leaves the sender."""

    kind: SenderKind
    address: str

    def __str__(self) -> str:
        return f"{self.kind} {self.address}"


class Expected(Struct, frozen=True):
    """What must happen, by the forwarding table.

    `outcome` is forward, reject, drop or no match. Of a forwarded probe: which backends (`ADDRESS:PORT`) may answer, and
    whether its source is rewritten (to those in `hairpins`, the sender itself, always).
    """

    outcome: str
    backends: tuple[str, ...] = ()
    masquerade: bool = False
    hairpins: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.outcome != "forward":
            return self.outcome
        source = "masqueraded" if self.masquerade else "source kept"
        return f"forward to {shortened(self.backends)}, {source}"


class Seen(Struct, frozen=True):
    """One kind of answer that probes of a sender got, and how many of them.

    `outcome` is forward, reject, drop, no match, closed (reset: nobody listens), unreachable or connected (to a server that
    is none of ours). `backend` and `source` (as it arrived there) are of those that were forwarded.
    """

    outcome: str
    count: int
    backend: str | None = None
    masqueraded: bool | None = None
    source: str | None = None
    detail: str | None = None

    def __str__(self) -> str:
        if self.outcome != "forward":
            return f"{self.count} x {self.outcome}" + (f" ({self.detail})" if self.detail else "")
        return f"{self.count} x {self.backend}, source {self.source}"


class ProbeResult(Struct, frozen=True):
    """What one sender's probes to a frontend met. `agrees` is against `expected`, which is that of the mode.

    `by_design` is the documented reason where the mode does not do what the forwarding table says. `complete`: so many were
    sent that each backend that is chosen as it should be is seen (else only what is seen is judged).
    """

    sender: Sender
    expected: Expected
    seen: tuple[Seen, ...]
    agrees: bool
    complete: bool = False
    by_design: str | None = None

    @property
    def sent(self) -> int:
        """How many probes there were."""
        return sum(one.count for one in self.seen)


class Balance(Struct, frozen=True):
    """How new connections of one sender were spread over a frontend's backends.

    `statistic` is chi-square against equal shares with `degrees` of freedom, `p_value` the chance of one as high or higher
    where shares are equal. Where the scheduler takes turns (`exact`, IPVS rr), counts may differ by one only.
    """

    sender: Sender
    counts: dict[str, int]
    statistic: float
    degrees: int
    p_value: float
    exact: bool
    even: bool


class Affinity(Struct, frozen=True):
    """Of a ServicePort with session affinity: clients that asked several times, and what they met.

    `kept` of the `clients` were answered by one endpoint every time; `endpoints` is how many different ones answered all.
    """

    clients: int
    kept: int
    endpoints: int
    spread: bool


class FrontendResult(Struct, frozen=True):
    """What probes of a frontend met in one mode. For a node port, `address` is the node's address that was asked.

    `policy` is the frontend's kind, action and sources in words, alike in all modes: `cluster IP, forward to all endpoints`.
    """

    service_port: str
    family: int
    protocol: str
    kind: str
    address: str
    port: int
    policy: str
    endpoints: int
    probes: tuple[ProbeResult, ...]
    balance: Balance | None = None
    affinity: Affinity | None = None

    @property
    def name(self) -> str:
        """`10.96.0.10:80/TCP`, with brackets around IPv6."""
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{address}:{self.port}/{self.protocol}"

    @property
    def identity(self) -> tuple[str, int, str]:
        """What is the same for the same frontend in another mode."""
        return (self.service_port, self.family, self.name)


class Difference(Struct, frozen=True):
    """Something that a mode does otherwise than the forwarding table says, or than another mode.

    `other_modes` says in words what each of the others did with the same probe. In `Comparison.disagreements` it is a fault,
    in `Comparison.by_design` a documented property of the mode.
    """

    mode: str
    service_port: str
    frontend: str
    sender: str
    expected: str
    seen: str
    reason: str
    other_modes: dict[str, str] = {}

    def __str__(self) -> str:
        sender = f" from {self.sender}" if self.sender else ""
        return f"{self.mode}: {self.service_port} at {self.frontend}{sender}: {self.reason}"


class Spread(Struct, frozen=True):
    """The distribution of samples, in the samples' unit."""

    count: int
    least: float
    p50: float
    p99: float
    most: float


class ConnectLatency(Struct, frozen=True):
    """connect() from a pod to one cluster IP, until the backend's kernel has answered. `position`: first, last or random."""

    position: str
    frontend: str
    microseconds: tuple[float, ...]
    spread: Spread


class Count(Struct, frozen=True):
    """How much of something a mode has in the kernel, both families together: rules, chains, virtual servers …"""

    what: str
    number: int


class Figures(Struct, frozen=True):
    """What a mode costs. Told, never judged. Empty or None where it could not be measured.

    `first_sync` is from the start of the process until its health check is passed; `changes` from a change of the manifests
    until a new connection goes where it should; CPU seconds are those until the first sync was done, and all during the
    changes, of the agent (`own`) and of the programs that it ran (`children`).
    """

    first_sync: float | None = None
    changes: tuple[float, ...] = ()
    change: Spread | None = None
    cpu_own: float | None = None
    cpu_children: float | None = None
    cpu_own_changes: float | None = None
    cpu_children_changes: float | None = None
    rss: int | None = None
    rss_peak: int | None = None
    counts: tuple[Count, ...] = ()
    connects: tuple[ConnectLatency, ...] = ()


class ModeResult(Struct, frozen=True):
    """All about one mode (with one variant of iptables, which IPVS mode uses as well).

    `where` is the kernel it ran on, in words: `this machine (Linux 6.1.0)` or `VM (Linux 6.1.0)`. `error` is set where the
    mode could not be run, or not to its end; the rest is then what there was until then. `notes`: what was not probed.
    """

    mode: str
    variant: str
    where: str
    error: str | None = None
    figures: Figures = Figures()
    frontends: tuple[FrontendResult, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """`iptables (nft)`."""
        return f"{self.mode} ({self.variant})"

    @property
    def probes(self) -> int:
        """How many probes were sent."""
        return sum(probe.sent for frontend in self.frontends for probe in frontend.probes)


class Scope(Struct, frozen=True):
    """What was compared: how many ServicePorts and frontends there are, how many were probed, and in words how chosen."""

    services: int
    service_ports: int
    frontends: int
    endpoints: int
    probed_service_ports: int
    probed_frontends: int
    words: str
    complete: bool


class Comparison(Struct, frozen=True):
    """Everything a comparison tells."""

    version: str
    origin: str
    taken: str
    node: str
    machine: str
    seed: int
    scope: Scope
    modes: tuple[ModeResult, ...]
    disagreements: tuple[Difference, ...]
    by_design: tuple[Difference, ...]
    refused: tuple[str, ...] = ()
    """Objects, and fields of objects, that could not be taken as they are; in words."""
    left_out: int = 0
    """So many of `refused`, the first ones, are whole objects and files, which the command names on standard error."""
    not_run: dict[str, str] = {}
    """Modes of the default choice that could not be run here, and why; that is no failure."""
    adapted: tuple[str, ...] = ()
    """What of the agent's configuration is otherwise in the throw-away node, in words."""
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether anything disagrees, or a mode that was asked for could not be run."""
        return bool(self.disagreements) or any(mode.error for mode in self.modes)


def spread_of(samples: Sequence[float]) -> Spread | None:
    """The distribution of samples (nearest rank); None where there is none."""
    if not samples:
        return None
    ordered = sorted(samples)
    rank = [ordered[max(0, math.ceil(share * len(ordered)) - 1)] for share in (0.5, 0.99)]
    return Spread(len(ordered), ordered[0], rank[0], rank[1], ordered[-1])


def shortened(names: Sequence[str], most: int = 4) -> str:
    """Some names of many, and how many more."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"
