"""Owns the judgement whether the agent keeps up: SPEC section 4, KEP-3836. It observes and never steers."""

from __future__ import annotations

import time
from collections.abc import Callable

from msgspec import Struct


class HealthStatus(Struct, frozen=True, rename="camel"):
    """Body of /healthz and /livez: RFC 3339 timestamps in UTC, empty where never updated."""

    last_updated: str
    current_time: str
    node_eligible: bool


class Health:
    """Tracks whether every wanted change was programmed in time: within twice the sync period."""

    def __init__(self, sync_period: float, now: Callable[[], float] = time.time) -> None:
        self._timeout = 2 * sync_period
        self._now = now
        self._oldest_pending: float | None = now()
        self._updated: float | None = None
        self.node_eligible = True

    def queued(self) -> None:
        """A change is wanted that is not programmed yet."""
        if self._oldest_pending is None:
            self._oldest_pending = self._now()

    def programmed(self) -> None:
        """Everything wanted so far is in the kernel."""
        self._oldest_pending = None
        self._updated = self._now()

    @property
    def alive(self) -> bool:
        """No change has been waiting too long. True while starting: a restart would not help against a slow API server."""
        if self._updated is None:
            return True
        return self._oldest_pending is None or self._now() - self._oldest_pending < self._timeout

    @property
    def healthy(self) -> bool:
        """Alive, the first sync is done, and the Node is not going away."""
        return self.alive and self._updated is not None and self.node_eligible

    def status(self) -> HealthStatus:
        """What /healthz and /livez say."""
        return HealthStatus(_rfc3339(self._updated), _rfc3339(self._now()), self.node_eligible)


def _rfc3339(timestamp: float | None) -> str:
    return "" if timestamp is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(timestamp))
