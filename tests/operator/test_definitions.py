"""The definitions of ProxyRollout and ProxyNode: what the API server refuses, and that our types are of the same form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
import pytest
import yaml

from hack.controlplane import ControlPlane
from hack.controlplane.access import ApiError, Json
from nodeproxy.api.proxy_node import ProxyNodeSpec, ProxyNodeStatus
from nodeproxy.configuration.settings import NEED_RESTART, SETTINGS
from nodeproxy.operator.api import Check, NodePhase, Phase, RolloutSpec, RolloutStatus
from tests.operator.conftest import ROLLOUTS

CRDS = Path(__file__).parents[2] / "deploy" / "operator" / "crds"


def schema(plural: str) -> Json:
    document = yaml.safe_load((CRDS / f"{plural}.yaml").read_text())
    (version,) = document["spec"]["versions"]
    found: Json = version["schema"]["openAPIV3Schema"]["properties"]
    return found


def paths(node: Json, prefix: str = "") -> Iterator[str]:
    """All fields of a schema."""
    for name, child in node.get("properties", {}).items():
        if not name.startswith("x-"):
            yield f"{prefix}{name}"
            yield from paths(child.get("items", child), f"{prefix}{name}.")


def fields(struct: Any, prefix: str = "") -> Iterator[str]:
    """All fields of our types."""
    hints = get_type_hints(struct)
    for one in msgspec.structs.fields(struct):
        yield f"{prefix}{one.encode_name}"
        for inner in _structs(hints[one.name]):
            yield from fields(inner, f"{prefix}{one.encode_name}.")


def _structs(hint: Any) -> Iterator[Any]:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        yield hint
    elif get_origin(hint) is not dict:
        for inner in get_args(hint):
            yield from _structs(inner)


@pytest.mark.parametrize(
    ("plural", "part", "struct"),
    [
        ("proxynodes", "spec", ProxyNodeSpec),
        ("proxynodes", "status", ProxyNodeStatus),
        ("proxyrollouts", "spec", RolloutSpec),
        ("proxyrollouts", "status", RolloutStatus),
    ],
)
def test_types_and_schemas_have_the_same_fields(plural: str, part: str, struct: type[msgspec.Struct]) -> None:
    inner = ("configuration.", "target.configuration.")  # opaque to the operator
    in_schema = {path for path in paths(schema(plural)[part]) if not path.startswith(inner)}
    assert in_schema == set(fields(struct))


def test_the_schemas_know_the_same_words() -> None:
    rollout = schema("proxyrollouts")
    assert rollout["status"]["properties"]["phase"]["enum"] == [str(phase) for phase in Phase]
    which = rollout["spec"]["properties"]["checks"]["properties"]["which"]
    assert which["items"]["enum"] == which["default"] == [str(check) for check in Check]
    described = rollout["status"]["properties"]["nodes"]["items"]["properties"]["phase"]["description"]
    assert all(str(phase) in described for phase in NodePhase)


def test_defaults_are_those_of_our_types() -> None:
    """What the API server fills in is what a roll-out without it means."""
    filled = {"target": {"mode": "ipvs"}, "nodes": {"selector": {}}, **_defaults(schema("proxyrollouts")["spec"])}
    bare = {"target": {"mode": "ipvs"}, "nodes": {"selector": {}}}
    assert msgspec.convert(filled, RolloutSpec) == msgspec.convert(bare, RolloutSpec)


def _defaults(node: Json) -> Json:
    found = {}
    for name, child in node.get("properties", {}).items():
        if "default" in child:
            inner = _defaults(child)
            found[name] = {**child["default"], **inner} if isinstance(child["default"], dict) else child["default"]
    return found


def test_a_configuration_has_the_fields_that_a_running_agent_changes() -> None:
    known = {setting.path for setting in SETTINGS if setting.path is not None and setting.field not in NEED_RESTART}
    # The mode is a field of its own; /healthz is where kubelet's probes look for it.
    known -= {"mode", "healthzBindAddress"}
    for plural, where in (("proxynodes", ("spec",)), ("proxyrollouts", ("spec", "target"))):
        node = schema(plural)[where[0]]
        for name in where[1:]:
            node = node["properties"][name]
        leaves = set(paths(node["properties"]["configuration"]))
        groups = {path.rpartition(".")[0] for path in leaves} - {""}
        assert leaves - groups == known, plural


def rollout(**spec: Any) -> Json:
    whole = {"target": {"mode": "ipvs"}, "nodes": {"selector": {}}, **spec}
    return {"apiVersion": "nodeproxy.io/v1alpha1", "kind": "ProxyRollout", "metadata": {"name": "bad"}, "spec": whole}


@pytest.mark.controlplane
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": {"mode": "nftables"}}, "spec.target.mode: Unsupported value"),
        ({"target": {}}, "spec.target: Invalid value"),
        ({"target": {"proxy": "kube-proxy", "mode": "ipvs"}}, "spec.target: Invalid value: kube-proxy has neither mode"),
        ({"target": {"proxy": "envoy"}}, "spec.target.proxy: Unsupported value"),
        ({"target": {"image": "no image"}}, "spec.target.image: Invalid value"),
        ({"target": {"configuration": {"ipvs": {"scheduler": "RR!"}}}}, "spec.target.configuration.ipvs.scheduler"),
        ({"target": {"configuration": {"oomScoreAdj": 3}}}, 'unknown field "spec.target.configuration.oomScoreAdj"'),
        ({"nodes": {}}, "spec.nodes: Invalid value: names or selector must be there"),
        (
            {"nodes": {"selector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}},
            "spec.nodes.selector.matchExpressions[0]: Invalid value: values belong to In and NotIn",
        ),
        ({"steps": [1, "10%"]}, "spec.steps: Invalid value: the last step must be 100%"),
        ({"steps": ["50%", "10%", "100%"]}, "spec.steps: Invalid value: shares must increase"),
        ({"steps": [3, 1, "100%"]}, "spec.steps: Invalid value: numbers must increase"),
        ({"steps": ["ten", "100%"]}, "spec.steps[0]: Invalid value"),
        ({"soakSeconds": -1}, "spec.soakSeconds: Invalid value"),
        ({"maxParallel": 0}, "spec.maxParallel: Invalid value"),
        ({"checks": {"which": ["luck"]}}, "spec.checks.which[0]: Unsupported value"),
        ({"checks": {"thresholds": {"errorRatio": 2}}}, "spec.checks.thresholds.errorRatio: Invalid value"),
        ({"checks": {"thresholds": {"latencyFactor": 0.1}}}, "spec.checks.thresholds.latencyFactor: Invalid value"),
        ({"checks": {"probes": {"count": 0}}}, "spec.checks.probes.count: Invalid value"),
        ({"abort": "Maybe"}, "spec.abort: Unsupported value"),
    ],
)
def test_an_invalid_one_is_refused_and_the_field_named(cluster: ControlPlane, change: Json, words: str) -> None:
    with pytest.raises(ApiError) as error:
        cluster.request("POST", f"{ROLLOUTS}?fieldValidation=Strict", rollout(**change))
    assert error.value.status in (400, 422)
    assert words in str(error.value)


@pytest.mark.controlplane
def test_what_it_is_about_cannot_be_changed_nor_an_abort_be_taken_back(cluster: ControlPlane) -> None:
    cluster.request("POST", ROLLOUTS, rollout())
    path, merge = f"{ROLLOUTS}/bad", "application/merge-patch+json"
    try:
        for change, words in (
            ({"target": {"mode": "iptables"}}, "spec.target: Invalid value: cannot be changed"),
            ({"nodes": {"names": ["n1"]}}, "spec.nodes: Invalid value: cannot be changed"),
        ):
            with pytest.raises(ApiError, match=words):
                cluster.request("PATCH", path, {"spec": change}, content_type=merge)
        cluster.request("PATCH", path, {"spec": {"abort": "Stop"}}, content_type=merge)
        with pytest.raises(ApiError, match=r"spec\.abort: Invalid value: an aborted roll-out stays aborted"):
            cluster.request("PATCH", path, {"spec": {"abort": None}}, content_type=merge)
        cluster.request("PATCH", path, {"spec": {"abort": "Rollback"}}, content_type=merge)
    finally:
        cluster.request("DELETE", path)
