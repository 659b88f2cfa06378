"""Owns what a trace tells: the packet, what must become of it and why, what the kernel makes of it, where the two differ.

`nodeproxy trace -o json` prints `{"traces": [...]}` of `Trace`, or `{"frontends": [...]}`. Addresses are
canonical text, chances between 0 and 1, durations in seconds.
"""

from __future__ import annotations

import enum

from msgspec import Struct

from nodeproxy.trace.walk import Step


class TracedPacket(Struct, frozen=True):
    """The first packet of a connection. `from_local_pod` is None where detect-local cannot tell."""

    source: str
    destination: str
    port: int
    protocol: str
    family: int
    from_node: bool
    from_local_pod: bool | None
    to_node: bool
    sender: str
    """Who sends it, in words."""


class TracedFrontend(Struct, frozen=True):
    """The frontend that the packet meets. `policy` names the traffic policy that decides, and its value."""

    service_port: str
    kind: str
    at: str
    policy: str
    backend_set: str
    action: str
    masquerade: str
    affinity_seconds: int | None = None
    allowed_sources: tuple[str, ...] | None = None


class TracedEndpoint(Struct, frozen=True):
    """An endpoint of the Service's slices, whether the packet may be sent to it, and why or why not."""

    slice: str
    address: str
    port: int | None
    node: str
    used: bool
    reason: str


class Backend(Struct, frozen=True):
    """Where a packet may go. `masquerade`: with the node's address as its source."""

    address: str
    port: int
    chance: float
    masquerade: bool


class Expected(Struct, frozen=True):
    """What must become of the packet, by the forwarding table."""

    outcome: str
    backends: tuple[Backend, ...]
    why: tuple[str, ...]


class Destination(Struct, frozen=True):
    """One end of the kernel's ways, with what only these pass. `backend` is None where nothing rewrote the packet.

    `untracked`: conntrack may not have it.
    """

    end: str
    chance: float
    backend: str | None
    masqueraded: bool
    interface: str
    reason: str
    steps: tuple[Step, ...]
    untracked: bool = False


class KernelFinding(Struct, frozen=True):
    """What the kernel's rules make of the packet: what every way passes first, each end, and what every way passes last."""

    origin: str
    steps: tuple[Step, ...]
    destinations: tuple[Destination, ...]
    last_steps: tuple[Step, ...] = ()


class Sent(Struct, frozen=True):
    """The packet as it was really sent, by the node itself. `to` and `answers_to` are as conntrack has them.

    `to` is None where there was no entry; `refusal` is an errno's name then, "" for none. `answers_to` is None where they
    come to the sender as it sent. `confirms`: it went where the walk has it; None where that cannot be told.
    """

    source: str
    to: str | None
    answers_to: str | None
    confirms: bool | None
    refusal: str = ""


class Agreement(enum.StrEnum):
    """Whether the kernel does what the table says."""

    AGREES = "agrees"
    DIFFERS = "differs"
    UNKNOWN = "unknown"
    NOT_COMPARED = "not compared"


class Trace(Struct, frozen=True):
    """One packet traced. `kernel` is None where the kernel was left out, and `kernel_left_out` says why."""

    packet: TracedPacket
    state: str
    frontend: TracedFrontend | None
    endpoints: tuple[TracedEndpoint, ...]
    expected: Expected
    agreement: Agreement
    kernel: KernelFinding | None = None
    kernel_left_out: str = ""
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    """Of the Services involved: what of them cannot be programmed."""
    sent: Sent | None = None
