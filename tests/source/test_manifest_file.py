"""One manifest file: what is taken, what is passed over, and how what cannot be read is named."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from nodeproxy.api.objects import EndpointSlice, Kind, ObjectKey, Service
from nodeproxy.source.decoding import Selection
from nodeproxy.source.manifests.file import MAX_FILE_BYTES, FileContent, parse_file, read_bytes
from tests.source.manifest_objects import endpoint_slice, node, service

SELECTION = Selection("here")


def parse(text: str | bytes, name: str = "x.yaml", selection: Selection = SELECTION) -> FileContent:
    return parse_file(Path(name), text.encode() if isinstance(text, str) else text, selection)


def key(name: str, kind: Kind = Kind.SERVICE) -> ObjectKey:
    return ObjectKey(kind, "shop", name)


def as_yaml(*objects: Any) -> str:
    return "---\n".join(yaml.safe_dump(value) for value in objects)


def test_yaml_and_json_say_the_same() -> None:
    objects = [service("a"), endpoint_slice("a", ["10.0.0.1", "10.0.0.2"]), node("here")]
    from_yaml = parse(as_yaml(*objects)).objects
    assert set(from_yaml) == {key("a"), key("a", Kind.ENDPOINT_SLICE), ObjectKey(Kind.NODE, "", "here")}
    texts: list[tuple[str | bytes, str]] = [
        (json.dumps({"kind": "List", "apiVersion": "v1", "items": objects}), "x.json"),
        (json.dumps({"kind": "List", "apiVersion": "v1", "items": objects}), "x.yaml"),
        ("\n".join(map(json.dumps, objects)), "x.json"),
        ("".join(json.dumps(value, indent=1) for value in objects), "x.json"),
        ("\n---\n".join(map(json.dumps, objects)), "x.yaml"),
        (as_yaml({"kind": "List", "apiVersion": "v1", "items": objects}), "x.yml"),
        (b"\xef\xbb\xbf" + json.dumps({"kind": "List", "items": objects}).encode(), "x.json"),
    ]
    for text, name in texts:
        content = parse(text, name)
        assert content.objects == from_yaml
        assert not content.problems


def test_typed_lists_need_no_kind_in_their_items() -> None:
    item = {k: v for k, v in service("a").items() if k not in ("kind", "apiVersion")}
    assert set(parse(json.dumps({"kind": "ServiceList", "apiVersion": "v1", "items": [item]})).objects) == {key("a")}


def test_namespace_defaults() -> None:
    content = parse("apiVersion: v1\nkind: Service\nmetadata: {name: a}\n")
    assert set(content.objects) == {ObjectKey(Kind.SERVICE, "default", "a")}


def test_creation_timestamp_is_text() -> None:
    content = parse("apiVersion: v1\nkind: Service\nmetadata: {name: a, creationTimestamp: 2024-05-01T10:00:00Z}\n")
    (found,) = content.objects.values()
    assert found.metadata.creation_timestamp == "2024-05-01T10:00:00Z"


def test_other_kinds_and_nodes_are_passed_over() -> None:
    content = parse(
        as_yaml(
            {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": 7}},
            {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": []},
            {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "metadata": {"name": "fn"}},
            {"apiVersion": "discovery.k8s.io/v1beta1", "kind": "EndpointSlice", "metadata": {"name": "old"}},
            node("elsewhere"),
            node("here"),
        )
    )
    assert set(content.objects) == {ObjectKey(Kind.NODE, "", "here")}
    assert (content.problems, content.ignored) == ([], 4)


def test_label_selectors() -> None:
    headless = {"service.kubernetes.io/headless": ""}
    other = {"service.kubernetes.io/service-proxy-name": "other"}
    objects = [
        service("plain"),
        service("headless", labels=headless),
        service("other", labels=other),
        service("both", labels={**headless, **other}),
        endpoint_slice("plain", []),
        endpoint_slice("headless", [], labels=headless),
        endpoint_slice("other", [], labels=other),
        service("unselected but broken", port="x", labels=headless),
    ]
    text = as_yaml(*objects)
    assert {k.name for k in parse(text).objects} == {"plain"}
    assert {(k.kind, k.name) for k in parse(text, selection=Selection("here", "other")).objects} == {
        (Kind.SERVICE, "other"),
        (Kind.ENDPOINT_SLICE, "other"),
    }
    assert not parse(text).problems


@pytest.mark.parametrize("form", ["yaml", "yaml-list", "json", "json-list"])
def test_a_bad_object_is_named_and_the_others_are_taken(form: str) -> None:
    objects = [service("a"), service("b", port="eighty"), service("c")]
    listed = {"kind": "List", "apiVersion": "v1", "items": objects}
    text = {
        "yaml": as_yaml(*objects),
        "yaml-list": as_yaml(listed),
        "json": "\n".join(map(json.dumps, objects)),
        "json-list": json.dumps(listed),
    }[form]
    content = parse(text, "dir/x.yaml")
    assert set(content.objects) == {key("a"), key("c")}
    assert content.refused_keys == {key("b")}
    assert not content.unidentified
    (problem,) = content.problems
    where = "items[1].spec" if "list" in form else "spec"
    assert (problem.key, problem.reason) == (key("b"), f"{where}.ports[0].port: Expected `int`, got `str`")
    assert problem.origin.startswith(f"dir/x.yaml, document {1 if 'list' in form else 2}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("just text", "Expected `object`, got `str`"),
        ("- 1\n- 2", "Expected `object`, got `array`"),
        ("a: 1", "kind: missing"),
        ("kind: 7", "kind: Expected `str | null`, got `int`"),
        ("kind: Service\nmetadata: {}", "metadata: Object missing required field `name`"),
        ("kind: Service\nmetadata: {name: 7}", "metadata.name: Expected `str`, got `int`"),
        ("kind: List\nitems: {a: 1}", "items: Expected `array | null`, got `object`"),
        ("kind: List\nitems: [7]", "items[0]: Expected `object`, got `int`"),
        ("kind: [", "line 2: did not find expected node content"),
    ],
)
def test_without_identity(text: str, reason: str) -> None:
    content = parse(text)
    assert [(p.key, p.reason) for p in content.problems] == [(None, reason)]
    assert content.unidentified
    assert not content.objects


def test_the_same_object_twice_in_a_file() -> None:
    content = parse(as_yaml(service("a", 1), service("a", 2)))
    found = content.objects[key("a")]
    assert isinstance(found, Service) and found.spec.ports is not None and found.spec.ports[0].port == 1
    assert [p.key for p in content.problems] == [key("a")]


@pytest.mark.parametrize(
    "text", ["{", '{"a": }', "nonsense", '{"kind": "Service"} trailing', "[" * 100_000, '{"a":' * 100_000]
)
def test_bad_json(text: str) -> None:
    content = parse(text, "x.json")
    assert content.problems
    assert content.unidentified


def test_deep_json_in_an_object_names_it() -> None:
    deep = json.dumps(service("a"))[:-1] + ',"x":' + "[" * 50_000 + "]" * 50_000 + "}"
    good = json.dumps(service("b"))
    content = parse(good + "\n" + deep, "x.json")
    assert set(content.objects) == {key("b")}
    assert content.problems


def test_only_regular_files_of_bounded_size(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(OSError, match="not a regular file"):
        read_bytes(tmp_path / "pipe.yaml")
    with (tmp_path / "big.yaml").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(OSError, match="larger than"):
        read_bytes(tmp_path / "big.yaml")


def test_five_thousand_services_and_slices_of_json_load_fast() -> None:
    items = [service(f"svc-{i}") for i in range(5000)]
    items += [endpoint_slice(f"svc-{i}", [f"10.{i // 250}.{i % 250}.{k}" for k in range(10)]) for i in range(5000)]
    text = msgspec.json.encode({"kind": "List", "apiVersion": "v1", "items": items})
    started = time.process_time()
    content = parse(text, "x.json")
    seconds = time.process_time() - started
    assert len(content.objects) == 10_000
    last = content.objects[key("svc-4999", Kind.ENDPOINT_SLICE)]
    assert isinstance(last, EndpointSlice) and len(last.endpoints or ()) == 10
    assert seconds < 1.0, f"{seconds:.2f} s"
