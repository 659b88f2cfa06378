"""Owns the events that every source delivers, and the interface of a source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from msgspec import Struct

from nodeproxy.api.objects import ApiObject, Kind, ObjectKey


class Upserted(Struct, frozen=True):
    """An object appeared or changed."""

    object: ApiObject


class Deleted(Struct, frozen=True):
    """An object is gone."""

    key: ObjectKey


class Refused(Struct, frozen=True):
    """Something could not be read. What was known of it before stays in force.

    `key` is None where not even the identity could be read. `reason` names the field (`spec.ports[0].port: ...`).
    `origin` is the file (and document) or the request it came from.
    """

    key: ObjectKey | None
    reason: str
    origin: str


class ListComplete(Struct, frozen=True):
    """The first complete list of a kind has been delivered. Sent once for each kind."""

    kind: Kind


Event = Upserted | Deleted | Refused | ListComplete

Deliver = Callable[[Sequence[Event]], None]


class SourceError(Exception):
    """A source cannot go on by itself, for instance for want of credentials. What it delivered stays valid."""


class Source(Protocol):
    """Delivers cluster state as events."""

    async def run(self, deliver: Deliver) -> None:
        """Deliver events in batches until cancelled. `deliver` is called on the event loop and returns at once."""
