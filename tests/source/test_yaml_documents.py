"""YAML as Kubernetes means it, and within bounds whatever the text."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nodeproxy.source.manifests.yaml_documents import MAX_DEPTH, Stopped, read_documents


def values(text: str) -> list[Any]:
    documents = list(read_documents(text.encode()))
    assert not [d.error for d in documents if d.error]
    return [d.value for d in documents]


def error(text: str | bytes) -> str:
    (document,) = read_documents(text.encode() if isinstance(text, str) else text)
    assert document.error is not None, document
    return str(document.error)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2024-01-01T00:00:00Z", "2024-01-01T00:00:00Z"),  # a timestamp stays text
        ("2024-01-01", "2024-01-01"),
        ("2001:10:20:30:40:50:51:52", "2001:10:20:30:40:50:51:52"),  # base 60 in YAML 1.1; an IPv6 address to us
        ("10.0.0.1", "10.0.0.1"),
        ("80", 80),
        ("'80'", "80"),
        ("!!str 80", "80"),
        ("0x50", 80),
        ("0120", 80),
        ("-1", -1),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        ("true", True),
        ("'true'", "true"),
        ("~", None),
        ("'-'", "-"),
        (".", "."),
        ("0x", "0x"),
        ("+", "+"),
    ],
)
def test_scalars(text: str, value: object) -> None:
    assert values(f"a: {text}") == [{"a": value}]
    assert type(values(f"a: {text}")[0]["a"]) is type(value)


def test_documents_are_separate() -> None:
    text = "# comment\n---\na: 1\n---\nb: [1\n---\n# nothing\n---\nc: |\n  ---\n  text\n--- {d: 4}\n"
    documents = list(read_documents(text.encode()))
    assert [(d.number, d.line, d.value) for d in documents if not d.error] == [
        (1, 2, {"a": 1}),
        (3, 8, {"c": "---\ntext\n"}),
        (4, 12, {"d": 4}),
    ]
    assert "line 6" in str(documents[1].error)


def test_directive_and_byte_order_mark() -> None:
    assert values("%YAML 1.1\n---\na: 1\n") == [{"a": 1}]
    assert next(iter(read_documents(b"\xef\xbb\xbfa: 1"))).value == {"a": 1}


def test_empty_texts_hold_no_document() -> None:
    for text in ("", "\n\n", "# x\n", "---\n---\n---\n", "---\r\n\r\n"):
        assert values(text) == []


def test_aliases_and_merge_keys_within_bounds() -> None:
    assert values("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\nz: *x\n") == [
        {"x": {"a": 1, "b": 2}, "y": {"b": 3, "a": 1}, "z": {"a": 1, "b": 2}}
    ]


@pytest.mark.parametrize("item", ["[{0}]", "{{<<: [{0}]}}", "{{k: [{0}]}}"])
def test_billion_laughs(item: str) -> None:
    first = "a0: &a0 {k: lol}\n"
    levels = "".join(f"a{i}: &a{i} {item.format(','.join([f'*a{i - 1}'] * 9))}\n" for i in range(1, 30))
    started = time.monotonic()
    assert "aliases stand for more than" in error(first + levels)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: &a [*a]", "unknown alias 'a'"),
        ("a: *b", "unknown alias 'b'"),
        ("[" * 5000, f"more than {MAX_DEPTH} levels"),
        ("a: " + "9" * 5000, "5000 digits"),
        ("a: 1\nb: 2\na: 3", "line 3: duplicate key 'a'"),
        ("a: !!python/object/apply:os.system [id]", "not supported"),
        ("a: !!binary aGk=", "not supported"),
        ("a: !!int x", "not a value of tag"),
        ("? [a]\n: 1", "a key that is not"),
        ("a:\n\t- b", "line 2"),
        ("a: 1\n...\nb: 2", "line 3"),
        (b"a: \xff", "at byte 3"),
        (b"a: \x00", "at byte 3"),
        ("{<<: 1}", "'<<'"),
    ],
)
def test_refused(text: str | bytes, part: str) -> None:
    assert part in error(text)


def test_many_separators_are_bounded() -> None:
    documents = list(read_documents(b"---\n" * 150_000))
    assert len(documents) == 1
    assert "more than" in str(documents[0].error)


def test_stop() -> None:
    with pytest.raises(Stopped):
        list(read_documents(b"a: 1\n---\nb: 2", lambda: True))


# PyYAML writes such text without quotes, as for it a float has a dot; for Kubernetes (YAML 1.2) it is a number.
_FLOAT_WITHOUT_DOT = re.compile(r"[-+]?[0-9_]+[eE][-+]?[0-9]+")

_texts = st.text(max_size=20).filter(lambda text: not _FLOAT_WITHOUT_DOT.fullmatch(text))
_scalars = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), _texts)
_trees = st.recursive(_scalars, lambda inner: st.lists(inner) | st.dictionaries(_texts, inner), max_leaves=20)


@settings(max_examples=200, deadline=None)
@given(st.lists(_trees.filter(lambda tree: tree is not None), max_size=4))
def test_what_a_dumper_writes_is_read_back(trees: list[Any]) -> None:
    text = "".join("---\n" + yaml.safe_dump(tree, allow_unicode=False) for tree in trees)
    assert values(text) == trees


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text(alphabet="&*<:{}[]-#%!|>'\" \n\tab01", max_size=80).map(str.encode))
def test_no_text_raises(text: bytes) -> None:
    list(read_documents(text))
