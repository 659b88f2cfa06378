"""Owns reading one manifest file: bytes to typed objects, and a `Refused` for each document or object that cannot be read.

YAML and JSON, several documents in a file, `kind: List` and the typed lists (`ServiceList`, ...). Kinds that are not
watched are passed over.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct, field

from nodeproxy.api.objects import ApiObject, Kind, ObjectKey
from nodeproxy.source.decoding import (
    DECODE_ERRORS,
    Head,
    Reader,
    Selection,
    explain,
    identify,
    read_builtins,
    read_json,
    read_object,
)
from nodeproxy.source.events import Refused
from nodeproxy.source.manifests.yaml_documents import Stopped, read_documents

MAX_FILE_BYTES = 64 * 1024 * 1024

_API_VERSION = {Kind.SERVICE: "v1", Kind.ENDPOINT_SLICE: "discovery.k8s.io/v1", Kind.NODE: "v1"}
_KINDS = {str(kind): kind for kind in Kind}
_LIST_KINDS: dict[str, Kind | None] = {"List": None, **{f"{kind}List": kind for kind in Kind}}
_UTF8_BOM = b"\xef\xbb\xbf"


class Stamp(NamedTuple):
    """What tells a changed file from an unchanged one without reading it."""

    mtime_ns: int
    ctime_ns: int
    size: int
    inode: int
    device: int


class FileContent(Struct):
    """What a file says.

    `refused_keys` are objects that could not be read; `unidentified` says that there are some without even a name. `ignored`
    counts objects of kinds that are not watched.
    """

    objects: dict[ObjectKey, ApiObject] = field(default_factory=dict)
    refused_keys: set[ObjectKey] = field(default_factory=set)
    unidentified: bool = False
    problems: list[Refused] = field(default_factory=list)
    ignored: int = 0


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp of a file from its status."""
    return Stamp(status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_dev)


def read_bytes(path: Path) -> tuple[Stamp, bytes]:
    """The content of a regular file. Raises OSError, also for other files and those larger than MAX_FILE_BYTES."""
    # Not blocking: a FIFO that somebody put there must not hold up the others.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is not a regular file")
        text = file.read(MAX_FILE_BYTES + 1) if status.st_size <= MAX_FILE_BYTES else b""
        if max(len(text), status.st_size) > MAX_FILE_BYTES:
            raise OSError(f"{path} is larger than {MAX_FILE_BYTES} bytes")
        return stamp_of(status), text


def parse_file(path: Path, text: bytes, selection: Selection, stop: Callable[[], bool] = lambda: False) -> FileContent:
    """Read the content of `path`. Bad content is told in `problems`, never raised. Raises `Stopped` when `stop` says so."""
    text = text.removeprefix(_UTF8_BOM)
    if path.suffix == ".json" or text.lstrip()[:1] == b"{":
        parser = _Parser(read_json, msgspec.Raw, selection)
        if parser.take_json(path, text, stop) or path.suffix == ".json":
            return parser.content
        # Flow style, or JSON documents separated by "---": YAML after all.
    parser = _Parser(read_builtins, Any, selection)
    for document in read_documents(text, stop):
        origin = f"{path}, document {document.number} (line {document.line})"
        if document.error is not None:
            parser.refuse(None, str(document.error), origin)
        else:
            parser.take_document(document.value, origin)
    return parser.content


def _concatenated(text: str) -> Iterator[bytes]:
    """Each of several JSON values in a text. Raises ValueError where the text is not JSON."""
    decoder = json.JSONDecoder()
    position, end = 0, len(text.rstrip())
    while position < end:
        while text[position].isspace():
            position += 1
        _, stop = decoder.raw_decode(text, position)
        yield text[position:stop].encode()
        position = stop


class _TypeOnly(Struct):
    kind: str | None = None
    api_version: str | None = field(default=None, name="apiVersion")


class _AnyItems(Struct):
    items: list[Any] | None = None


