"""What an operator sees of an agent, in its pod: its status, a packet traced through the kernel, the state to take away."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from e2e.harness.agents import NAME, SYSTEM, Agents
from e2e.harness.settings import MODE
from e2e.harness.stage import SERVERS
from e2e.harness.waiting import eventually
from e2e.harness.world import World
from hack.kind.parts import kubernetes_programs
from nodeproxy.snapshot.take import load
from nodeproxy.snapshot.view import NodeView

pytestmark = pytest.mark.agent


@pytest.fixture
def in_pod(world: World) -> list[str]:
    """The command line that runs `nodeproxy` in the agent's pod on the first node."""
    cluster = world.stage.cluster
    pod = Agents(cluster, world.api).pod(world.stage.a.name)["metadata"]["name"]
    return [f"{kubernetes_programs()}/kubectl", f"--kubeconfig={cluster.kubeconfig}", "-n", SYSTEM, "exec", pod, "--", NAME]


def test_status(in_pod: list[str]) -> None:
    """It says that it is in sync, and in which mode."""

    def in_sync() -> bool:
        done = subprocess.run([*in_pod, "status", "-o", "json"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads(done.stdout)
        assert (found["mode"], found["inSync"], found["source"]["listsComplete"]) == (MODE, True, True), found
        return True

    eventually(in_sync, "the agent is in sync")


def test_trace(world: World, in_pod: list[str]) -> None:
    """What the node's kernel does to a packet of a pod, of the node and from outside is what the forwarding table says.

    Rules of kubelet and of the CNI are in the way, too.
    """
    service = world.service(type="NodePort")
    client = world.stage.client_a
    world.answers(client, service.address, 80, SERVERS)
    servers = {world.stage.pod_address(name) for name in SERVERS}
    for source, destination in (
        (client.address, f"{service.address}:80"),
        ("node", f"{service.address}:80"),
        (world.stage.outside.address, f"{world.stage.a.address}:{service.node_port}"),
    ):
        command = [*in_pod, "trace", source, destination, "-o", "json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        (found,) = json.loads(done.stdout)["traces"]
        assert found["agreement"] == "agrees", done.stdout
        assert {one["backend"].rpartition(":")[0] for one in found["kernel"]["destinations"]} == servers


def test_snapshot(world: World, in_pod: list[str], tmp_path: Path) -> None:
    """The state of the cluster comes out of a pod that can write nowhere, and gives the same frontends elsewhere."""
    service = world.service()
    world.answers(world.stage.client_a, service.address, 80, SERVERS)
    archive = tmp_path / "state.tar.gz"
    with archive.open("wb") as file:
        subprocess.run([*in_pod, "snapshot", "-"], stdout=file, check=True)
    view = NodeView(load(archive))
    assert view.snapshot.config.node_name == world.stage.a.name
    (row,) = [row for row in view.table.rows.values() if service.address in {one.address for one in row.frontends}]
    assert {backend.address for backend in row.cluster_backends} == {world.stage.pod_address(name) for name in SERVERS}
