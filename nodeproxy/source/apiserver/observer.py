"""Owns what may be counted about the reflectors."""

from __future__ import annotations

from typing import Protocol

from nodeproxy.api.objects import Kind


class Observer(Protocol):
    """Told what the reflectors do, on the event loop. It reads, it never steers."""

    def listed(self, kind: Kind, objects: int, seconds: float) -> None:
        """A complete list of so many objects arrived, in this time since it was asked for."""

    def watch_started(self, kind: Kind) -> None:
        """A watch was opened (also one that begins with the initial list)."""

    def watch_ended(self, kind: Kind, error: str | None) -> None:
        """A watch ended: because its time was up (None), or of an error."""

    def request_failed(self, kind: Kind, error: str) -> None:
        """The server could not be reached or refused; it is tried again later."""

    def refused(self, kind: Kind) -> None:
        """An object could not be read."""


class NoObserver:
    """Counts nothing."""

    def listed(self, kind: Kind, objects: int, seconds: float) -> None:
        """Ignored."""

    def watch_started(self, kind: Kind) -> None:
        """Ignored."""

    def watch_ended(self, kind: Kind, error: str | None) -> None:
        """Ignored."""

    def request_failed(self, kind: Kind, error: str) -> None:
        """Ignored."""

    def refused(self, kind: Kind) -> None:
        """Ignored."""
