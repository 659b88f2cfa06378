"""Owns what the consumer has been told about one kind: only keys and versions, so that a relist delivers what differs."""

from __future__ import annotations

from nodeproxy.api.objects import Kind, ObjectKey
from nodeproxy.source.apiserver.wire import Gone, Present, Unreadable
from nodeproxy.source.events import Deleted, Event, ListComplete, Refused, Upserted


class Known:
    """Turns what the API server sends into events, leaving out what the consumer knows already."""

    def __init__(self, kind: Kind, origin: str) -> None:
        self._kind = kind
        self._origin = origin
        self._versions: dict[ObjectKey, str | None] = {}  # as delivered
        self._refused: dict[ObjectKey, str | None] = {}  # versions that could not be read
        self._listed: set[ObjectKey] | None = None  # while a list comes in: what it held so far
        self._complete = False

    @property
    def listing(self) -> bool:
        """Whether a list has begun and not ended."""
        return self._listed is not None

    def begin_list(self) -> None:
        """A list begins, perhaps anew: what it does not hold at its end is gone."""
        self._listed = set()

    def end_list(self) -> tuple[int, list[Event]]:
        """The list is complete. Returns how many objects it held, and the events."""
        listed, self._listed = self._listed or set(), None
        gone = [key for key in self._versions if key not in listed]
        for key in gone:
            del self._versions[key]
        self._refused = {key: version for key, version in self._refused.items() if key in listed}
        events: list[Event] = [Deleted(key) for key in gone]
        if not self._complete:
            self._complete = True
            events.append(ListComplete(self._kind))
        return len(listed), events

    def present(self, item: Present) -> Event | None:
        """An object as it is now."""
        key, version = item.key, item.version
        if self._listed is not None:
            self._listed.add(key)
        if version is not None and self._versions.get(key) == version:
            return None
        self._refused.pop(key, None)
        self._versions[key] = version
        return Upserted(item.object)

    def gone(self, item: Gone) -> Event | None:
        """An object that is no longer there."""
        if self._listed is not None:
            self._listed.discard(item.key)
        self._refused.pop(item.key, None)
        if item.key not in self._versions:
            return None
        del self._versions[item.key]
        return Deleted(item.key)

    def unreadable(self, item: Unreadable) -> Event | None:
        """Something that cannot be read: what was known of it stays."""
        key = item.key
        if key is None:
            return Refused(None, item.reason, self._origin)
        if self._listed is not None:
            self._listed.add(key)
        if item.version is not None and self._refused.get(key) == item.version:
            return None
        self._refused[key] = item.version
        return Refused(key, item.reason, self._origin)
