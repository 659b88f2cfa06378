"""Snapshots on disk: what is written, that it is read back, and that nothing else is overwritten."""

from __future__ import annotations

import asyncio
import io
import tarfile
from pathlib import Path

import msgspec
import pytest
import yaml
from click.testing import CliRunner
from structlog.testing import capture_logs

from hack.random_scenes import make_scene
from hack.scene_oracle import snapshot_of_scene
from nodeproxy.cli.main import main_group
from nodeproxy.configuration.agent_config import AgentConfig, Mode
from nodeproxy.snapshot import directory as directory_module
from nodeproxy.snapshot.model import Snapshot, SnapshotError
from nodeproxy.snapshot.take import load, save, take
from nodeproxy.snapshot.view import NodeView

SNAPSHOT = msgspec.structs.replace(snapshot_of_scene(make_scene(3)), node_addresses=("192.168.0.2", "2001:db8::2"))


@pytest.fixture(params=["dir", "shot.tar.gz"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


def same_forwarding(one: Snapshot, other: Snapshot) -> bool:
    first, second = NodeView(one), NodeView(other)
    return (first.table, first.facts, first.programmer_config) == (second.table, second.facts, second.programmer_config)


@pytest.mark.parametrize("seed", range(1, 13))
def test_what_is_written_is_read_back(seed: int, path: Path) -> None:
    snapshot = snapshot_of_scene(make_scene(seed))
    save(snapshot, path)
    loaded = load(path)
    assert same_forwarding(snapshot, loaded)
    assert (loaded.taken, loaded.node_addresses, loaded.refused) == (snapshot.taken, snapshot.node_addresses, ())
    assert loaded.origin == f"snapshot {path} of {snapshot.origin}"


def test_it_is_written_again_over_an_older_one(path: Path) -> None:
    save(SNAPSHOT, path)
    fewer = msgspec.structs.replace(SNAPSHOT, objects=())
    save(fewer, path)
    assert load(path).objects == ()


def test_settings_without_a_field_in_a_configuration_file_are_kept_and_where_it_came_from_is_not(path: Path) -> None:
    config = AgentConfig(
        node_name="n", mode=Mode.IPVS, iptables_variant="legacy", ipvs_drain_timeout=7.0,
        kubeconfig=Path("/secret/kubeconfig"), service_proxy_name="other",
    )  # fmt: skip
    save(msgspec.structs.replace(SNAPSHOT, config=config, objects=()), path)
    loaded = load(path).config
    assert (loaded.mode, loaded.iptables_variant, loaded.ipvs_drain_timeout) == (Mode.IPVS, "legacy", 7.0)
    assert (loaded.kubeconfig, loaded.service_proxy_name, loaded.manifests) == (None, None, None)


def test_services_of_another_proxy_name_need_no_flag_to_be_read(tmp_path: Path) -> None:
    labels = {"service.kubernetes.io/service-proxy-name": "other"}
    obj = {"kind": "Service", "metadata": {"name": "a", "labels": labels}, "spec": {"clusterIP": "10.96.0.1"}}
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.yaml").write_text(yaml.safe_dump(obj))
    config = AgentConfig(node_name="n", manifests=tmp_path / "in", service_proxy_name="other")
    taken = asyncio.run(take(config))
    save(taken, tmp_path / "out")
    assert [one.key.name for one in load(tmp_path / "out").objects] == ["a"]


def test_a_large_state_is_spread_over_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "_FILE_BYTES", 1000)
    save(SNAPSHOT, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("services-*.json"))) > 1
    assert same_forwarding(load(tmp_path / "out"), SNAPSHOT)


def test_a_plain_directory_of_manifests_can_be_read(tmp_path: Path) -> None:
    scene = make_scene(3)
    scene.write_manifests(tmp_path, with_node=True)
    (tmp_path / "config.conf").write_text(
        f"apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nhostnameOverride: {scene.node.name}\n"
    )
    loaded = load(tmp_path)
    assert loaded.origin == f"manifests {tmp_path}"
    assert NodeView(loaded).state.services == NodeView(SNAPSHOT).state.services


def test_a_plain_directory_is_looked_at_from_the_node_that_is_named(tmp_path: Path) -> None:
    for name in ("node-a", "node-b"):
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(node))
    assert [obj.key.name for obj in load(tmp_path, "node-b").objects] == ["node-b"]


