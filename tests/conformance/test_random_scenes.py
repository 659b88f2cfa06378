"""Random scenes of fixed seeds: what the oracle says of every packet must be what an agent's rules do to it.

With KUBE_PROXY=path/to/kube-proxy the same scenes are run with kube-proxy, without the flows in which it is known to
deviate from SPEC (`hack.scene_oracle.DEVIATIONS`). RANDOM_SCENES=FIRST:COUNT runs other seeds. An agent that is led from
scene to scene must end with the rules of one that starts on the last.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
from test_packet_flows import KUBE_PROXY, check, kube_proxy, nodeproxy_from_manifests

from hack.random_scenes import make_scene
from hack.scene_oracle import Oracle, deviation
from nodeproxy.kernel.ipset import IPSets
from nodeproxy.sandbox.agent import AgentProcess, Variant, nodeproxy_command
from nodeproxy.sandbox.scene import NodeSpec, Scene
from nodeproxy.sandbox.topology import Sandbox

FIRST, _, COUNT = os.environ.get("RANDOM_SCENES", "1:6").partition(":")
SEEDS = range(int(FIRST), int(FIRST) + int(COUNT or 1))
VARIANTS: tuple[Variant, Variant] = ("legacy", "nft")

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("seed", SEEDS)
def test_random_scene(seed: int) -> None:
    scene = make_scene(seed)
    if KUBE_PROXY:
        oracle = Oracle(scene)
        scene = msgspec.structs.replace(scene, flows=[flow for flow in scene.flows if not deviation(oracle, flow)])
    check(scene, VARIANTS[seed % 2], kube_proxy if KUBE_PROXY else nodeproxy_from_manifests)


def kernel_state(box: Sandbox, variant: Variant) -> dict[str, list[str]]:
    """Every chain of the nat and filter tables with its rules, of both families, and the names of our ipsets."""
    state: dict[str, list[str]] = {"sets": sorted(box.node.run(lambda: IPSets().list_names("KUBE-")))}
    for tool in ("iptables", "ip6tables"):
        for table in ("nat", "filter"):
            for line in box.node.command([f"{tool}-{variant}-save", "-t", table]).stdout.splitlines():
                if line.startswith(":"):
                    state[f"{tool} {table} {line[1:].split()[0]}"] = []
                elif line.startswith("-A "):
                    state[f"{tool} {table} {line.split()[1]}"].append(line)
    return state


@contextmanager
def running_agent(node: NodeSpec, first: Scene, variant: Variant) -> Iterator[Sandbox]:
    """An agent on `node` that has programmed `first`, from the manifest file `scene.yaml`."""
    with Sandbox(node_addresses=node.ips) as box:
        (box.directory / "manifests").mkdir()
        put(box, first)
        flags = msgspec.structs.replace(first, node=node).flags()
        with AgentProcess(box, nodeproxy_command(flags, manifests=box.directory / "manifests", variant=variant)):
            yield box


def put(box: Sandbox, scene: Scene) -> None:
    """Replace the manifests by those of a scene, at once."""
    new = scene.write_manifests(box.directory, with_node=True)
    new.rename(box.directory / "manifests" / "scene.yaml")


def settled(box: Sandbox, variant: Variant, wanted: dict[str, list[str]]) -> dict[str, list[str]]:
    """The kernel's state once it is as wanted, or after ten seconds."""
    deadline = time.monotonic() + 10
    while (state := kernel_state(box, variant)) != wanted and time.monotonic() < deadline:
        time.sleep(0.1)
    return state


@pytest.mark.skipif(bool(KUBE_PROXY), reason="about nodeproxy's increments")
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_scene_after_another_equals_a_fresh_start(variant: Variant) -> None:
    scenes = [make_scene(seed) for seed in SEEDS][-3:]
    node = scenes[0].node
    with running_agent(node, scenes[0], variant) as box:
        for scene in scenes[1:]:
            put(box, scene)
            with running_agent(node, scene, variant) as fresh:
                wanted = kernel_state(fresh, variant)
            assert settled(box, variant, wanted) == wanted
