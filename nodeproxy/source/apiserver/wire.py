"""Owns the API's list and watch requests and the decoding of their answers: raw lines to typed items."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Struct, field

from nodeproxy.api.objects import ApiObject, Kind, ObjectKey
from nodeproxy.source.apiserver.connection import Cancel, Connection, RequestError, StatusError
from nodeproxy.source.decoding import DECODE_ERRORS, Head, Selection, explain, identify, read_json, read_object

PAGE_SIZE = 500
_PAGE_READ_SECONDS = 60.0
_WATCH_SLACK_SECONDS = 30.0  # beyond the time after which the server ends a watch by itself
_MAX_LINE_BYTES = 64 * 1024 * 1024
_LIST_ENDS = "k8s.io/initial-events-end"  # annotation of the bookmark after the initial events (KEP-3157)

_PATHS = {
    Kind.SERVICE: "/api/v1/services",
    Kind.ENDPOINT_SLICE: "/apis/discovery.k8s.io/v1/endpointslices",
    Kind.NODE: "/api/v1/nodes",
}


class Resource(Struct, frozen=True):
    """What is listed and watched: a kind, and selectors that the server applies."""

    kind: Kind
    selection: Selection

    @property
    def path(self) -> str:
        """The collection, over all namespaces."""
        return _PATHS[self.kind]

    def query(self) -> dict[str, str]:
        """The selectors."""
        if self.kind is Kind.NODE:
            return {"fieldSelector": f"metadata.name={self.selection.node_name}"}
        return {"labelSelector": self.selection.label_selector()}


class Opened(Struct, frozen=True):
    """The server agreed to the request."""


class Restarted(Struct, frozen=True):
    """The list begins again: what was listed so far may be gone."""


class Present(Struct, frozen=True):
    """An object as it is now."""

    key: ObjectKey
    version: str | None
    object: ApiObject


class Gone(Struct, frozen=True):
    """An object that was deleted or is selected no longer."""

    key: ObjectKey
    version: str | None


class Unreadable(Struct, frozen=True):
    """Something that cannot be read."""

    key: ObjectKey | None
    version: str | None
    reason: str


class Bookmark(Struct, frozen=True):
    """All up to this version has been sent; `ends_list`: this was the last of the initial objects."""

    version: str
    ends_list: bool = False


Item = Opened | Restarted | Present | Gone | Unreadable | Bookmark


class Line(Struct):
    """One line of a watch: ADDED, MODIFIED, DELETED, BOOKMARK or ERROR, and the object."""

    type: str
    object: msgspec.Raw


class _BookmarkMeta(Struct):
    resource_version: str = field(name="resourceVersion")
    annotations: dict[str, str] | None = None


class _BookmarkObject(Struct):
    metadata: _BookmarkMeta


class _StatusDetails(Struct):
    retry_after: float | None = field(default=None, name="retryAfterSeconds")


class _Status(Struct):
    code: int = 500
    message: str = "no reason given"
    details: _StatusDetails | None = None


class _ListMeta(Struct):
    resource_version: str = field(name="resourceVersion")
    continue_: str | None = field(default=None, name="continue")


class _ListPage(Struct):
    metadata: _ListMeta
    items: list[msgspec.Raw] | None = None


class _VersionOnly(Struct):
    metadata: Any = None


def watch(
    connection: Connection, resource: Resource, cancel: Cancel, *, version: str | None, seconds: int
) -> Iterator[Item]:
    """Watch from a version for as long as the server allows, at most `seconds`.

    Without a version the server first sends all objects and a bookmark that ends the list. Raises RequestError.
    """
    query = {**resource.query(), "watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(seconds)}
    if version is None:
        query |= {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
    else:
        query["resourceVersion"] = version
    pieces = connection.read(resource.path, query, cancel, seconds + _WATCH_SLACK_SECONDS)
    next(pieces)
    yield Opened()
    for line in lines_of(pieces):
        yield decode_line(resource.kind, line)


def list_all(connection: Connection, resource: Resource, cancel: Cancel, *, page_size: int = PAGE_SIZE) -> Iterator[Item]:
    """List all objects in pages, then say by a bookmark that and at which version the list is complete.

    A continuation that the server no longer knows (410: reading took too long) leads to `Restarted` and one request for all
    at once, which cannot expire. Raises RequestError.
    """
    query = {**resource.query(), "limit": str(page_size)}
    opened = False
    while True:
        try:
            page = _read_page(connection, resource, query, cancel)
        except StatusError as error:
            if error.status != 410 or "continue" not in query:
                raise
            query = resource.query()
            yield Restarted()
            continue
        if not opened:
            opened = True
            yield Opened()
        for raw in page.items or ():
            yield _present(resource.kind, raw)
        if not page.metadata.continue_:
            yield Bookmark(page.metadata.resource_version, ends_list=True)
            return
        query["continue"] = page.metadata.continue_


def _read_page(connection: Connection, resource: Resource, query: dict[str, str], cancel: Cancel) -> _ListPage:
    body = b"".join(connection.read(resource.path, query, cancel, _PAGE_READ_SECONDS))
    try:
        return read_json(body, _ListPage)
    except DECODE_ERRORS as error:
        raise RequestError(f"the list cannot be read: {explain(error)}") from error


def lines_of(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Whole lines; what is left without an end when the stream ends is dropped: the watch goes on before it."""
    rest: list[bytes] = []
    size = 0
    for piece in pieces:
        *whole, last = piece.split(b"\n")
        if whole:
            whole[0] = b"".join((*rest, whole[0]))
            rest, size = [], 0
            yield from filter(None, whole)
        if last:
            rest.append(last)
            size += len(last)
            if size > _MAX_LINE_BYTES:
                raise RequestError(f"a line of more than {_MAX_LINE_BYTES} bytes")


