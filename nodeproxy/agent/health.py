"""Owns the judgement whether the agent keeps up: SPEC section 4, KEP-3836. It observes and never steers."""

from __future__ import annotations

import time
from collections.abc import Callable

from msgspec import UNSET, Struct, UnsetType


class HealthStatus(Struct, frozen=True, rename="camel"):
    """Body of /healthz and /livez: RFC 3339 timestamps in UTC, empty where never updated. /livez leaves the Node out."""

    last_updated: str
    current_time: str
    healthy: bool
    node_eligible: bool | UnsetType = UNSET


class Health:
    """Tracks whether every wanted change was programmed in time: within twice the sync period (in seconds)."""

    def __init__(self, sync_period: float, now: Callable[[], float] = time.time) -> None:
        self._sync_period = sync_period
        self._now = now
        self._oldest_pending: float | None = now()
        self._updated: float | None = None
        self.node_eligible = True

    def change_sync_period(self, seconds: float) -> None:
        """Allow twice so many seconds from now on, also for what is waiting already."""
        self._sync_period = seconds

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
        """No change has been waiting too long. True while starting: a restart would not help against a slow API server.

        This is what health-check node ports call a healthy service proxy: as in kube-proxy 1.36, a Node that is about to go
        answers for its endpoints until they are gone.
        """
        if self._updated is None:
            return True
        return self._oldest_pending is None or self._now() - self._oldest_pending < 2 * self._sync_period

    @property
    def healthy(self) -> bool:
        """Alive, the first sync is done, and the Node is not going away."""
        return self.alive and self._updated is not None and self.node_eligible

    def status(self, *, of_node: bool = True) -> HealthStatus:
        """What /healthz says, or, without the Node, /livez.

        As kube-proxy has it for the sake of old readers, `lastUpdated` is the present time wherever all is well.
        """
        good = self.healthy if of_node else self.alive
        now = self._now()
        return HealthStatus(
            last_updated=_rfc3339(now if good else self._updated),
            current_time=_rfc3339(now),
            healthy=self.alive and (self._updated is not None or not of_node),
            node_eligible=self.node_eligible if of_node else UNSET,
        )


def _rfc3339(timestamp: float | None) -> str:
    return "" if timestamp is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(timestamp))
