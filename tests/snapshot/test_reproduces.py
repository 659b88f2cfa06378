"""A snapshot of a node, taken by command from what its agent sees, programs the same rules byte for byte."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hack.random_scenes import make_scene
from nodeproxy.sandbox.agent import AgentProcess, nodeproxy_command
from nodeproxy.sandbox.namespace import Namespace
from nodeproxy.sandbox.scene import Scene, load_scenes
from nodeproxy.sandbox.topology import Sandbox
from tests.conformance.static_apiserver import PORT, serving
from tests.ways import LEGACY, NFT, Way

NODEPROXY = str(Path(sys.executable).with_name("nodeproxy"))
SCENES = {scene.name: scene for scene in load_scenes(Path(__file__).parents[1] / "conformance/packet_flows.json")}

pytestmark = pytest.mark.kernel


def rules(node: Namespace, variant: str) -> list[str]:
    """What iptables-save prints, without counters and times."""
    saved = []
    for tool in ("iptables", "ip6tables"):
        for table in ("mangle", "nat", "filter"):
            lines = node.command([f"{tool}-{variant}-save", "-t", table]).stdout.splitlines()
            saved += [line.split(" [")[0] for line in lines if not line.startswith("#")]
    return saved


@contextmanager
def node_of(scene: Scene) -> Iterator[Sandbox]:
    with Sandbox(node_addresses=scene.node.ips) as box:
        yield box


def snapshot(box: Sandbox, *arguments: str) -> Path:
    target = box.directory / "snapshot"
    box.node.command([NODEPROXY, "snapshot", str(target), *arguments])
    return target


def programmed_from(scene: Scene, target: Path, way: Way) -> list[str]:
    """The rules that an agent programs on a node like that of the scene, from a snapshot alone."""
    command = [NODEPROXY, "run", "--manifests", str(target), "--config", str(target / "config.conf")]
    with node_of(scene) as box, AgentProcess(box, [*command, "--iptables-variant", way.variant]):
        return rules(box.node, way.variant)


SOME = [SCENES[name] for name in sorted(SCENES)[:2]] + [make_scene(seed) for seed in (4, 9)]


@pytest.mark.parametrize("scene", SOME, ids=lambda scene: scene.name)
def test_of_a_running_agent(scene: Scene, tmp_path: Path) -> None:
    way = (LEGACY, NFT)[len(scene.name) % 2]
    with node_of(scene) as box:
        (box.directory / "manifests").mkdir()
        scene.write_manifests(box.directory / "manifests")
        command = nodeproxy_command(scene.flags(), manifests=box.directory / "manifests", variant=way.variant)
        with AgentProcess(box, command):
            taken = snapshot(box).rename(tmp_path / "snapshot")
            wanted = rules(box.node, way.variant)
    assert sum("KUBE-SVC" in line or "REJECT" in line or "DROP" in line for line in wanted) > 3
    assert programmed_from(scene, taken, way) == wanted


def test_of_an_api_server_without_an_agent(tmp_path: Path) -> None:
    scene = next(one for one in map(make_scene, range(1, 20)) if one.node.detect_local)
    master = f"http://127.0.0.1:{PORT}"
    with node_of(scene) as box, serving(box.node, scene.objects(with_node=True)):
        flags = scene.flags()
        taken = snapshot(
            box,
            *("--master", master, "--hostname-override", flags.hostname, "--cluster-cidr", flags.cluster_cidr),
            *("--nodeport-addresses", ",".join(flags.nodeport_addresses)),
            f"--iptables-localhost-nodeports={flags.localhost_nodeports}",
            f"--masquerade-all={flags.masquerade_all}",
        ).rename(tmp_path / "snapshot")
        with AgentProcess(box, nodeproxy_command(flags, master=master, variant="nft")):
            wanted = rules(box.node, "nft")
    assert "API server (master http://127.0.0.1:8001)" in (taken / "SNAPSHOT").read_text()
    assert programmed_from(scene, taken, NFT) == wanted
