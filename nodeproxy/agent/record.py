"""Owns what an agent remembers of its own doing, for those who ask: the last sync, audits, the source, the last errors.

Told by the sync loop, the source and the agent; it observes and never steers. What it holds is bounded.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from msgspec.structs import replace

from nodeproxy.agent.status import Drift, LastSync, Trouble, rfc3339
from nodeproxy.api.objects import Kind
from nodeproxy.forwarding.table import Family
from nodeproxy.programmer.base import RuleCount

_TROUBLES: Final = 50
_DRIFTS: Final = 10
_DIFFERENCES: Final = 20


class Record:
    """What happened so far. `now`: the clock, Unix seconds."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self.started = now()
        self.last_sync: LastSync | None = None
        self.sync_error: Trouble | None = None  # of the last sync, if it failed
        self.retry_at: float | None = None
        self.last_event: float | None = None
        self.watched: dict[Kind, str | None] = {}  # by kind: why it is not watched now; None: it is
        self.audits = 0
        self.last_audit: float | None = None
        self.rules: dict[Family, Mapping[str, RuleCount]] = {}
        self.waiting_for: str | None = None
        self._troubles: deque[Trouble] = deque(maxlen=_TROUBLES)
        self._drifts: deque[Drift] = deque(maxlen=_DRIFTS)

    @property
    def troubles(self) -> tuple[Trouble, ...]:
        """The last errors, oldest first."""
        return tuple(self._troubles)

    @property
    def drifts(self) -> tuple[Drift, ...]:
        """The last times that something else was found in the kernel than what was programmed, oldest first."""
        return tuple(self._drifts)

    def trouble(self, where: str, text: str) -> Trouble:
        """Something failed in one part of the agent. The same again is counted. In any thread."""
        now = rfc3339(self._now())
        last = self._troubles[-1] if self._troubles else None
        if last is not None and (last.where, last.text) == (where, text):
            made = replace(last, at=now, times=last.times + 1)
            self._troubles[-1] = made
        else:
            made = Trouble(at=now, where=where, text=text)
            self._troubles.append(made)
        return made

    def synced(self, seconds: float, full: bool, rows: int) -> None:
        """A sync of so many rows worked."""
        now = self._now()
        self.last_sync = LastSync(at=rfc3339(now), seconds=seconds, full=full, rows=rows)
        self.sync_error = self.retry_at = None
        for number, drift in enumerate(self._drifts):
            if drift.repaired is None:
                self._drifts[number] = replace(drift, repaired=rfc3339(now))

    def sync_failed(self, error: str, retry_seconds: float) -> None:
        """A sync failed, and is tried again after so many seconds."""
        self.sync_error = self.trouble("sync", error)
        self.retry_at = self._now() + retry_seconds

    def audited(self, differs: Sequence[str]) -> None:
        """The kernel was compared with what was programmed."""
        self.audits += 1
        self.last_audit = self._now()
        if differs:
            more = [f"and {len(differs) - _DIFFERENCES} more"] if len(differs) > _DIFFERENCES else []
            self._drifts.append(Drift(found=rfc3339(self.last_audit), differs=(*differs[:_DIFFERENCES], *more)))

    def delivered(self) -> None:
        """The source told something."""
        self.last_event = self._now()

    # What follows makes it an observer of the API server's reflectors (`source.apiserver.observer`).

    def listed(self, kind: Kind, objects: int, seconds: float) -> None:
        """A complete list came."""
        self.delivered()

    def watch_started(self, kind: Kind) -> None:
        """The kind is watched from now on."""
        self.watched[kind] = None

    def watch_ended(self, kind: Kind, error: str | None) -> None:
        """A watch ended; where its time was up, the next one follows at once."""
        if error is not None:
            self.request_failed(kind, error)

    def request_failed(self, kind: Kind, error: str) -> None:
        """The API server does not answer, or refuses."""
        self.watched[kind] = error
        self.trouble("source", f"{kind}: {error}")

    def refused(self, kind: Kind) -> None:
        """What it was is told with the event itself."""
