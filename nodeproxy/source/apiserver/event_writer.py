"""Owns Events of events.k8s.io/v1 as they are written to the API server.

Sources: events.k8s.io/v1 in the API reference; KEP-383; for the limits, ValidateEventCreate of the API server.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from nodeproxy.source.apiserver.connection import Cancel, Connection, StatusError
from nodeproxy.source.apiserver.credentials import CredentialsError

MAX_NOTE_BYTES = 1024
MAX_INSTANCE_BYTES = 128

_COLLECTIONS = {"Service": "/api/v1/namespaces/{}/services", "Node": "/api/v1/nodes"}
_ONLY_METADATA = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
_MERGE_PATCH = "application/merge-patch+json"


class _Event(Struct, frozen=True, rename="camel", omit_defaults=True):
    """Base of what is written: camelCase, nothing that is not set."""


class ObjectReference(_Event, frozen=True):
    """The object that an Event is about: a Service, or (without namespace) a Node."""

    api_version: str
    kind: str
    name: str
    namespace: str = ""
    uid: str = ""


class EventSeries(_Event, frozen=True):
    """The same thing happened `count` times (at least twice), last at this RFC 3339 time with microseconds."""

    count: int
    last_observed_time: str


class EventMetadata(_Event, frozen=True):
    """metadata of an Event."""

    name: str
    namespace: str


class Event(_Event, frozen=True):
    """One Event. `type` is Normal or Warning. `event_time`: RFC 3339 with microseconds. `note`: MAX_NOTE_BYTES at most."""

    metadata: EventMetadata
    event_time: str
    reporting_controller: str
    reporting_instance: str
    action: str
    reason: str
    regarding: ObjectReference
    note: str
    type: str
    series: EventSeries | None = None


class _Metadata(Struct):
    uid: str = ""


class _Item(Struct):
    metadata: _Metadata


class _List(Struct):
    items: list[_Item] = []


class EventWriter:
    """Writes Events. Blocking; for one thread at a time. All methods raise RequestError or CredentialsError.

    Credentials are read for the first request, and again after they were refused.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._connected = False

    def uid(self, reference: ObjectReference, cancel: Cancel) -> str:
        """The UID of an object, by which `kubectl describe` finds its Events; empty where the object is not there.

        Asked for as a list, because that is what the agent may do with these kinds anyway.
        """
        path = _COLLECTIONS[reference.kind].format(reference.namespace)
        query = {"fieldSelector": f"metadata.name={reference.name}"}
        answer = self._send("GET", path, cancel, query=query, accept=_ONLY_METADATA)
        try:
            items = msgspec.json.decode(answer, type=_List).items
        except msgspec.DecodeError:
            return ""
        return items[0].metadata.uid if items else ""

    def create(self, event: Event, cancel: Cancel) -> None:
        """Write a new Event. StatusError 409: there is one of that name."""
        self._send("POST", _path(event.metadata), cancel, body=msgspec.json.encode(event))

    def continue_series(self, metadata: EventMetadata, series: EventSeries, cancel: Cancel) -> None:
        """Write how often an Event came until now. StatusError 404: it is no longer kept."""
        body = msgspec.json.encode({"series": series})
        self._send("PATCH", f"{_path(metadata)}/{metadata.name}", cancel, body=body, content_type=_MERGE_PATCH)

    def _send(
        self,
        method: str,
        path: str,
        cancel: Cancel,
        *,
        query: dict[str, str] | None = None,
        body: bytes | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> bytes:
        try:
            if not self._connected:
                self._connection.connect()
                self._connected = True
            return self._connection.send(
                method, path, cancel, query=query, body=body, content_type=content_type, accept=accept
            )
        except CredentialsError:
            self._connected = False
            raise
        except StatusError as error:
            self._connected = error.status != 401
            raise


def _path(metadata: EventMetadata) -> str:
    return f"/apis/events.k8s.io/v1/namespaces/{metadata.namespace}/events"