@pytest.mark.parametrize("name", ["target", "target.tar.gz"])
def test_nothing_else_is_overwritten(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    if name == "target":
        target.mkdir()
        (target / "mine.txt").write_text("mine")
    else:
        target.write_text("mine")
    with pytest.raises(SnapshotError, match="target"):
        save(SNAPSHOT, target)
    assert (target / "mine.txt" if target.is_dir() else target).read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_empty_directory_may_be_used(tmp_path: Path) -> None:
    save(SNAPSHOT, tmp_path)
    assert same_forwarding(load(tmp_path), SNAPSHOT)


def test_an_archive_writes_nowhere_else(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as archive:
        for name in ("../../escaped", "/tmp/absolute", "SNAPSHOT"):
            member = tarfile.TarInfo(name)
            member.size = 2
            archive.addfile(member, io.BytesIO(b"{}"))
    with pytest.raises(SnapshotError, match="SNAPSHOT"):
        load(tmp_path / "bad.tar.gz")
    assert not (tmp_path.parent / "escaped").exists() and not Path("/tmp/absolute").exists()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_text("no archive"), "neither a directory nor a .tar.gz"),
        (lambda path: (path.mkdir(), (path / "SNAPSHOT").write_text("{")), "SNAPSHOT: Input data was truncated"),
        (lambda path: (path.mkdir(), (path / "SNAPSHOT").write_bytes(b'{"nodeproxy":"\xff"}')), "SNAPSHOT: 'utf-8' codec"),
        (lambda path: (path.mkdir(), (path / "config.conf").write_text("mode: x")), "config.conf"),
    ],
)
def test_one_clear_line_where_it_cannot_be_read(tmp_path: Path, make: object, says: str) -> None:
    make(tmp_path / "x")  # type: ignore[operator]
    done = CliRunner().invoke(main_group, ["snapshot", str(tmp_path / "out"), "--snapshot", str(tmp_path / "x")])
    assert done.exit_code == 1
    assert done.output.startswith("nodeproxy: ") and says in done.output and done.output.count("\n") == 1


def test_flags_count_before_what_the_snapshot_says(tmp_path: Path) -> None:
    save(SNAPSHOT, tmp_path / "a")
    arguments = ["snapshot", str(tmp_path / "b"), "--snapshot", str(tmp_path / "a"), "--mode", "ipvs", "--masquerade-all"]
    assert CliRunner().invoke(main_group, arguments).exit_code == 0
    config = load(tmp_path / "b").config
    assert (config.mode, config.masquerade_all) == (Mode.IPVS, True)
    done = CliRunner().invoke(main_group, [*arguments, "--cluster-cidr", "x"])
    assert done.exit_code == 1 and "--cluster-cidr: 'x' is not a CIDR" in done.output


def test_a_source_beside_a_snapshot_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(main_group, ["snapshot", "x", "--snapshot", "y", "--manifests", str(tmp_path)])
    assert done.exit_code == 2 and "--manifests" in done.output


