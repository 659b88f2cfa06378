"""Owns reading the one YAML or JSON document of a configuration file, as leniently as kube-proxy does.

The reader of manifests is not used, because a key given twice is an error there; here the last one counts and is named, as
kube-proxy does when its strict decoding fails.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml
from msgspec import Struct

_TAG = "tag:yaml.org,2002:"
_MAX_DEPTH = 100
_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?\Z")


class YamlError(Exception):
    """The text is not YAML; one line that names the place."""


class YamlDocument(Struct):
    """What the text holds. `duplicates`: paths of keys given more than once. `more`: other documents follow the first."""

    value: Any
    duplicates: tuple[str, ...]
    more: bool


class _Loader(yaml.CSafeLoader):
    """YAML's scalars as Kubernetes reads them: dates and base-60 numbers are text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own attribute
        first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_TAG}timestamp"]
        for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
    }


def _number(make: Any) -> Any:
    def construct(loader: _Loader, node: yaml.ScalarNode) -> Any:
        return node.value if _BASE_60.match(node.value) else make(loader, node)

    return construct


_Loader.add_constructor(f"{_TAG}int", _number(_Loader.construct_yaml_int))
_Loader.add_constructor(f"{_TAG}float", _number(_Loader.construct_yaml_float))


def read_yaml(text: bytes) -> YamlDocument:
    """Read the first document of the text. Raises `YamlError`."""
    try:
        _check_depth_of_text(text)
        loader = _Loader(text)
        node = loader.get_node() if loader.check_node() else None
        if node is None:
            return YamlDocument(None, (), False)
        _check_depth(node)
        duplicates = tuple(dict.fromkeys(_duplicates(node, "", set())))
        return YamlDocument(loader.construct_document(node), duplicates, loader.check_node())
    except yaml.reader.ReaderError as error:
        raise YamlError(f"not UTF-8 text, or a character that YAML forbids, at byte {error.position}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise YamlError(f"{where}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise YamlError(str(error).partition("\n")[0]) from None


def _check_depth_of_text(text: bytes) -> None:
    """Refuse before a tree is built what is nested so deep that PyYAML would end the process."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CBaseLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            line = event.start_mark.line + 1 if event.start_mark else 0
            raise YamlError(f"line {line}: nested more than {_MAX_DEPTH} levels deep")


def _check_depth(node: yaml.Node) -> None:
    """Refuse what aliases nest absurdly deep, or within itself: nothing that walks the values needs to care."""
    level = [node]
    for _ in range(_MAX_DEPTH):
        inner = {id(child): child for parent in level for child in _children(parent)}
        level = list(inner.values())
        if not level:
            return
    raise YamlError(f"aliases nest more than {_MAX_DEPTH} levels deep")


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _duplicates(node: yaml.Node, prefix: str, done: set[int]) -> Iterator[str]:
    """Paths of keys given more than once, in mappings within mappings. `done`: nodes looked at, which aliases repeat."""
    if not isinstance(node, yaml.MappingNode) or id(node) in done:
        return
    done.add(id(node))
    seen = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == f"{_TAG}merge":
            continue
        path = f"{prefix}{key.value}"
        if key.value in seen:
            yield path
        seen.add(key.value)
        yield from _duplicates(value, f"{path}.", done)
