"""Owns requests of the operator to the API server: the blocking connection of `nodeproxy.source`, from asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import Any, Final, TypeVar
from urllib.parse import quote

import msgspec

from nodeproxy.api.proxy_node import ApiObjectBase, ObjectMeta
from nodeproxy.source.apiserver.connection import Cancel, Connection, RequestError, StatusError
from nodeproxy.source.apiserver.credentials import Credentials, CredentialsError

_T = TypeVar("_T")
_READ_SECONDS: Final = 30.0
_PAGE: Final = 500
_ONLY_METADATA: Final = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json"
MERGE_PATCH: Final = "application/merge-patch+json"


class _ListMeta(ApiObjectBase, frozen=True):
    continue_: str | None = msgspec.field(default=None, name="continue")


class _RawList(ApiObjectBase, frozen=True):
    metadata: _ListMeta = _ListMeta()
    items: list[msgspec.Raw] | None = None


class OnlyMeta(ApiObjectBase, frozen=True):
    """The metadata of any object."""

    metadata: ObjectMeta


class Cluster:
    """Requests to one API server. All methods raise `RequestError` or `CredentialsError`."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._connection = Connection(credentials)
        self._connected = False
        self._lock = threading.Lock()

    @property
    def credentials(self) -> Credentials:
        """How the API server is found."""
        return self._credentials

    async def get(self, path: str) -> bytes | None:
        """An object, or None where there is none of that name."""
        try:
            return await asyncio.to_thread(self._read, path, {})
        except StatusError as error:
            if error.status == 404:
                return None
            raise

    async def get_as(self, path: str, type: type[_T]) -> _T | None:
        """An object of a type. Raises `RequestError` where it is not of that form."""
        raw = await self.get(path)
        return None if raw is None else decode(raw, type)

    async def list_raw(self, path: str, query: Mapping[str, str] | None = None) -> list[msgspec.Raw]:
        """All objects of a collection, page by page."""
        items: list[msgspec.Raw] = []
        token: str | None = None
        while True:
            asked = {**(query or {}), "limit": str(_PAGE)} | ({"continue": token} if token else {})
            page = decode(await asyncio.to_thread(self._read, path, asked), _RawList)
            items += page.items or []
            token = page.metadata.continue_
            if not token:
                return items

    async def list_as(self, path: str, type: type[_T], query: Mapping[str, str] | None = None) -> list[_T]:
        """All objects of a collection. One that is not of that form is left out."""
        found = []
        for raw in await self.list_raw(path, query):
            try:
                found.append(msgspec.json.decode(raw, type=type))
            except msgspec.DecodeError:
                continue
        return found

    async def send(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> ObjectMeta:
        """Make a change; `body` is encoded as JSON. Only the metadata of what came of it are read: objects may be large."""
        encoded = None if body is None else msgspec.json.encode(body)
        answer = await asyncio.to_thread(self._send, method, path, encoded, content_type)
        return decode(answer, OnlyMeta).metadata

    async def delete(self, path: str, *, uid: str | None = None, grace_seconds: int | None = None) -> None:
        """Delete an object, if it is there; only the one with this UID, where that is given."""
        options: dict[str, Any] = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if uid:
            options["preconditions"] = {"uid": uid}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        try:
            # The answer is not looked at: it is the object, or a Status, whose metadata have no name.
            await asyncio.to_thread(self._send, "DELETE", path, msgspec.json.encode(options), "application/json")
        except StatusError as error:
            if error.status not in (404, 409):
                raise

    def _read(self, path: str, query: Mapping[str, str]) -> bytes:
        return self._retrying(lambda: b"".join(self._connection.read(path, query, Cancel(), _READ_SECONDS)))

    def _send(self, method: str, path: str, body: bytes | None, content_type: str) -> bytes:
        return self._retrying(
            lambda: self._connection.send(
                method, path, Cancel(), body=body, content_type=content_type, accept=_ONLY_METADATA
            )
        )

    def _retrying(self, request: Any) -> bytes:
        """Credentials are read for the first request, and again when they were refused."""
        with self._lock:
            if not self._connected:
                self._connection.connect()
                self._connected = True
        try:
            answer: bytes = request()
        except (CredentialsError, StatusError) as error:
            if not isinstance(error, StatusError) or error.status == 401:
                self._connected = False
            raise
        return answer


def decode(raw: bytes | msgspec.Raw, type: type[_T]) -> _T:
    """Decode an answer. Raises `RequestError` where it is not of that form."""
    try:
        return msgspec.json.decode(raw, type=type)
    except msgspec.DecodeError as error:
        raise RequestError(f"the API server answered what is no {type.__name__}: {error}") from error


def name_of(name: str) -> str:
    """A name as part of a path."""
    return quote(name, safe="")
