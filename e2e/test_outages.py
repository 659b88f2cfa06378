"""Nodes that restart, and a control plane that is away."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from e2e.harness.agents import Agents
from e2e.harness.flow import Lane
from e2e.harness.objects import port, udp_port
from e2e.harness.pace import scaled
from e2e.harness.places import docker
from e2e.harness.settings import PROXY
from e2e.harness.stage import A1, A2, ON_A, SERVERS, B, Stage, is_ready
from e2e.harness.waiting import eventually
from e2e.harness.world import World
from hack.kind.places import KindError

pytestmark = [pytest.mark.disruptive]

_MANIFEST = "/etc/kubernetes/manifests/kube-apiserver.yaml"
_ASIDE = "/etc/kubernetes/kube-apiserver.yaml.aside"


def test_a_node_restarts(world: World) -> None:
    """A node that restarts serves again what it served, from nothing; the others notice nothing.

    Requests that have to do with the other nodes only are all answered. When the node is back its pods have other
    addresses, and it reaches, and is reached by, everybody.
    """
    stage = world.stage
    service = world.service(ports=[port(), udp_port()], type="NodePort")
    local = world.service("local", selector=ON_A, type="NodePort", externalTrafficPolicy="Local")
    elsewhere = world.service("elsewhere", selector=ON_A)
    world.answers(stage.client_b, service.address, 80, SERVERS)
    for place in (stage.client_a, stage.node_a):
        world.answers(place, elsewhere.address, 80, {A1, A2})
    world.answers(stage.outside, stage.a.address, local.node_port, {A1, A2})
    lanes = world.lanes((stage.client_a, stage.node_a), elsewhere.address, 80, "connection", "stream")
    before = {name: restarts(world, name) for name in ("client-b", "server-b")}
    with world.requests(*lanes, Lane(stage.outside, stage.a.address, local.node_port)) as requests:
        docker("restart", "--time", "10", stage.b.name)
        eventually(
            lambda: all(restarts(world, name) > count for name, count in before.items()),
            "the pods of the node were started again",
            within=180,
            poll=1,
        )
        stage.wait_ready(*before, within=120)
        print(requests.steady(least=100))
    if PROXY == "nodeproxy":
        Agents(stage.cluster, world.api).wait_ready(stage.b.name)
    stage.look_again()
    for place in stage.inside:
        world.answers(place, service.address, 80, SERVERS, within=60)
        world.answers(place, service.address, 80, SERVERS, protocol="UDP")
    for node in stage.nodes:
        world.answers(stage.outside, node.address, service.node_ports["http"], SERVERS)


def restarts(world: World, pod: str) -> int:
    """How often its container was started again; not counted before it is ready."""
    found = world.api.get("Pod", pod)
    return int(found["status"]["containerStatuses"][0]["restartCount"]) if is_ready(found) else 0


def test_the_api_server_is_down(world: World) -> None:
    """Without the API server for a minute, Services go on as they are; what changed is programmed soon after it is back.

    Agents stay healthy meanwhile: they are not started again, and load balancers do not take their nodes out.
    """
    stage = world.stage
    service = world.service(ports=[port(), udp_port()], type="NodePort")
    changing = world.service("changing", selector=None)  # by hand: the controllers take longer to come back
    lost, _ = (world.slice(changing, [world.endpoint(pod)]) for pod in (A1, B))
    for place in stage.inside:
        world.answers(place, service.address, 80, SERVERS)
        world.answers(place, changing.address, 80, {A1, B})
    lanes = world.lanes(stage.inside, service.address, 80, "connection", "stream", "udp", pause=0.05)
    lanes += [Lane(stage.outside, node.address, service.node_ports["http"]) for node in stage.nodes]
    world.answers(stage.outside, stage.nodes[-1].address, service.node_ports["http"], SERVERS)
    with world.requests(*lanes) as requests:
        with api_server_down(stage):
            began = time.monotonic()
            while time.monotonic() - began < 60:
                assert stage.outside.get(f"http://{stage.a.address}:10256/healthz")[0] == 200
                time.sleep(5)
        print(requests.steady(least=200))
    world.api.delete("EndpointSlice", lost)
    for place in (stage.client_a, stage.client_b):
        world.answers(place, changing.address, 80, {B}, count=10, within=60)  # agents pause for 30 s at most
    fresh = world.service("fresh")
    for place in stage.inside:
        world.answers(place, fresh.address, 80, SERVERS, within=240)


@contextmanager
def api_server_down(stage: Stage) -> Iterator[None]:
    """The API server's static pod is taken away, and put back at the end."""
    node = next(node.name for node in stage.cluster.nodes() if node.role == "control-plane")
    stage.cluster.exec(node, "mv", _MANIFEST, _ASIDE)
    try:
        for container in stage.cluster.exec(node, "crictl", "ps", "--quiet", "--name", "^kube-apiserver$").split():
            with suppress(KindError):  # kubelet, which sees that the manifest is gone, may be faster
                stage.cluster.exec(node, "crictl", "--timeout", "30s", "stop", "--timeout", "0", container)
        eventually(lambda: not answers(stage), "the API server is down", within=60)
        yield
    finally:
        stage.cluster.exec(node, "mv", _ASIDE, _MANIFEST)
        eventually(lambda: answers(stage), "the API server is back", within=180, poll=1)
        eventually(lambda: all_ready(stage), "the controllers are back", within=240, poll=1)


def all_ready(stage: Stage) -> bool:
    """Whether the control plane's pods are; controllers that have lost the API server are started anew, with pauses."""
    pods = stage.api.list("Pod", "tier=control-plane", "kube-system")
    return len(pods) >= 4 and all(is_ready(pod) for pod in pods)


def answers(stage: Stage) -> bool:
    """Whether the API server says that it is ready."""
    try:
        return "ok" in stage.cluster.kubectl("get", "--raw", "/readyz", f"--request-timeout={scaled(5):.0f}s")
    except KindError:
        return False