def decode_line(kind: Kind, line: bytes) -> Item:
    """One line of a watch. An ERROR event is raised as StatusError."""
    try:
        event = read_json(line, Line)
        match event.type:
            case "ADDED" | "MODIFIED":
                return _present(kind, event.object)
            case "DELETED":
                return _gone(kind, event.object)
            case "BOOKMARK":
                metadata = read_json(event.object, _BookmarkObject).metadata
                return Bookmark(metadata.resource_version, (metadata.annotations or {}).get(_LIST_ENDS) == "true")
            case "ERROR":
                raise status_error(event)
            case other:
                return Unreadable(None, None, f"type: unknown event type {other!r}")
    except DECODE_ERRORS as error:
        return Unreadable(None, None, explain(error))


def status_error(event: Line) -> StatusError:
    """What an ERROR event says. Raises one of DECODE_ERRORS."""
    status = read_json(event.object, _Status)
    return StatusError(status.code, status.message, status.details.retry_after if status.details else None)


def _present(kind: Kind, raw: msgspec.Raw) -> Present | Unreadable:
    try:
        api_object = read_object(kind, raw, read_json)
    except DECODE_ERRORS as error:
        return Unreadable(identify(kind, raw, read_json), _version(raw), explain(error))
    return Present(api_object.key, api_object.metadata.resource_version, api_object)


def _gone(kind: Kind, raw: msgspec.Raw) -> Gone | Unreadable:
    try:
        head = read_json(raw, Head)
        return Gone(head.key(kind), head.metadata.resource_version)
    except DECODE_ERRORS as error:
        key = identify(kind, raw, read_json)
        return Gone(key, _version(raw)) if key else Unreadable(None, _version(raw), explain(error))


def _version(raw: msgspec.Raw) -> str | None:
    """The resource version of an object that cannot be read whole, if that much can."""
    try:
        metadata = read_json(raw, _VersionOnly).metadata
    except DECODE_ERRORS:
        return None
    version = metadata.get("resourceVersion") if isinstance(metadata, dict) else None
    return version if isinstance(version, str) else None