def test_what_is_refused_is_told_and_not_written(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    good = {"kind": "Service", "metadata": {"name": "good"}, "spec": {"clusterIP": "10.96.0.1"}}
    bad = [{"kind": "Service", "metadata": {"name": "bad"}, "spec": {"ports": "x"}},
           {"kind": "Service", "metadata": {"name": "Bad\x1b[31m"}, "spec": {"clusterIP": "10.96.0.2"}}]  # fmt: skip
    (tmp_path / "in/a.yaml").write_text(yaml.safe_dump_all([good, *bad]))
    arguments = ["snapshot", str(tmp_path / "out"), "--manifests", str(tmp_path / "in"), "--hostname-override", "n"]
    done = CliRunner().invoke(main_group, arguments)
    assert done.exit_code == 0, done.output
    assert "1 Services; 2 refused, not written" in done.output
    assert done.output.count("left out: Service default/bad: spec.ports: ") == 1
    assert "metadata.name: 'Bad\\x1b[31m' is not a DNS label" in done.output and "\x1b" not in done.output
    assert [one.key.name for one in load(tmp_path / "out").objects] == ["good"]


def spoiled(directory: Path, **fields: object) -> Path:
    """A snapshot whose file SNAPSHOT says something else."""
    save(SNAPSHOT, directory)
    about = msgspec.json.decode((directory / "SNAPSHOT").read_bytes())
    (directory / "SNAPSHOT").write_bytes(msgspec.json.encode(about | fields))
    return directory


@pytest.mark.parametrize("bad", ["host", "10.0.0.1%e", "::ffff:10.0.0.1", "fe80::1%eth0", "\x1b[31m", ""])
def test_an_address_that_is_none_is_named(tmp_path: Path, bad: str) -> None:
    with pytest.raises(SnapshotError) as told:
        load(spoiled(tmp_path, nodeAddresses=["10.0.0.1", bad]))
    assert str(told.value) == f"{tmp_path}: SNAPSHOT: nodeAddresses[1]: {bad!a} is not an IP address"


def test_addresses_are_canonical_however_they_are_written(tmp_path: Path) -> None:
    assert load(spoiled(tmp_path, nodeAddresses=["2001:DB8:0::2"])).node_addresses == ("2001:db8::2",)


def test_what_a_snapshot_says_of_itself_commands_no_terminal(tmp_path: Path) -> None:
    loaded = load(spoiled(tmp_path, origin="a\x1b]0;b\x07\nc", taken="\x1b[31m"))
    assert loaded.origin == f"snapshot {tmp_path} of a\\x1b]0;b\\x07\\x0ac"
    assert loaded.taken == "\\x1b[31m"


def test_an_error_commands_no_terminal(tmp_path: Path) -> None:
    done = CliRunner().invoke(main_group, ["snapshot", "-", "--snapshot", str(tmp_path / "\x1b[31m")])
    assert done.exit_code == 1
    assert done.output == f"nodeproxy: {tmp_path}/\\x1b[31m: no such file or directory\n"


@pytest.mark.parametrize("target", ["out", "out.tar.gz", "-"])
def test_the_target_may_come_after_anonymise(tmp_path: Path, target: str) -> None:
    save(SNAPSHOT, tmp_path / "in")
    where = target if target == "-" else str(tmp_path / target)
    done = CliRunner().invoke(main_group, ["snapshot", "--anonymise", where, "--snapshot", str(tmp_path / "in")])
    assert done.exit_code == 0, done.output
    assert "anonymised" in done.stderr + done.stdout_bytes.decode(errors="replace")


def warnings(directory: Path, node_name: str | None = None) -> list[tuple[object, object]]:
    """What is said of numbers of objects when a snapshot is read."""
    with capture_logs() as logs:
        load(directory, node_name)
    return [(one["objects"], one["written"]) for one in logs]


def test_what_is_refused_is_named_by_what_the_user_knows(path: Path, tmp_path: Path) -> None:
    directory = path if path.name == "dir" else tmp_path / "unpacked"
    save(SNAPSHOT, directory)
    (directory / "services-001.json").write_text('{"kind": "List", "items": [')
    if directory != path:
        with tarfile.open(path, "w:gz") as archive:
            archive.add(directory, "shot")
    assert [one.origin for one in load(path).refused] == [f"{path}/services-001.json, document 1"]


def test_objects_that_are_missing_are_told_and_no_error(tmp_path: Path) -> None:
    save(SNAPSHOT, tmp_path)
    count = len(SNAPSHOT.objects)
    assert (warnings(tmp_path), warnings(tmp_path, "another-node")) == ([], [])
    more = {"kind": "Service", "metadata": {"name": "more"}, "spec": {"clusterIP": "10.96.200.1"}}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(more))
    assert warnings(tmp_path) == []
    (tmp_path / "more.yaml").unlink()
    services = tmp_path / "services-001.json"
    lines = services.read_text().splitlines()
    services.write_text("\n".join([lines[0], *lines[2:]]))
    assert warnings(tmp_path) == [(count - 1, count)]
    services.write_text("\n".join([lines[0], lines[1].replace('"ports":[', '"ports":[7,', 1), *lines[2:]]))
    assert warnings(tmp_path) == []  # it is there, and told as what could not be read


def test_it_is_written_to_standard_output_where_nothing_else_can_be_written(tmp_path: Path) -> None:
    scene = make_scene(3)
    scene.write_manifests(tmp_path, with_node=True)
    result = CliRunner().invoke(
        main_group, ["snapshot", "-", "--manifests", str(tmp_path), "--hostname-override", scene.node.name]
    )
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith("-: ")
    archive = tmp_path / "shot.tar.gz"
    archive.write_bytes(result.stdout_bytes)
    assert NodeView(load(archive)).state.services == NodeView(SNAPSHOT).state.services
