"""Owns the manifest source: a directory of YAML and JSON files watched as if it were an API server.

For edge nodes without an API server, the demo, tests and `compare`. The directory is read once, then whenever inotify (or
polling) says that something in it changed; only files that changed are read again and only objects that differ are
delivered. A file, document or object that cannot be read is delivered as `Refused` and what was known of it stays in force.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from pathlib import Path

import structlog

from nodeproxy.source.decoding import Selection
from nodeproxy.source.events import Deliver
from nodeproxy.source.manifests.inotify import DirectoryWatch
from nodeproxy.source.manifests.scan import SETTLE_SECONDS, ManifestScanner, ScanResult, is_manifest
from nodeproxy.source.manifests.yaml_documents import Stopped

_QUIET_SECONDS = 0.002  # a change is delivered once nothing more came for so long: writing and renaming count as one
_BURST_SECONDS = 0.1  # at most this long is a burst of changes gathered
_IDENTITY_SECONDS = 1.0  # how often the identity of the directory is checked: a replaced directory sends no notifications
_FULL_SCAN_SECONDS = 30.0  # all files are looked at this often, for what inotify does not see (targets of symbolic links)
_RETRY_SECONDS = 0.5  # how often a missing directory is looked for
_MAX_UNSETTLED_SCANS = 10  # a file that is never quiet is taken as it is after about a second

_log = structlog.get_logger(__name__)

Hint = Collection[str] | None  # names of changed files, None: look at all


class ManifestSource:
    """Delivers the objects of a directory of manifests."""

    def __init__(
        self,
        directory: Path | str,
        node_name: str,
        service_proxy_name: str | None = None,
        *,
        poll_seconds: float | None = None,
    ) -> None:
        """`poll_seconds`: look at all files this often instead of using inotify, for file systems that do not support it."""
        self._directory = Path(directory)
        self._selection = Selection(node_name, service_proxy_name)
        self._poll_seconds = poll_seconds

    async def run(self, deliver: Deliver) -> None:
        """Deliver events in batches until cancelled. Starts anew, with all objects, each time it is called."""
        scanner = ManifestScanner(self._directory, self._selection)
        hints = self._poll() if self._poll_seconds is not None else self._watch()
        try:
            async with aclosing(hints):
                async for hint in hints:
                    await self._scan(scanner, hint, deliver)
        finally:
            scanner.stop()

    async def _scan(self, scanner: ManifestScanner, hint: Hint, deliver: Deliver) -> None:
        for attempt in range(_MAX_UNSETTLED_SCANS + 1):
            result = await self._scan_in_thread(scanner, hint, settled=attempt == _MAX_UNSETTLED_SCANS)
            if result.events:
                deliver(result.events)
            if not result.unsettled:
                return
            await asyncio.sleep(SETTLE_SECONDS)
            hint = None  # others may have changed meanwhile

    @staticmethod
    async def _scan_in_thread(scanner: ManifestScanner, hint: Hint, *, settled: bool) -> ScanResult:
        """Cancelled, it tells the thread to end soon."""
        try:
            return await asyncio.to_thread(scanner.scan, hint, settled=settled)
        except Stopped:
            return ScanResult([])
        except asyncio.CancelledError:
            scanner.stop()
            raise

    async def _poll(self) -> AsyncGenerator[Hint, None]:
        while True:
            yield None
            await asyncio.sleep(self._poll_seconds or 0)

    async def _watch(self) -> AsyncGenerator[Hint, None]:
        """Say when to look, for ever: at once, then at each change; while nothing can be watched, at short intervals."""
        said: str | None = None
        while True:
            identity = _identity(self._directory)
            try:
                with DirectoryWatch(self._directory) as watch:
                    said = None
                    async with aclosing(self._changes(watch, identity)) as changes:
                        async for hint in changes:
                            yield hint
            except OSError as error:
                # That it is missing is said by the scan. Else: no inotify watches are left, or no permission.
                if not isinstance(error, FileNotFoundError) and str(error) != said:
                    said = str(error)
                    _log.warning("cannot watch directory, polling it", directory=str(self._directory), error=said)
                yield None
                await asyncio.sleep(_RETRY_SECONDS)

    async def _changes(self, watch: DirectoryWatch, identity: tuple[int, int] | None) -> AsyncGenerator[Hint, None]:
        """Say when to look, for as long as the path leads to the same directory: first at all, then at what changes."""
        loop = asyncio.get_running_loop()
        next_full_scan = loop.time()
        names: set[str] = set()
        while True:
            # A change of anything but a manifest may change them all: ConfigMap volumes switch a symbolic link.
            full = not all(is_manifest(name) for name in names) or loop.time() >= next_full_scan
            if full:
                next_full_scan = loop.time() + _FULL_SCAN_SECONDS
            if names or full:
                yield None if full else names
            if watch.ended or _identity(self._directory) != identity:
                return
            names = await _gather(watch)


async def _gather(watch: DirectoryWatch) -> set[str]:
    """The names of one burst of changes; none if nothing changes until the identity of the directory is due."""
    names: set[str] = set()
    if await watch.wait(_IDENTITY_SECONDS):
        names = watch.take()
        end = asyncio.get_running_loop().time() + _BURST_SECONDS
        while asyncio.get_running_loop().time() < end:
            await asyncio.sleep(_QUIET_SECONDS)
            if not (more := watch.take()):
                break
            names |= more
    return names


def _identity(directory: Path) -> tuple[int, int] | None:
    try:
        status = directory.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