class _RawItems(Struct):
    items: list[msgspec.Raw] | None = None


class _Parser:
    """Gathers the objects of one file, from values that `read` understands (raw JSON, or objects built from YAML)."""

    def __init__(self, read: Reader[Any], value_type: Any, selection: Selection) -> None:
        self.content = FileContent()
        self._read = read
        self._items_type = _RawItems if value_type is msgspec.Raw else _AnyItems
        self._selection = selection

    def take_json(self, path: Path, text: bytes, stop: Callable[[], bool]) -> bool:
        """Take one JSON document, or several one after the other; False if the text is not JSON to its end."""
        try:
            self.take_document(read_json(text, msgspec.Raw), f"{path}, document 1")
            return True
        except DECODE_ERRORS as error:
            reason = explain(error)
        number = 0
        try:
            for number, part in enumerate(_concatenated(text.decode()), 1):
                if stop():
                    raise Stopped
                self.take_document(part, f"{path}, document {number}")
        except DECODE_ERRORS as error:
            self.refuse(None, explain(error) if number else reason, f"{path}, document {number + 1}")
            return False
        return True

    def take_document(self, value: Any, origin: str) -> None:
        """Take an object, or each object of a list."""
        try:
            head: _TypeOnly = self._read(value, _TypeOnly)
            if head.kind not in _LIST_KINDS:
                self._take_object(value, None, "", origin)
                return
            items: Iterable[Any] = self._read(value, self._items_type).items or ()
        except DECODE_ERRORS as error:
            self.refuse(None, explain(error), origin)
            return
        for index, item in enumerate(items):
            self._take_object(item, _LIST_KINDS[head.kind], f"items[{index}]", origin)

    def refuse(self, key: ObjectKey | None, reason: str, origin: str) -> None:
        """Note something that cannot be read."""
        self.content.problems.append(Refused(key, reason, origin))
        if key is None:
            self.content.unidentified = True
        else:
            self.content.refused_keys.add(key)

    def _take_object(self, value: Any, list_kind: Kind | None, where: str, origin: str) -> None:
        """Take one object. `list_kind` is given for the items of typed lists, which need not repeat it."""
        kind: Kind | None = None
        try:
            try:
                head: Head = self._read(value, Head)
                kind = _watched_kind(head.kind, head.api_version, list_kind)
            except DECODE_ERRORS:
                # Of a kind that is not watched, not even the metadata matters.
                typed: _TypeOnly = self._read(value, _TypeOnly)
                kind = _watched_kind(typed.kind, typed.api_version, list_kind)
                if kind is not None:
                    raise
            if kind is None:
                self.content.ignored += 1
                return
            if not self._selection.wants(kind, head.metadata.name, head.metadata.labels):
                return
            api_object = read_object(kind, value, self._read)
        except DECODE_ERRORS as error:
            key = identify(kind, value, self._read) if kind else None
            self.refuse(key, _join(where, explain(error)), origin)
            return
        if api_object.key in self.content.objects:
            reason = _join(where, "defined twice in this file; the first one holds")
            self.content.problems.append(Refused(api_object.key, reason, origin))
        else:
            self.content.objects[api_object.key] = api_object


def _watched_kind(kind: str | None, api_version: str | None, list_kind: Kind | None) -> Kind | None:
    """The kind, or None if it is not watched. Raises ValueError if there is none."""
    found = _KINDS.get(kind) if kind is not None else list_kind
    if kind is None and list_kind is None:
        raise ValueError("kind: missing")
    return found if found is not None and api_version in (None, _API_VERSION[found]) else None


def _join(where: str, reason: str) -> str:
    if not where:
        return reason
    path, found, what = reason.partition(": ")
    return f"{where}.{path}: {what}" if found and _is_path(path) else f"{where}: {reason}"


def _is_path(text: str) -> bool:
    return " " not in text and "`" not in text
