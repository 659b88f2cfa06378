"""Owns reading a KubeProxyConfiguration file: each field typed, with kube-proxy's defaults, and every complaint at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from nodeproxy.configuration.agent_config import ConfigError
from nodeproxy.configuration.document import (
    API_VERSION,
    KIND,
    ZERO_IS_A_VALUE,
    KubeProxyConfiguration,
    completed,
    decode_hook,
)

MAX_BYTES = 1 << 20  # that of a ConfigMap

_WORDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "object": "a mapping",
    "array": "a list",
    "null": "nothing",
}
_AnyStruct = TypeVar("_AnyStruct", bound=Struct)


class ReadDocument(Struct):
    """A configuration file. Fields that `complaints` name have their default; the others can be trusted to be of their type.

    Paths of fields that kube-proxy does not know: `unknown`; of fields given more than once, the last of which counts:
    `duplicates`. `more`: other documents follow, which nobody reads.
    """

    document: KubeProxyConfiguration
    complaints: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    duplicates: tuple[str, ...] = ()
    more: bool = False


def read_document(path: Path) -> ReadDocument:
    """Read a file. Raises `ConfigError` with one line where it is no KubeProxyConfiguration at all."""
    text = _read_text(path)
    from nodeproxy.configuration.yaml_document import YamlError, read_yaml  # noqa: PLC0415 - only with a file

    try:
        found = read_yaml(text)
    except YamlError as error:
        raise ConfigError([f"{path}: not YAML: {error}"]) from None
    if found.value is None:
        raise ConfigError([f"{path}: is empty; a {KIND} is expected"])
    if not isinstance(found.value, dict):
        raise ConfigError([f"{path}: holds {_kind_of(found.value)}; a {KIND} is expected"])
    values = {str(key): value for key, value in found.value.items()}
    version, kind = values.pop("apiVersion", None), values.pop("kind", None)
    if (version, kind) != (API_VERSION, KIND):
        hint = "; give the text under its key config.conf" if kind == "ConfigMap" else ""
        raise ConfigError([f"{path}: apiVersion {version!r}, kind {kind!r}: expected {API_VERSION}, {KIND}{hint}"])
    decoder = _Decoder()
    document = decoder.decode(KubeProxyConfiguration, values, "")
    return ReadDocument(completed(document), tuple(decoder.complaints), tuple(decoder.unknown), found.duplicates, found.more)


def read_part(values: Mapping[str, Any]) -> ReadDocument:
    """Read a part of a document, of JSON's types and without `apiVersion` and `kind`; what is absent has its default."""
    decoder = _Decoder()
    document = decoder.decode(KubeProxyConfiguration, values, "")
    return ReadDocument(document, tuple(decoder.complaints), tuple(decoder.unknown))


def _read_text(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise ConfigError([f"{path}: is not a file"])
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror or error}"]) from None
    if len(text) > MAX_BYTES:
        raise ConfigError([f"{path}: larger than 1 MiB; that is no {KIND}"])
    return text


class _Decoder:
    """Decodes field by field, so that one wrong field does not hide the next."""

    def __init__(self) -> None:
        self.complaints: list[str] = []
        self.unknown: list[str] = []

    def decode(self, kind: type[_AnyStruct], values: Mapping[str, Any], prefix: str) -> _AnyStruct:
        decoded: dict[str, Any] = {}
        entries = {entry.encode_name: entry for entry in msgspec.structs.fields(kind)}
        self.unknown += [f"{prefix}{key}" for key in values if str(key) not in entries]
        for name, entry in entries.items():
            path = f"{prefix}{name}"
            value = values.get(name)
            if value is None:
                continue
            if isinstance(entry.type, type) and issubclass(entry.type, Struct):
                if isinstance(value, dict):
                    decoded[entry.name] = self.decode(entry.type, value, f"{path}.")
                else:
                    self.complaints.append(f"{path}: expected a mapping, got {_kind_of(value)}")
                continue
            try:
                made = msgspec.convert(value, entry.type, dec_hook=decode_hook)
            except msgspec.ValidationError as error:
                self.complaints.append(_complaint(path, str(error)))
                continue
            if made not in ("", 0) or isinstance(made, bool) or path in ZERO_IS_A_VALUE:
                decoded[entry.name] = made
        return kind(**decoded)


def _complaint(path: str, message: str) -> str:
    """msgspec's message, in an operator's words and with the path in the document."""
    reason, _, where = message.partition(" - at `")
    inner = where.removesuffix("`").removeprefix("$").removesuffix("[...]")
    words = re.sub(r"`(\w+(?: \| \w+)*)`", lambda match: _in_words(match[1]), reason)
    return f"{path}{inner}: {words[:1].lower()}{words[1:]}"


def _in_words(kinds: str) -> str:
    return " or ".join(_WORDS.get(kind, kind) for kind in kinds.split(" | "))


def _kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    return {dict: "a mapping", list: "a list", str: "text", int: "a whole number", float: "a number"}.get(
        type(value), "something else"
    )
