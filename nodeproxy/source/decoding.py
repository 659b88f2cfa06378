"""Owns the step from raw API objects to typed ones: whose objects are wanted, and what is said of those that cannot be read.

Both sources use it, so that a Service from a manifest and one from the API server are accepted, refused and selected alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from msgspec import Struct, field

from nodeproxy.api.objects import TYPE_OF_KIND, ApiObject, Kind, Labels, ObjectKey

HEADLESS_LABEL = "service.kubernetes.io/headless"
PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"

# All by which msgspec reports bad input: its own errors, invalid UTF-8 (a ValueError), and nesting deeper than the stack.
DECODE_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError)

T = TypeVar("T")

# Reads a value (raw JSON, or objects built from YAML) as the given type; raises one of DECODE_ERRORS.
Reader = Callable[[Any, type[T]], T]


class Selection(Struct, frozen=True):
    """Which objects concern this node's proxy.

    Services and EndpointSlices that no other proxy implementation claims by `service.kubernetes.io/service-proxy-name` (or
    that are claimed for `service_proxy_name`, if given) and that are not labelled headless; of Nodes only this one.
    """

    node_name: str
    service_proxy_name: str | None = None

    def label_selector(self) -> str:
        """The same rule as a label selector of the API, for Services and EndpointSlices."""
        proxy = f"{PROXY_NAME_LABEL}={self.service_proxy_name}" if self.service_proxy_name else f"!{PROXY_NAME_LABEL}"
        return f"{proxy},!{HEADLESS_LABEL}"

    def wants(self, kind: Kind, name: str, labels: Labels | None) -> bool:
        """Whether an object with this name and these labels is selected."""
        if kind is Kind.NODE:
            return name == self.node_name
        if labels is None:
            return not self.service_proxy_name
        return labels.headless is None and labels.service_proxy_name == (self.service_proxy_name or None)


class _HeadMeta(Struct, gc=False):
    name: str
    namespace: str | None = None
    labels: Labels | None = None
    resource_version: str | None = field(default=None, name="resourceVersion")


class Head(Struct, gc=False):
    """Type and identity of an object, the rest unread."""

    metadata: _HeadMeta
    kind: str | None = None
    api_version: str | None = field(default=None, name="apiVersion")

    def key(self, kind: Kind) -> ObjectKey:
        """Identity as an object of `kind`; an absent namespace means `default`, as for kubectl."""
        return ObjectKey(kind, "" if kind is Kind.NODE else self.metadata.namespace or "default", self.metadata.name)


class _NameOnly(Struct, gc=False):
    name: str
    namespace: str | None = None


class _Identity(Struct, gc=False):
    metadata: _NameOnly


def read_json(raw: bytes | msgspec.Raw, as_type: type[T]) -> T:
    """Read JSON text. Raises one of DECODE_ERRORS."""
    return msgspec.json.decode(raw, type=as_type)


def read_builtins(value: Any, as_type: type[T]) -> T:
    """Read dicts and lists, as strictly as JSON. Raises one of DECODE_ERRORS."""
    return msgspec.convert(value, as_type)


def read_object(kind: Kind, value: Any, read: Reader[Any]) -> ApiObject:
    """The typed object. Raises one of DECODE_ERRORS."""
    typed: ApiObject = read(value, TYPE_OF_KIND[kind])
    return typed


def identify(kind: Kind, value: Any, read: Reader[Any]) -> ObjectKey | None:
    """Identity of an object that could not be read whole, from its metadata alone; None if not even that is readable."""
    try:
        metadata: _NameOnly = read(value, _Identity).metadata
    except DECODE_ERRORS:
        return None
    return ObjectKey(kind, "" if kind is Kind.NODE else metadata.namespace or "default", metadata.name)


def explain(error: Exception) -> str:
    """A decoding error as `field.path: what is wrong`, or only the latter where the error names no field."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = str(error)
    what, found, path = text.rpartition(" - at `$")
    if not found or not path.endswith("`"):
        return text
    return f"{path[:-1].lstrip('.')}: {what}" if path != "`" else what
