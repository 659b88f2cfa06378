"""Owns telling the agent's status: gathered on the event loop at once, counted in a thread from rows that never change."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Final

import msgspec
from msgspec.structs import replace

from nodeproxy.agent.health import Health
from nodeproxy.agent.http import Routes
from nodeproxy.agent.http_server import Answer
from nodeproxy.agent.modes import Modes
from nodeproxy.agent.other_proxies import kube_proxies
from nodeproxy.agent.outside import origin_of
from nodeproxy.agent.record import Record
from nodeproxy.agent.status import (
    AgentStatus,
    Counts,
    InForce,
    Problems,
    Refusal,
    Refusals,
    Size,
    SourceState,
    SyncState,
    encode_hook,
    rfc3339,
)
from nodeproxy.agent.sync import Progress, SyncLoop
from nodeproxy.cluster.state import ClusterState
from nodeproxy.configuration.agent_config import AgentConfig, Mode
from nodeproxy.forwarding.table import Problem, ServicePort
from nodeproxy.forwarding.tracker import ForwardingTracker
from nodeproxy.kernel.errors import KernelError
from nodeproxy.kernel.ipvs import IPVS

_JSON: Final = "application/json"
_FIRST: Final = 100  # of refused ServicePorts and of problems
_LARGEST: Final = 5


class Reporter:
    """Answers questions about an agent. `config` is what is in force; `sync` None before anything may be programmed."""

    def __init__(
        self,
        *,
        config: Callable[[], AgentConfig],
        sync: Callable[[], SyncLoop | None],
        modes: Modes,
        state: ClusterState,
        tracker: ForwardingTracker,
        health: Health,
        record: Record,
        addresses: Callable[[], Iterable[str]],
    ) -> None:
        self._config = config
        self._sync = sync
        self._modes = modes
        self._state = state
        self._tracker = tracker
        self._health = health
        self._record = record
        self._addresses = addresses

    def routes(self) -> Routes:
        """/status and /config."""
        return {"/status": self._status, "/config": self._in_force}

    def _in_force(self) -> Answer:
        config = self._config()
        in_force = InForce(
            config=replace(
                config, mode=self._modes.mode, kubeconfig=_absolute(config.kubeconfig), manifests=_absolute(config.manifests)
            ),
            variant=str(self._modes.variant) if self._sync() is not None else None,
            families=self._tracker.facts.families,
            node_addresses=tuple(self._addresses()),
            version=version("nodeproxy"),
        )
        return Answer(200, _JSON, msgspec.json.encode(in_force, enc_hook=encode_hook))

    def _status(self) -> Callable[[], Answer]:
        """Called on the event loop: copies references only. What it returns is called in a thread."""
        rows = tuple(self._tracker.table.rows.values())
        problems = tuple(self._tracker.problems.values())
        sync = self._sync()
        progress = sync.progress() if sync is not None else Progress()
        status = self._outline(progress, sync is not None)

        def finish() -> Answer:
            return Answer(200, _JSON, msgspec.json.encode(_counted(status, rows, problems, self._config())))

        return finish

    def _outline(self, progress: Progress, may_program: bool) -> AgentStatus:
        """The status without what takes counting."""
        config, record, now = self._config(), self._record, time.time()
        sync = SyncState(
            first_done=progress.first_done,
            pending=progress.pending,
            in_time=self._health.alive,
            last=record.last_sync,
            error=record.sync_error,
            retry_seconds=None if record.retry_at is None else max(0.0, round(record.retry_at - now, 1)),
        )
        source = SourceState(
            origin=origin_of(config),
            lists_complete=self._state.lists_complete,
            last_event=None if record.last_event is None else rfc3339(record.last_event),
            not_watched={str(kind): error for kind, error in record.watched.items() if error is not None},
        )
        refusals = [Refusal(str(key), reason) for key, reason in list(progress.refused.items())[:_FIRST]]
        drift = record.drifts
        reasons = tuple(why_not(sync, source, len(progress.refused), record))
        return AgentStatus(
            version=version("nodeproxy"),
            node=config.node_name,
            mode=self._modes.mode,
            configured_mode=config.mode,
            variant=str(self._modes.variant) if may_program else None,
            pid=os.getpid(),
            started=rfc3339(record.started),
            now=rfc3339(now),
            in_sync=not reasons,
            why_not=reasons,
            sync=sync,
            source=source,
            counts=Counts(
                services=len(self._state.services),
                service_ports=0,
                frontends=0,
                backends=0,
                health_checks=len(self._tracker.table.health_checks),
                rules={
                    f"IPv{int(family)}": {table: count.in_force for table, count in tables.items()}
                    for family, tables in record.rules.items()
                },
            ),
            refused=Refusals(len(progress.refused), tuple(refusals), progress.retry_seconds),
            problems=Problems(0, ()),
            most_backends=(),
            most_frontends=(),
            audits=record.audits,
            last_audit=None if record.last_audit is None else rfc3339(record.last_audit),
            drift=drift,
            errors=record.troubles,
            draining_real_servers=self._modes.draining if may_program else 0,
            other_proxies=(),
            waiting_for=record.waiting_for,
        )


def why_not(sync: SyncState, source: SourceState, refused: int, record: Record) -> Iterable[str]:
    """Why the kernel is not in sync with the cluster, in words."""
    if record.waiting_for is not None:
        yield f"nothing is programmed: {record.waiting_for}"
        return
    if not source.lists_complete:
        yield "no complete list of Services and EndpointSlices yet"
    elif not sync.first_done:
        yield "the first sync is not done"
    if sync.error is not None:
        yield f"the last sync failed: {sync.error.text}"
    if not sync.in_time:
        yield f"{sync.pending} Services wait too long for being programmed"
    if refused:
        yield f"the kernel refuses {refused} ServicePort{'s' if refused > 1 else ''}"
    for kind, error in source.not_watched.items():
        yield f"{kind} is not watched: {error}"
    if record.drifts and record.drifts[-1].repaired is None:
        yield "what somebody changed in the kernel is not put back yet"


def _counted(
    status: AgentStatus, rows: tuple[ServicePort, ...], problems: tuple[tuple[Problem, ...], ...], config: AgentConfig
) -> AgentStatus:
    """The status with everything. In a thread."""
    backends: Counter[tuple[str, str]] = Counter()
    frontends: Counter[tuple[str, str]] = Counter()
    for row in rows:
        service = row.key.name[:2]
        backends[service] += len(row.all_backends)
        frontends[service] += len(row.frontends)
    flat = [problem for of_service in problems for problem in of_service]
    return replace(
        status,
        counts=replace(
            status.counts,
            service_ports=len(rows),
            frontends=frontends.total(),
            backends=backends.total(),
            virtual_servers=_virtual_servers() if status.mode is Mode.IPVS and status.sync.first_done else None,
        ),
        problems=Problems(len(flat), tuple(str(problem) for problem in flat[:_FIRST])),
        most_backends=_largest(backends),
        most_frontends=_largest(frontends),
        other_proxies=tuple(str(one) for one in kube_proxies((config.healthz_bind_address, config.metrics_bind_address))),
    )


def _largest(counts: Counter[tuple[str, str]]) -> tuple[Size, ...]:
    return tuple(Size("/".join(name), count) for name, count in counts.most_common(_LARGEST) if count)


def _virtual_servers() -> int | None:
    try:
        with IPVS() as ipvs:
            return len(ipvs.virtual_servers())
    except KernelError:
        return None


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()
