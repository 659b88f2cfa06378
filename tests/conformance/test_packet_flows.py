"""Every scene of packet_flows.json, sent as real packets through what an agent programmed, in both modes and variants.

The agent is nodeproxy, fed from a manifest directory. With KUBE_PROXY=path/to/kube-proxy in the environment the same
scenes are run with kube-proxy instead: what it passes shows that the sandbox and the runner judge rightly.
NODEPROXY_SCENES=path/to/scenes.json runs other scenes of the same format. `--master` of nodeproxy is tried on one
scene in each family.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from static_apiserver import PORT, serving

from nodeproxy.sandbox.agent import (
    AgentProcess,
    kube_proxy_command,
    nodeproxy_command,
    variant_environment,
)
from nodeproxy.sandbox.flows import run_scene
from nodeproxy.sandbox.scene import Layout, Scene, load_scenes
from tests.ways import IPVS_LEGACY, IPVS_NFT, LEGACY, NFT, Way, ipvs

KUBE_PROXY = os.environ.get("KUBE_PROXY")
FILE = Path(os.environ.get("NODEPROXY_SCENES") or Path(__file__).with_name("packet_flows.json"))
SCENES = {scene.name: scene for scene in load_scenes(FILE)}
MASTER = f"http://127.0.0.1:{PORT}"

pytestmark = pytest.mark.kernel


@contextmanager
def nodeproxy_from_manifests(layout: Layout, way: Way) -> Iterator[AgentProcess]:
    manifests = layout.box.directory / "manifests"
    manifests.mkdir()
    layout.scene.write_manifests(manifests)
    command = nodeproxy_command(layout.scene.flags(way.mode), manifests=manifests, variant=way.variant)
    with AgentProcess(layout.box, command) as agent:
        yield agent


@contextmanager
def nodeproxy_from_api_server(layout: Layout, way: Way) -> Iterator[AgentProcess]:
    with serving(layout.box.node, layout.scene.objects(with_node=True)):
        command = nodeproxy_command(layout.scene.flags(way.mode), master=MASTER, variant=way.variant)
        with AgentProcess(layout.box, command) as agent:
            yield agent


@contextmanager
def kube_proxy(layout: Layout, way: Way) -> Iterator[AgentProcess]:
    with serving(layout.box.node, layout.scene.objects(with_node=True)):
        command = kube_proxy_command(Path(KUBE_PROXY or ""), layout.scene.flags(way.mode), master=MASTER)
        with AgentProcess(layout.box, command, environment=variant_environment(layout.box, way.variant)) as agent:
            agent.wait_metric("kubeproxy_sync_proxy_rules_last_timestamp_seconds", series=2)
            yield agent


Start = Callable[[Layout, Way], AbstractContextManager[AgentProcess]]


def check(scene: Scene, way: Way, start: Start) -> None:
    log = "(not started)"

    @contextmanager
    def started(layout: Layout) -> Iterator[AgentProcess]:
        nonlocal log
        with start(layout, way) as agent:
            yield agent
            log = agent.log_tail()

    results = run_scene(scene, started, way.variant, way.mode)
    wrong = [str(result) for result in results if result.problems]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(scene.flows)} flows differ:", *wrong, "agent log:", log])
    assert len(results) == len(scene.flows)
    assert "putting it back" not in log, f"nobody changed anything:\n{log}"


def in_all_ways() -> Iterator[object]:
    """Each scene in both variants of iptables mode, and in IPVS mode with the variants in turn."""
    for number, (name, scene) in enumerate(SCENES.items()):
        for way in (LEGACY, NFT):
            yield pytest.param(scene, way, id=f"{name}-{way}")
        way = (IPVS_LEGACY, IPVS_NFT)[number % 2]
        yield ipvs(scene, way, id=f"{name}-{way}")


@pytest.mark.parametrize(("scene", "way"), list(in_all_ways()))
def test_packet_flows(scene: Scene, way: Way) -> None:
    check(scene, way, kube_proxy if KUBE_PROXY else nodeproxy_from_manifests)


@pytest.mark.skipif(bool(KUBE_PROXY), reason="kube-proxy is always fed from an API server")
@pytest.mark.parametrize("name", ["scene-10", "scene-14"])
def test_packet_flows_from_api_server(name: str) -> None:
    check(SCENES[name], NFT, nodeproxy_from_api_server)
