"""kube-proxy in a network namespace, programmed by a control plane outside of it."""

import asyncio
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from hack.controlplane import ControlPlane
from hack.controlplane.load import Load, Shape, node
from hack.controlplane.peer import KubeProxyPeer

pytestmark = [pytest.mark.controlplane, pytest.mark.kernel]

# Of this process, so that two runs do not meet.
NODE = f"cp-{os.getpid()}"
OUTSIDE, INSIDE = (f"10.254.{os.getpid() % 256}.{host}" for host in (1, 2))


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True)


def rules(variant: str) -> str:
    command = ["ip", "netns", "exec", NODE, f"iptables-{variant}-save", "-t", "nat"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace with a way to us."""
    ip(f"netns add {NODE}")
    try:
        ip(f"link add {NODE} type veth peer name eth0 netns {NODE}")
        ip(f"address add {OUTSIDE}/30 dev {NODE}")
        ip(f"link set {NODE} up")
        for command in ("link set lo up", f"address add {INSIDE}/30 dev eth0", "link set eth0 up"):
            ip(f"-n {NODE} {command}")
        yield NODE
    finally:
        # The namespace goes some time after its name; the next test's link must not meet this one.
        subprocess.run(["ip", "link", "del", NODE], check=False, capture_output=True)
        ip(f"netns del {NODE}")


@pytest.mark.parametrize("variant", ["legacy", "nft"])
async def test_kube_proxy_programs_what_the_api_server_has(
    namespace: str, variant: Literal["legacy", "nft"], tmp_path: Path
) -> None:
    shape = Shape(services=3, endpoints=2, node_ports=0.5)
    with ControlPlane(bind_address=OUTSIDE, authorization="AlwaysAllow") as cluster:
        cluster.write_kubeconfig(tmp_path / "kubeconfig")
        cluster.request("POST", "/api/v1/nodes", node("test-node", [INSIDE]))
        async with Load(cluster.access, shape) as load:
            await load.create()
            with KubeProxyPeer(netns=namespace, kubeconfig=tmp_path / "kubeconfig", iptables_variant=variant) as peer:
                peer.wait_synced(60)
                written = rules(variant)
                for service in load.services.values():
                    assert f"-d {service['spec']['clusterIP']}/32" in written
                assert f"-d {OUTSIDE}" not in rules("nft" if variant == "legacy" else "legacy")
                assert f"--to-destination {shape.address('IPv4', 2, 1)}:8080" in written
                assert "kubeproxy_sync_proxy_rules_duration_seconds_count" in peer.metrics()

                address = await load.update_slice(2, 1)
                deadline = time.monotonic() + 30
                while f"--to-destination {address}:8080" not in rules(variant):
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.1)


def test_a_control_plane_inside_the_namespace_is_usable_from_outside(namespace: str) -> None:
    with ControlPlane(netns=namespace, authorization="AlwaysAllow") as cluster:
        assert cluster.request("GET", "/api/v1/namespaces/default")["metadata"]["name"] == "default"
        cluster.compact()


async def test_load_reaches_a_control_plane_inside_the_namespace(namespace: str) -> None:
    with ControlPlane(netns=namespace, bind_address=INSIDE, names=["node.test"]) as cluster:
        async with Load(cluster.access, Shape(services=5, endpoints=1)) as load:
            await load.create()
        assert len(cluster.request("GET", "/api/v1/namespaces/load/services")["items"]) == 5
        endpoints = cluster.request("GET", "/api/v1/namespaces/default/endpoints/kubernetes")
        assert endpoints["subsets"][0]["addresses"] == [{"ip": INSIDE}]
