"""Owns the replay of delivered events: what a consumer would know, and the checks that nothing came twice or out of turn."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

from nodeproxy.api.objects import ApiObject, Kind, ObjectKey
from nodeproxy.source.events import Deleted, Event, ListComplete, Refused, Upserted


class Replay:
    """A consumer of events. Pass the instance as `deliver`."""

    def __init__(self) -> None:
        self.objects: dict[ObjectKey, ApiObject] = {}
        self.refused: list[Refused] = []
        self.complete: Counter[Kind] = Counter()
        self.events = 0
        self.upserts: Counter[ObjectKey] = Counter()
        self.deletes: Counter[ObjectKey] = Counter()
        self.redundant: list[Event] = []  # an upsert that changes nothing, a deletion of what is unknown
        self._changed = asyncio.Event()

    def __call__(self, events: Sequence[Event]) -> None:
        assert events, "an empty batch"
        for event in events:
            self.events += 1
            match event:
                case Upserted(obj):
                    if self.objects.get(obj.key) == obj:
                        self.redundant.append(event)
                    self.objects[obj.key] = obj
                    self.upserts[obj.key] += 1
                case Deleted(key):
                    if self.objects.pop(key, None) is None:
                        self.redundant.append(event)
                    self.deletes[key] += 1
                case ListComplete(kind):
                    self.complete[kind] += 1
                case Refused():
                    self.refused.append(event)
        self._changed.set()

    def names(self, kind: Kind = Kind.SERVICE) -> set[str]:
        """Names of the known objects of a kind."""
        return {key.name for key in self.objects if key.kind is kind}

    async def until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        """Wait until the condition holds after some delivery. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def synced(self, seconds: float = 10.0) -> None:
        """Wait for the first complete list of every kind."""
        await self.until(lambda: set(self.complete) == set(Kind), seconds)
