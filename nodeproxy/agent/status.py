"""Owns the form of what an agent tells of itself on its local socket. JSON; timestamps are RFC 3339, durations seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from nodeproxy.configuration.agent_config import AgentConfig, Mode
from nodeproxy.forwarding.table import Family


class _Told(Struct, frozen=True, rename="camel"):
    """Base of everything here: camelCase in JSON."""


class InForce(_Told, frozen=True):
    """How the agent is configured, and what it found on its node. `config` has the mode in force and absolute paths.

    `variant` of iptables: None before anything may be programmed.
    """

    config: AgentConfig
    variant: str | None
    families: tuple[Family, ...]
    node_addresses: tuple[str, ...]
    version: str


class LastSync(_Told, frozen=True):
    """The last sync that worked. `rows`: ServicePorts that it wrote or removed; `full`: everything was written."""

    at: str
    seconds: float
    full: bool
    rows: int


class Trouble(_Told, frozen=True):
    """Something that failed in one part of the agent; so many `times` in a row, at last `at`."""

    at: str
    where: str
    text: str
    times: int = 1


class Drift(_Told, frozen=True):
    """Somebody changed what was programmed: what differed, in words, and since when it is as it was (None: not yet)."""

    found: str
    differs: tuple[str, ...]
    repaired: str | None = None


class SyncState(_Told, frozen=True):
    """How far the kernel is in step with the cluster.

    `pending`: Services of which something is not programmed yet; `in_time`: no change waits longer than twice the sync
    period. `error`: of the last sync, if it failed.
    """

    first_done: bool
    pending: int
    in_time: bool
    last: LastSync | None = None
    error: Trouble | None = None
    retry_seconds: float | None = None


class SourceState(_Told, frozen=True):
    """Where the cluster state comes from. `not_watched`: kinds that are not watched now, and why."""

    origin: str
    lists_complete: bool
    last_event: str | None
    not_watched: dict[str, str]


class Refusal(_Told, frozen=True):
    """A ServicePort that the kernel refuses."""

    service_port: str
    reason: str


class Refusals(_Told, frozen=True):
    """ServicePorts that the kernel refuses: how many, the first of them, and seconds until they are tried again."""

    count: int
    first: tuple[Refusal, ...]
    retry_seconds: float | None = None


class Problems(_Told, frozen=True):
    """Parts of objects that cannot be programmed: how many, and the first of them in words."""

    count: int
    first: tuple[str, ...]


class Size(_Told, frozen=True):
    """A Service, and how many of something it has."""

    service: str
    count: int


class Counts(_Told, frozen=True):
    """How much there is. `backends`: endpoints of ServicePorts that are chosen for this node, each once per ServicePort.

    `rules`: of ours, by IP family and table. `virtual_servers`: in IPVS mode.
    """

    services: int
    service_ports: int
    frontends: int
    backends: int
    health_checks: int
    rules: Mapping[str, Mapping[str, int]]
    virtual_servers: int | None = None


class AgentStatus(_Told, frozen=True):
    """Everything that `nodeproxy status` shows. `why_not`: in words, why it is not in sync; empty where it is.

    `waiting_for`: another proxy that has to end before anything is programmed. `other_proxies`: those that run here now.
    """

    version: str
    node: str
    mode: Mode
    configured_mode: Mode
    variant: str | None
    pid: int
    started: str
    now: str
    in_sync: bool
    why_not: tuple[str, ...]
    sync: SyncState
    source: SourceState
    counts: Counts
    refused: Refusals
    problems: Problems
    most_backends: tuple[Size, ...]
    most_frontends: tuple[Size, ...]
    audits: int
    last_audit: str | None
    drift: tuple[Drift, ...]
    errors: tuple[Trouble, ...]
    draining_real_servers: int
    other_proxies: tuple[str, ...]
    waiting_for: str | None = None


def rfc3339(timestamp: float) -> str:
    """A Unix timestamp as RFC 3339 in UTC, whole seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(timestamp))


def encode_hook(value: Any) -> Any:
    """For msgspec: paths as text. Raises NotImplementedError."""
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(type(value))


def decode_hook(kind: type, value: Any) -> Any:
    """For msgspec: the inverse of `encode_hook`."""
    if kind is Path:
        return Path(value)
    raise NotImplementedError(kind)
