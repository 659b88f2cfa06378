"""Taking a snapshot: what is gathered from a source, and one clear line where there is nothing to gather."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from hack.random_scenes import make_scene
from hack.scene_oracle import snapshot_of_scene
from nodeproxy.api.objects import Kind, ObjectKey, Service
from nodeproxy.cli.main import main_group
from nodeproxy.configuration.agent_config import AgentConfig
from nodeproxy.snapshot.gathering import Gathering
from nodeproxy.snapshot.model import SnapshotError
from nodeproxy.snapshot.take import take
from nodeproxy.snapshot.view import NodeView
from nodeproxy.source.events import Deleted, Refused, Upserted


@pytest.mark.parametrize("seed", range(1, 7))
def test_from_manifests(seed: int, tmp_path: Path) -> None:
    scene = make_scene(seed)
    scene.write_manifests(tmp_path, with_node=True)
    wanted = snapshot_of_scene(scene)
    taken = asyncio.run(take(msgspec.structs.replace(wanted.config, manifests=tmp_path)))
    assert NodeView(taken).table == NodeView(wanted).table
    assert taken.origin == f"manifests {tmp_path}"
    assert [obj.key for obj in taken.objects] == sorted(obj.key for obj in taken.objects)
    assert taken.node_addresses == ()  # the Node is another machine


def test_an_api_server_that_is_not_there() -> None:
    config = AgentConfig(node_name="n", master="http://127.0.0.1:1")
    with pytest.raises(SnapshotError) as told:
        asyncio.run(take(config, timeout=0.5))
    assert str(told.value).startswith("API server (master http://127.0.0.1:1): no complete list of Services")
    assert "refused" in str(told.value)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    done = CliRunner().invoke(main_group, ["snapshot", str(tmp_path / "out"), "--manifests", str(tmp_path / "none")])
    assert done.exit_code == 1
    assert done.output == f"nodeproxy: --manifests: {tmp_path / 'none'} is not a directory\n"


def test_what_is_deleted_or_refused_by_its_name_is_not_there() -> None:
    def service(name: str) -> Upserted:
        return Upserted(msgspec.convert({"metadata": {"name": name}, "spec": {"clusterIP": "10.96.0.1"}}, Service))

    gathering = Gathering("n")
    kept = Refused(ObjectKey(Kind.SERVICE, "default", "b"), "spec: broken now", "a.yaml")
    gathering.deliver([service("a"), service("b"), service("Bad_Name")])
    gathering.deliver([Deleted(ObjectKey(Kind.SERVICE, "default", "a")), kept, kept])
    snapshot = gathering.snapshot(AgentConfig(node_name="n"), "test")
    assert [obj.key.name for obj in snapshot.objects] == ["b"]  # the last good state of what the source cannot read
    assert [one.key and one.key.name for one in snapshot.refused] == ["Bad_Name", "b"]
