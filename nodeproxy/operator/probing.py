"""Owns the interface of live probes: what observes and what acts know no more of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from nodeproxy.operator.api import ProxyRollout
from nodeproxy.operator.world import ProbesSeen, StartProbes


class Prober(Protocol):
    """Runs probes. All methods may raise `RequestError`; they are called again then."""

    async def look(self) -> Mapping[str, ProbesSeen]:
        """All probes that were started and not ended, by verification."""

    async def start(self, request: StartProbes, rollout: ProxyRollout) -> None:
        """Begin; again has no effect."""

    async def end(self, verification: str) -> None:
        """Remove what is left of them."""
