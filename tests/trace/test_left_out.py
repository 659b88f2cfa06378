"""What could not be read of the cluster state is told with a trace that it may bear on, not passed over. No kernel."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from hack.scene_oracle import snapshot_of_scene
from nodeproxy.api.objects import Kind, ObjectKey
from nodeproxy.snapshot.take import save
from nodeproxy.snapshot.view import NodeView
from nodeproxy.source.events import Refused
from nodeproxy.trace.ends import TraceError
from tests.trace.cluster import endpoint, service, slice_of, trace_one, view
from tests.trace.test_broken_rules import CLUSTER_IP, SCENE

PROGRAM = str(Path(sys.executable).with_name("nodeproxy"))
STATE = view(service(), slice_of(endpoint("10.1.0.1")))
SERVICE, SLICE = Kind.SERVICE, Kind.ENDPOINT_SLICE


def without(*refused: Refused) -> NodeView:
    return NodeView(replace(STATE.snapshot, refused=refused))


def refused(kind: Kind, name: str, namespace: str = "shop") -> Refused:
    return Refused(ObjectKey(kind, namespace, name), "spec: broken", "a.yaml, document 1")


@pytest.mark.parametrize(
    ("one", "at_service", "at_nothing"),
    [
        (Refused(None, "Input data was truncated", "a.json, document 1"), True, True),
        (refused(SERVICE, "web"), True, True),
        (refused(SERVICE, "other"), False, True),
        (refused(SERVICE, "web", "elsewhere"), False, True),
        (refused(SLICE, "web-2"), True, False),
        (refused(SLICE, "of-any-name"), True, False),
        (refused(SLICE, "web-2", "elsewhere"), False, False),
        (refused(Kind.NODE, "here", ""), True, True),
    ],
)
def test_which_are_told_at_a_service_and_where_there_is_none(one: Refused, at_service: bool, at_nothing: bool) -> None:
    for destination, told in (("shop/web:80", at_service), ("10.96.7.7:80", at_nothing)):
        notes = trace_one(without(one), "10.0.0.9", destination).notes
        assert any(note.startswith(f"left out: {one.key or one.origin}: {one.reason}") for note in notes) is told


def test_of_very_many_some_are_told() -> None:
    many = [Refused(None, "broken", f"{number:02}.json") for number in range(13)]
    notes = trace_one(without(*many), "10.0.0.9", "shop/web:80").notes
    assert (len(notes), notes[-1]) == (11, "left out: 3 more")


def test_a_service_that_is_not_there_may_be_among_them() -> None:
    with pytest.raises(TraceError, match=r"there is no Service shop/none .*; 2 objects or files could not be read$"):
        trace_one(without(refused(SLICE, "none"), Refused(None, "broken", "a.json")), "10.0.0.9", "shop/none:80")


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    save(snapshot_of_scene(SCENE), tmp_path)
    return tmp_path


def trace(snapshot: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [PROGRAM, "trace", "outside", *arguments, "--snapshot", str(snapshot)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-30])


def test_a_snapshot_with_a_file_that_was_cut_short(snapshot: Path) -> None:
    cut_short(snapshot / "endpoint-slices-001.json")
    done = trace(snapshot, f"{CLUSTER_IP}:80")
    named = f"left out: {snapshot}/endpoint-slices-001.json, document 1: "
    assert done.returncode == 0
    assert "Expected: REJECT" in done.stdout
    assert f"\nNote: {named}" in done.stdout
    assert done.stderr.count(named) == 1
    assert "the snapshot has fewer objects than it was written with" in done.stderr
    [told] = json.loads(trace(snapshot, f"{CLUSTER_IP}:80", "-o", "json").stdout)["traces"]
    assert told["notes"][0].startswith(named)


def test_services_that_were_cut_short(snapshot: Path) -> None:
    cut_short(snapshot / "services-001.json")
    done = trace(snapshot, "shop/web:80")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"left out: {snapshot}/services-001.json, document 1: " in done.stderr
    assert "nodeproxy: DST: there is no Service shop/web " in done.stderr
    assert done.stderr.endswith("; 1 objects or files could not be read\n")


def test_where_a_snapshot_says_it_is_from_commands_no_terminal(snapshot: Path) -> None:
    about = snapshot / "SNAPSHOT"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"origin": "\x1b]0;owned\x07"}))
    done = trace(snapshot, "shop/none:80")
    assert done.returncode == 1
    assert "\\x1b]0;owned\\x07" in done.stderr
    assert "\x1b" not in done.stderr
