"""Owns the agent's part of a roll-out: it does what the ProxyNode of its node says, and tells in its status how that went.

Status is written when something in it changes: at once when the operator waits for it, else once in seconds at most. An
agent that nothing happens to writes nothing. Nothing of this holds up programming.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Final, Protocol

import msgspec
import structlog
from msgspec import Struct
from msgspec.structs import replace

from nodeproxy.agent.backoff import Backoff
from nodeproxy.agent.metrics import Metrics, count_of
from nodeproxy.agent.sync import SyncLoop
from nodeproxy.agent.waiting import wait_at_most
from nodeproxy.api.proxy_node import Audit, ProxyNode, ProxyNodeSpec, ProxyNodeStatus, Verification
from nodeproxy.programmer.base import ProgrammingError
from nodeproxy.source.apiserver.connection import RequestError
from nodeproxy.source.apiserver.credentials import CredentialsError

_log = structlog.get_logger(__name__)

_LOOK_SECONDS: Final = 5.0  # between looks at what may be told, and between two writings of what nobody waits for
_UNSYNCED_SECONDS: Final = 1.0
_AGAIN_SECONDS: Final = (30.0, 300.0)
_WRITE_AGAIN_SECONDS: Final = (1.0, 300.0)
_PATIENCE_SECONDS: Final = 30.0  # of an agent that starts: before that it does not say that it is not in sync
_MAX_DIFFERS: Final = 16
_MAX_DIFFERENCE: Final = 512
_MAX_MESSAGE: Final = 2048


class Remote(Protocol):
    """Where the ProxyNode is (`source.apiserver.proxy_nodes.ProxyNodes`)."""

    async def follow(self, deliver: Callable[[ProxyNode | None], None]) -> None:
        """Deliver the object as it is, and each time that it changed; None: there is none. Until cancelled."""

    async def write_status(self, status: dict[str, Any]) -> ProxyNode:
        """Write fields of the status; None removes one. Returns the object as it is then."""


class ProxyNodeFollower:
    """Follows one ProxyNode.

    `obey` puts what a spec says into force and returns why not, "" where it is in force; what could not be had is tried
    again now and then. `mode` is the one in force.
    """

    def __init__(
        self,
        remote: Remote,
        sync: SyncLoop,
        metrics: Metrics,
        *,
        obey: Callable[[ProxyNodeSpec], Awaitable[str]],
        mode: Callable[[], str],
    ) -> None:
        self._remote = remote
        self._sync = sync
        self._metrics = metrics
        self._obey = obey
        self._mode = mode
        self._started = time.monotonic()
        self._node: ProxyNode | None = None
        self._told = asyncio.Event()
        self._changed = asyncio.Event()
        self._wanted: ProxyNodeSpec | None = None  # as tried last, without what is not to be put into force
        self._message = ""
        self._retry_at = 0.0
        self._observed = 0
        self._audit: Audit | None = None
        self._verification: Verification | None = None
        self._complaint: str | None = None

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._remote.follow(self._take))
            group.create_task(self._follow_spec())
            group.create_task(self._write())

    def _take(self, node: ProxyNode | None) -> None:
        known = self._node
        if node is None:
            self._observed = 0
        elif known is None or known.metadata.uid != node.metadata.uid:
            # What a former agent answered, or this one before its connection broke, stands.
            self._audit, self._verification = node.status.audit, node.status.verification
        elif node.metadata.generation < known.metadata.generation:
            return  # older than what came with the answer to a write
        self._node = node
        self._told.set()

    async def _follow_spec(self) -> None:
        backoff = Backoff(*_AGAIN_SECONDS)
        delay: float | None = None
        while True:
            await wait_at_most(self._told, delay)
            self._told.clear()
            node, delay = self._node, None
            spec = node.spec if node is not None else ProxyNodeSpec()
            wanted = replace(spec, verification=None)
            if wanted != self._wanted or (self._message and time.monotonic() >= self._retry_at):
                if wanted != self._wanted:
                    backoff.reset()
                self._note_outcome(node, await self._obey(spec))
                self._wanted, self._retry_at = wanted, time.monotonic() + backoff.next()
            if self._message:
                delay = max(0.0, self._retry_at - time.monotonic())
            if node is None:
                continue
            self._observed = node.metadata.generation
            if spec.verification and (self._verification is None or self._verification.id != spec.verification):
                if self._sync.first_sync.is_set():
                    await self._verify(spec.verification)
                else:
                    delay = _UNSYNCED_SECONDS
            self._changed.set()

    def _note_outcome(self, node: ProxyNode | None, why_not: str) -> None:
        if why_not and why_not != self._message:
            _log.warning("what the ProxyNode says is not in force", reason=why_not)
        elif node is not None and not why_not:
            _log.info("what the ProxyNode says is in force", mode=self._mode())
        self._message = why_not

    async def _verify(self, identity: str) -> None:
        """Look at the kernel, and answer."""
        try:
            differs: Sequence[str] = await self._sync.check()
        except ProgrammingError as error:
            differs = [str(error)]
        now = _now()
        told = [text[:_MAX_DIFFERENCE] for text in differs[:_MAX_DIFFERS]]
        self._audit = Audit(clean=not told, differs=told or None, at=now)
        recent = sorted(self._sync.recent)
        self._verification = Verification(
            id=identity,
            sync_errors=self._metrics.restore_failures.count,
            refused_service_ports=len(self._sync.progress().refused),
            drift_repairs=count_of(self._metrics.drift),
            sync_p50_seconds=_quantile(recent, 0.5),
            sync_p99_seconds=_quantile(recent, 0.99),
            at=now,
        )
        _log.info("verified", verification=identity, differs=told or None)

    async def _write(self) -> None:
        """Write the status when it differs from what is there."""
        backoff = Backoff(*_WRITE_AGAIN_SECONDS)
        written = 0.0
        while True:
            await wait_at_most(self._changed, _LOOK_SECONDS if self._node is not None else None)
            self._changed.clear()
            node, status = self._node, self._status()
            if node is None or self._observed == 0 or status == replace(node.status, last_updated=None):
                continue
            if not self._is_waited_for(status, node.status):
                if not status.in_sync and time.monotonic() - self._started < _PATIENCE_SECONDS:
                    continue
                await asyncio.sleep(max(0.0, written + _LOOK_SECONDS - time.monotonic()))
                status = self._status()
            try:
                found = await self._remote.write_status(_as_json(replace(status, last_updated=_now())))
            except (RequestError, CredentialsError) as error:
                self._complain(error)
                await asyncio.sleep(backoff.next())
                self._changed.set()
            else:
                self._complaint = None
                backoff.reset()
                written = time.monotonic()
                self._take(found)

    def _status(self) -> ProxyNodeStatus:
        return ProxyNodeStatus(
            observed_generation=self._observed,
            mode=self._mode(),
            version=version("nodeproxy"),
            in_sync=self._sync.in_sync,
            audit=self._audit,
            message=self._message[:_MAX_MESSAGE] or None,
            verification=self._verification,
        )

    @staticmethod
    def _is_waited_for(status: ProxyNodeStatus, there: ProxyNodeStatus) -> bool:
        """Whether it answers something: a spec, or a verification."""
        return (status.observed_generation, status.verification, status.message) != (
            there.observed_generation,
            there.verification,
            there.message,
        )

    def _complain(self, error: Exception) -> None:
        """Once for each change of error."""
        if (text := str(error)) != self._complaint:
            self._complaint = text
            _log.info("cannot write the status of the ProxyNode", error=text)


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 6) if ordered else None


def _as_json(value: Struct) -> dict[str, Any]:
    """All fields by their names in JSON; None for what is absent, so that a merge patch removes it."""
    found: dict[str, Any] = {}
    for entry in msgspec.structs.fields(value):
        field = getattr(value, entry.name)
        found[entry.encode_name] = _as_json(field) if isinstance(field, Struct) else field
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
