"""Owns what is known from all manifest files together: which file speaks for an object, and what a changed file changes."""

from __future__ import annotations

from bisect import insort
from pathlib import Path

from nodeproxy.api.objects import ApiObject, ObjectKey
from nodeproxy.source.events import Deleted, Event, Refused, Upserted
from nodeproxy.source.manifests.file import FileContent


class ManifestIndex:
    """The objects of every file. Of an object in several files, the one in the first file by name holds."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, dict[ObjectKey, ApiObject]] = {}
        self._claims: dict[ObjectKey, list[str]] = {}  # sorted names of the files that hold the object
        self._reported: set[tuple[ObjectKey, str]] = set()  # object and file whose claim was refused

    def would_drop(self, file: str, content: FileContent) -> bool:
        """Whether `replace` with this content would take an object away from `file`."""
        old = self._files.get(file, {})
        return bool(old) and not old.keys() <= _with_last_good(old, content).keys()

    def replace(self, changed: dict[str, FileContent | None]) -> list[Event]:
        """Take the new content of these files (None: the file is gone). Returns only what differs, deletions last."""
        touched: dict[ObjectKey, None] = {}  # an ordered set: objects are delivered in the order of the files
        for file, content in changed.items():
            touched.update(dict.fromkeys(content.objects if content else ()))
            touched.update(dict.fromkeys(self._files.get(file, ())))
        before = {key: self._effective(key) for key in touched}
        for file, content in changed.items():
            self._store(file, _with_last_good(self._files.get(file, {}), content) if content else {})
        upserted: list[Event] = []
        deleted: list[Event] = []
        refused: list[Event] = []
        for key, old in before.items():
            new = self._effective(key)
            if new is None:
                if old is not None:
                    deleted.append(Deleted(key))
            elif new is not old and new != old:
                upserted.append(Upserted(new))
            refused.extend(self._new_conflicts(key))
        return upserted + deleted + refused

    def _effective(self, key: ObjectKey) -> ApiObject | None:
        claims = self._claims.get(key)
        return self._files[claims[0]][key] if claims else None

    def _store(self, file: str, objects: dict[ObjectKey, ApiObject]) -> None:
        for key in self._files.get(file, {}).keys() - objects.keys():
            claims = self._claims[key]
            claims.remove(file)
            self._reported.discard((key, file))
            if not claims:
                del self._claims[key]
        for key in objects.keys() - self._files.get(file, {}).keys():
            insort(self._claims.setdefault(key, []), file)
        self._files[file] = objects
        if not objects:
            del self._files[file]

    def _new_conflicts(self, key: ObjectKey) -> list[Refused]:
        claims = self._claims.get(key, [])
        refused: list[Refused] = []
        for rank, file in enumerate(claims):
            if rank == 0:
                self._reported.discard((key, file))
            elif (key, file) not in self._reported:
                self._reported.add((key, file))
                reason = f"also defined in {claims[0]}, which holds, as the first by name"
                refused.append(Refused(key, reason, str(self._directory / file)))
        return refused


def _with_last_good(old: dict[ObjectKey, ApiObject], content: FileContent) -> dict[ObjectKey, ApiObject]:
    """The new objects, and the old ones in place of those that could not be read.

    Where something has not even a name, it may have been any of the old objects that are missing: all of those stay.
    """
    kept = old if content.unidentified else {key: old[key] for key in content.refused_keys if key in old}
    return {**{key: value for key, value in kept.items() if key not in content.objects}, **content.objects}
