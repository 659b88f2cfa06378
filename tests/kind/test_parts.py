"""Hashes of what things are made of, references as containerd has them, and manifests told about their cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from hack.kind.command import again, run, succeeds
from hack.kind.deploy import Facts, adapted
from hack.kind.images import Image, key
from hack.kind.loading import canonical
from hack.kind.places import KindError, built


def test_a_key_is_of_contents_names_and_modes(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    file = tmp_path / "d" / "file"
    file.write_text("a")
    seen = {key([tmp_path / "d"])}
    assert key([tmp_path / "d"]) in seen
    file.write_text("b")
    seen.add(key([tmp_path / "d"]))
    file.chmod(0o700)
    seen.add(key([tmp_path / "d"]))
    file.rename(tmp_path / "d" / "other")
    seen.add(key([tmp_path / "d"]))
    seen.add(key([tmp_path / "d", "more"]))
    assert len(seen) == 5
    assert key(["ab", "c"]) != key(["a", "bc"])


def test_the_archive_of_an_image_carries_its_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NODEPROXY_CACHE", str(tmp_path))
    archives = {Image(reference, made_of).archive for reference in ("a/b:1", "a/c:1") for made_of in ("1", "2")}
    assert len(archives) == 4
    assert all(archive.is_relative_to(tmp_path) for archive in archives)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("nodeproxy:dev", "docker.io/library/nodeproxy:dev"),
        ("kindest/node:v1", "docker.io/kindest/node:v1"),
        ("registry.k8s.io/pause:3.10", "registry.k8s.io/pause:3.10"),
        ("localhost/x:1", "localhost/x:1"),
        ("host:5000/x:1", "host:5000/x:1"),
    ],
)
def test_references_have_their_registry_in_containerd(reference: str, expected: str) -> None:
    assert canonical(reference) == expected


def manifests() -> list[dict[str, Any]]:
    data = {"config.conf": 'clusterCIDR: ""\nmode: ipvs\n'}
    configuration = {"kind": "ConfigMap", "metadata": {"name": "nodeproxy"}, "data": data}
    template = {"metadata": {"labels": {"k8s-app": "nodeproxy"}}, "spec": {"hostNetwork": True}}
    return [{"kind": "DaemonSet", "metadata": {"name": "nodeproxy"}, "spec": {"template": template}}, configuration]


def test_manifests_are_told_the_api_server_and_the_pods() -> None:
    facts = Facts("172.18.0.2", ["10.244.0.0/16", "fd00::/56"], "sha256:1")
    access, daemons, configuration = adapted(manifests(), facts)
    assert access["metadata"]["name"] == "nodeproxy-apiserver"
    assert access["data"] == {"host": "172.18.0.2", "port": "6443"}
    assert yaml.safe_load(configuration["data"]["config.conf"]) == {"clusterCIDR": "10.244.0.0/16,fd00::/56", "mode": "ipvs"}
    assert daemons["spec"]["template"]["spec"] == {"hostNetwork": True}


def test_pods_are_replaced_when_image_or_configuration_is_another() -> None:
    facts = Facts("172.18.0.2", ["10.244.0.0/16"], "sha256:1")
    others = [
        replace(facts, image_id="sha256:2"),
        replace(facts, pod_subnets=["10.1.0.0/16"]),
        replace(facts, api_server="::1"),
    ]
    made_of = []
    for one in (facts, facts, *others):
        daemons = list(adapted(manifests(), one))[1]
        made_of.append(daemons["spec"]["template"]["metadata"]["annotations"]["nodeproxy.io/made-of"])
    assert made_of[0] == made_of[1]
    assert len(set(made_of)) == 1 + len(others)


def test_what_is_built_is_built_once_and_never_half(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    with pytest.raises(KeyError), built(target) as work:
        assert work is not None
        work.mkdir()
        raise KeyError
    assert not target.exists()
    with built(target) as work:
        assert work is not None
        work.mkdir()
    with built(target) as work:
        assert work is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thing", "thing.lock"]


def test_a_program_that_fails_is_quoted() -> None:
    with pytest.raises(KindError, match=r"failed \(3\): sh -c .*\nwhy"):
        run(["sh", "-c", "echo why >&2; exit 3"])
    with pytest.raises(KindError, match="not done within 0 s: sleep 5"):
        run(["sleep", "5"], timeout=0.1)
    with pytest.raises(KindError, match="no program nodeproxy-no-such"):
        run(["nodeproxy-no-such"])
    assert run(["cat"], input="x") == "x"
    assert succeeds(["true"])
    assert not succeeds(["false"])


def test_only_what_fails_by_chance_is_done_again() -> None:
    calls = []

    @again
    def act(text: str) -> None:
        calls.append(text)
        raise KindError(text)

    with pytest.raises(KindError):
        act("adding interface to bridge docker0 failed: route ip+net: no such network interface")
    assert len(calls) == 3
    with pytest.raises(KindError):
        act("no such image")
    assert len(calls) == 4
