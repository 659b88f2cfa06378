"""Owns looking at a manifest directory: which files changed, whether they can be believed yet, and what that changes."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Collection
from pathlib import Path

import structlog
from msgspec import Struct

from nodeproxy.api.objects import Kind
from nodeproxy.source.decoding import Selection
from nodeproxy.source.events import Event, ListComplete, Refused
from nodeproxy.source.manifests.file import FileContent, Stamp, parse_file, read_bytes, stamp_of
from nodeproxy.source.manifests.index import ManifestIndex

SUFFIXES = (".yaml", ".yml", ".json")
SETTLE_SECONDS = 0.1  # how long a file that is written in place must be quiet before a loss in it is believed

_log = structlog.get_logger(__name__)


class ScanResult(Struct):
    """What a scan found. `unsettled`: a file seems to be in the middle of being written; scan again in SETTLE_SECONDS."""

    events: list[Event]
    unsettled: bool = False


class ManifestScanner:
    """All state of a manifest directory. Blocking; one scan at a time, from any thread."""

    def __init__(self, directory: Path, selection: Selection) -> None:
        self._directory = directory
        self._selection = selection
        self._index = ManifestIndex(directory)
        self._stamps: dict[str, Stamp] = {}
        self._unreadable: dict[str, str] = {}  # file -> error already reported
        self._directory_error: str | None = None
        self._listed = False
        self._stop = threading.Event()

    def stop(self) -> None:
        """Make a running scan end soon with `Stopped`. No scan works afterwards."""
        self._stop.set()

    def scan(self, names: Collection[str] | None = None, *, settled: bool = False) -> ScanResult:
        """Read what changed; only among these file names if given and the directory was already read once.

        `settled`: take every file as it is now, even if it may be in the middle of being written.
        Raises `Stopped` after `stop()`.
        """
        try:
            present = self._list() if names is None or not self._listed else self._status_of(names)
        except OSError as error:
            return ScanResult(self._directory_refused(error))
        self._directory_error = None
        changed: dict[str, FileContent | None] = {}
        result = ScanResult([])
        for name, status in present.items():
            if status is None:
                if self._stamps.pop(name, None) is not None or name in self._unreadable:
                    self._unreadable.pop(name, None)
                    changed[name] = None
                continue
            if self._stamps.get(name) == stamp_of(status):
                continue
            content = self._read(name, settled, result)
            if content is not None:
                changed[name] = content
        result.events.extend(self._index.replace(changed))
        if not self._listed and not result.unsettled:
            self._listed = True
            result.events.extend(ListComplete(kind) for kind in Kind)
        return result

    def _list(self) -> dict[str, os.stat_result | None]:
        """Status of every manifest file by name, sorted; None for files known before and now gone."""
        found: dict[str, os.stat_result | None] = {}
        with os.scandir(self._directory) as entries:
            names = sorted(entry.name for entry in entries if is_manifest(entry.name))
        for name in names:
            found.update(self._status_of([name]))
        gone = (self._stamps.keys() | self._unreadable.keys()) - found.keys()
        return {**found, **dict.fromkeys(gone)}

    def _status_of(self, names: Collection[str]) -> dict[str, os.stat_result | None]:
        found: dict[str, os.stat_result | None] = {}
        for name in sorted(names):
            try:
                status = (self._directory / name).stat()
            except FileNotFoundError:
                found[name] = None
                # Either the file is gone or the whole directory; the latter keeps all state.
                self._directory.stat()
                continue
            except OSError:
                status = (self._directory / name).lstat()  # reading it will tell why
            if not stat.S_ISDIR(status.st_mode):
                found[name] = status
        return found

    def _read(self, name: str, settled: bool, result: ScanResult) -> FileContent | None:
        """Content of a changed file; None if it cannot be read or believed now."""
        path = self._directory / name
        now = time.time()
        try:
            stamp, text = read_bytes(path)
        except FileNotFoundError:
            return None  # gone since it was listed: the next scan sees it
        except OSError as error:
            reason = error.strerror or str(error)
            if self._unreadable.get(name) != reason:
                self._unreadable[name] = reason
                result.events.append(Refused(None, reason, str(path)))
            return None
        content = parse_file(path, text, self._selection, self._stop.is_set)
        if not settled and self._may_be_half_written(name, stamp, content, now):
            result.unsettled = True
            return None
        self._unreadable.pop(name, None)
        self._stamps[name] = stamp
        result.events.extend(content.problems)
        if content.ignored:
            _log.debug("manifest holds objects of kinds that are not watched", file=str(path), count=content.ignored)
        return content

    def _may_be_half_written(self, name: str, stamp: Stamp, content: FileContent, now: float) -> bool:
        """Whether what was read may be a file in the middle of being written in place, with its end missing.

        Only a loss is doubted (objects gone, a file shorter than before, something unreadable), so that ordinary changes
        and files moved into place (a new inode) are taken at once.
        """
        if not 0 <= now - stamp.mtime_ns / 1e9 < SETTLE_SECONDS:
            return False
        if content.problems:
            return True
        old = self._stamps.get(name)
        in_place = old is not None and (old.inode, old.device) == (stamp.inode, stamp.device)
        return in_place and old is not None and (stamp.size < old.size or self._index.would_drop(name, content))

    def _directory_refused(self, error: OSError) -> list[Event]:
        reason = f"manifest directory cannot be read: {error.strerror or error}; what was known of it stays in force"
        if reason == self._directory_error:
            return []
        self._directory_error = reason
        return [Refused(None, reason, str(self._directory))]


def is_manifest(name: str) -> bool:
    """Whether a file of this name is read: by its suffix, and not hidden (editors keep their own files so)."""
    return name.endswith(SUFFIXES) and not name.startswith(".")
