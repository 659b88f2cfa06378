"""Random scenes of fixed seeds: what the oracle says of every packet must be what becomes of it, in both modes.

With KUBE_PROXY=path/to/kube-proxy the same scenes are run with kube-proxy, without the flows in which it is known to
deviate from SPEC (`hack.scene_oracle.DEVIATIONS`). RANDOM_SCENES=FIRST:COUNT runs other seeds. An agent that is led from
scene to scene must end with the rules of one that starts on the last.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address

import msgspec
import pytest
from test_packet_flows import KUBE_PROXY, check, kube_proxy, nodeproxy_from_manifests

from hack.random_scenes import make_scene
from hack.scene_oracle import Oracle, deviation
from nodeproxy.kernel.ipset import IPSets
from nodeproxy.kernel.ipvs import IPVS
from nodeproxy.sandbox.agent import AgentProcess, nodeproxy_command
from nodeproxy.sandbox.pace import scaled
from nodeproxy.sandbox.scene import Flow, NodeSpec, Scene
from nodeproxy.sandbox.topology import Sandbox
from tests.ways import IPVS_LEGACY, IPVS_NFT, LEGACY, NFT, Way, ipvs

FIRST, _, COUNT = os.environ.get("RANDOM_SCENES", "1:6").partition(":")
SEEDS = range(int(FIRST), int(FIRST) + int(COUNT or 1))
WAYS = (LEGACY, NFT)

pytestmark = pytest.mark.kernel


def in_both_modes() -> Iterator[object]:
    """Each seed in one variant of iptables mode, and in IPVS mode with the other."""
    for seed in SEEDS:
        yield pytest.param(seed, WAYS[seed % 2], id=f"{seed}-{WAYS[seed % 2]}")
        way = (IPVS_NFT, IPVS_LEGACY)[seed % 2]
        yield ipvs(seed, way, id=f"{seed}-{way}")


@pytest.mark.parametrize(("seed", "way"), list(in_both_modes()))
def test_random_scene(seed: int, way: Way) -> None:
    scene = make_scene(seed)
    if KUBE_PROXY:
        oracle = Oracle(scene)
        scene = msgspec.structs.replace(scene, flows=[flow for flow in scene.flows if not deviation(oracle, flow)])
    if way.mode == "ipvs":
        scene = msgspec.structs.replace(scene, flows=[flow for flow in scene.flows if possible_in_ipvs_mode(scene, flow)])
    check(scene, way, kube_proxy if KUBE_PROXY else nodeproxy_from_manifests)


def possible_in_ipvs_mode(scene: Scene, flow: Flow) -> bool:
    """Not from a loopback source, which IPVS sends nowhere, nor from outside by an address that is on the node."""
    if ip_address(flow.source).is_loopback:
        return ip_address(flow.destination).is_loopback
    return flow.source not in scene.service_addresses() or flow.source == flow.destination


def kernel_state(box: Sandbox, way: Way) -> dict[str, list[str]]:
    """All that a mode holds in the kernel, both families: chains with their rules, ipsets, virtual servers, addresses."""
    if way.mode == "iptables":
        sets = sorted(box.node.run(lambda: IPSets().list_names("KUBE-")))
    else:
        sets = sorted(box.node.command(["ipset", "save"]).stdout.splitlines())
    state: dict[str, list[str]] = {"sets": sets}
    for tool in ("iptables", "ip6tables"):
        for table in ("mangle", "nat", "filter"):
            for line in box.node.command([f"{tool}-{way.variant}-save", "-t", table]).stdout.splitlines():
                if line.startswith(":"):
                    state[f"{tool} {table} {line[1:].split()[0]}"] = []
                elif line.startswith("-A "):
                    state[f"{tool} {table} {line.split()[1]}"].append(line)
    if way.mode == "ipvs":
        state["servers"] = box.node.run(virtual_servers)
        listing = box.node.command(["ip", "-o", "address", "show", "dev", "kube-ipvs0"]).stdout
        state["addresses"] = sorted(line.split()[3] for line in listing.splitlines())
    return state


def virtual_servers() -> list[str]:
    """Virtual servers of this namespace, with the real servers that take connections."""
    with IPVS() as ipvs:
        return sorted(
            f"{server} {settings} {sorted(str(real.server) for real in ipvs.real_servers(server) if real.weight)}"
            for server, settings in ipvs.virtual_servers().items()
        )


@contextmanager
def running_agent(node: NodeSpec, first: Scene, way: Way) -> Iterator[Sandbox]:
    """An agent on `node` that has programmed `first`, from the manifest file `scene.yaml`."""
    with Sandbox(node_addresses=node.ips) as box:
        (box.directory / "manifests").mkdir()
        put(box, first)
        flags = msgspec.structs.replace(first, node=node).flags(way.mode)
        with AgentProcess(box, nodeproxy_command(flags, manifests=box.directory / "manifests", variant=way.variant)):
            yield box


def put(box: Sandbox, scene: Scene) -> None:
    """Replace the manifests by those of a scene, at once."""
    new = scene.write_manifests(box.directory, with_node=True)
    new.rename(box.directory / "manifests" / "scene.yaml")


def settled(box: Sandbox, way: Way, wanted: dict[str, list[str]]) -> dict[str, list[str]]:
    """The kernel's state once it is as wanted, or after ten seconds."""
    deadline = time.monotonic() + scaled(10)
    while (state := kernel_state(box, way)) != wanted and time.monotonic() < deadline:
        time.sleep(0.1)
    return state


@pytest.mark.skipif(bool(KUBE_PROXY), reason="about nodeproxy's increments")
@pytest.mark.parametrize("way", [LEGACY, NFT, ipvs(IPVS_NFT)], ids=str)
def test_one_scene_after_another_equals_a_fresh_start(way: Way) -> None:
    scenes = [make_scene(seed) for seed in SEEDS][-3:]
    node = scenes[0].node
    with running_agent(node, scenes[0], way) as box:
        for scene in scenes[1:]:
            put(box, scene)
            with running_agent(node, scene, way) as fresh:
                wanted = kernel_state(fresh, way)
            assert settled(box, way, wanted) == wanted
