"""What happens to agents and to their rules, while requests flow: killed, upgraded, configured, flushed, flooded.

Requests come from pods, from nodes and from outside, to a cluster IP and to a node port, as new connections, as streams that
last, and as UDP from one port. None may fail where nothing but the agent is touched.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from e2e.harness import objects
from e2e.harness.agents import Agents
from e2e.harness.flow import Lane
from e2e.harness.objects import OWNED, port, udp_port
from e2e.harness.pace import scaled
from e2e.harness.settings import MODE
from e2e.harness.stage import SERVERS, B
from e2e.harness.waiting import eventually
from e2e.harness.world import Service, World
from nodeproxy.kernel.ipvs import IPVS

pytestmark = [pytest.mark.disruptive, pytest.mark.agent]


@pytest.fixture
def agents(world: World) -> Agents:
    return Agents(world.stage.cluster, world.api)


@pytest.fixture
def service(world: World) -> Service:
    """All servers, by TCP and UDP, at a node port too; everybody is served."""
    made = world.service(ports=[port(), udp_port()], type="NodePort")
    for place in world.stage.inside:
        world.answers(place, made.address, 80, SERVERS)
        world.answers(place, made.address, 80, SERVERS, protocol="UDP")
    for node in world.stage.nodes:
        world.answers(world.stage.outside, node.address, made.node_ports["http"], SERVERS)
    return made


@pytest.fixture
def lanes(world: World, service: Service) -> list[Lane]:
    """Requests of every kind from everywhere."""
    found = world.lanes(world.stage.inside, service.address, 80, "connection", "stream", "udp", pause=0.03)
    for node in world.stage.nodes:
        found.append(Lane(world.stage.outside, node.address, service.node_ports["http"], "connection", 0.03))
        found.append(Lane(world.stage.outside, node.address, service.node_ports["http"], "stream", 0.03))
    return found


@pytest.mark.smoke
def test_an_agent_is_killed(world: World, agents: Agents, lanes: list[Lane]) -> None:
    """An agent killed outright is missed by nobody, is started again, and then programs what changed meanwhile."""
    a = world.stage.a
    with world.requests(*lanes) as requests:
        before = agents.restarts(a.name)
        agents.kill(a.name)
        late = world.service("late")
        agents.wait_ready(a.name, restarts=before + 1)
        for place in (world.stage.client_a, world.stage.client_b):
            world.answers(place, late.address, 80, SERVERS)
        time.sleep(1)
        print(requests.steady())


def test_an_upgrade(world: World, agents: Agents, lanes: list[Lane]) -> None:
    """A roll-out of another image, node by node, and back, is noticed by nobody; Services made meanwhile are served."""
    for node in world.stage.nodes:
        source, target = (f"docker.io/library/nodeproxy:{tag}" for tag in ("dev", "e2e-upgrade"))
        world.stage.cluster.exec(node.name, "ctr", "-n", "k8s.io", "images", "tag", "--force", source, target)
    with world.requests(*lanes) as requests:
        try:
            agents.roll_out("nodeproxy:e2e-upgrade")
            meanwhile = world.service("meanwhile")
            world.answers(world.stage.client_b, meanwhile.address, 80, SERVERS)
        finally:
            agents.roll_out("nodeproxy:dev")
        print(requests.steady(least=100))


def test_settings_change(world: World, agents: Agents, service: Service, lanes: list[Lane]) -> None:
    """A changed ConfigMap is in force without a restart: with masqueradeAll servers see the node, not the pod."""
    client = world.stage.client_a
    settings = agents.configuration().get("iptables")  # where masqueradeAll is, for every mode

    def sees_the_pod() -> bool:
        return {one.source for one in world.answers(client, service.address, 80, SERVERS)} == {client.address}

    assert sees_the_pod()
    restarts = agents.restarts(world.stage.a.name)
    with world.requests(*lanes) as requests:
        try:
            agents.configure(iptables={"masqueradeAll": True})
            eventually(lambda: not sees_the_pod(), "masqueradeAll is in force", within=150)
        finally:
            agents.configure(iptables=settings)
        eventually(sees_the_pod, "masqueradeAll is in force no more", within=150)
        print(requests.steady())
    assert agents.restarts(world.stage.a.name) == restarts


def test_all_rules_are_flushed(world: World, agents: Agents, service: Service, lanes: list[Lane]) -> None:
    """Somebody takes away all rules of a node: they are back at once, as they were; others' rules are not touched."""
    a = world.stage.a
    other = ("-t", "nat", "-A", "OUTPUT", "-d", "192.0.2.1/32", "-j", "RETURN")
    tool = agents.variant(a.name)
    before = agents.rules(a.name)
    assert any("KUBE-SERVICES" in line or MODE == "ipvs" for line in before)
    world.stage.cluster.exec(a.name, tool, "-w", *other)
    try:
        elsewhere = [lane for lane in lanes if lane.place is world.stage.client_b]
        with world.requests(*elsewhere) as requests:
            agents.flush(a.name)
            if MODE == "ipvs":
                world.stage.node_a.run(lambda: IPVS().flush())
            flushed = time.monotonic()

            def restored() -> bool:
                now = agents.rules(a.name)
                missing = [line for line in before if line not in now]
                assert not missing, f"{len(missing)} of {len(before)} lines are missing, such as {missing[:3]}"
                return True

            eventually(restored, "the rules are back", within=20)
            print(f"back after {time.monotonic() - flushed:.1f} s, as seen from outside")
            for place in (world.stage.client_a, world.stage.node_a):
                world.answers(place, service.address, 80, SERVERS, within=5)
            world.answers(world.stage.outside, a.address, service.node_ports["http"], SERVERS, within=5)
            assert "192.0.2.1/32" in world.stage.cluster.exec(a.name, f"{tool}-save", "-t", "nat")
            requests.steady()  # node b was not concerned
    finally:
        world.stage.cluster.exec(a.name, tool, "-w", *("-D" if word == "-A" else word for word in other))


@pytest.fixture
def many(world: World) -> Iterator[list[str]]:
    """Names of 500 Services and of their slices; all are gone at the end."""
    names = [world.unique("many") for _ in range(500)]
    yield names
    with ThreadPoolExecutor(8) as pool:
        for kind in ("Service", "EndpointSlice"):
            list(pool.map(partial(world.api.delete, kind), names))


def test_five_hundred_services(world: World, agents: Agents, lanes: list[Lane], many: list[str]) -> None:
    """500 Services made in a burst, and deleted in a burst, disturb nobody; each is served, and then is no more."""
    endpoints = [world.endpoint(name) for name in sorted(SERVERS)]
    clients = (world.stage.client_a, world.stage.client_b)
    with world.requests(*lanes) as requests, ThreadPoolExecutor(8) as pool:
        began = time.monotonic()

        def make(name: str) -> str:
            body = objects.service(name, ports=[port()], selector=None, labels={OWNED: ""})
            made = world.api.create(body)
            world.api.create(objects.endpoint_slice(name, name, endpoints))
            address: str = made["spec"]["clusterIP"]
            return address

        addresses = list(pool.map(make, many))
        made_after = time.monotonic() - began
        for place in clients:
            for address in (*addresses[::50], addresses[-1]):
                world.answers(place, address, 80, SERVERS, count=12)
        print(f"500 Services made in {made_after:.1f} s, served {time.monotonic() - began - made_after:.1f} s later")
        list(pool.map(lambda name: world.api.delete("Service", name), many))
        for place in clients:
            for address in (*addresses[::50], addresses[-1]):
                world.gone(place, address, 80)
        print(requests.steady(least=100))


def test_rules_go_with_their_services(world: World, agents: Agents) -> None:
    """Nothing is left on a node of Services that have gone: its rules are what they were, line by line."""
    node = world.stage.b.name

    def quiet() -> list[str]:
        first = agents.rules(node)
        time.sleep(scaled(1.5))
        return first if first == agents.rules(node) else []

    before = eventually(quiet, "the rules of a node do not change")
    services = [
        world.service("leaves", type="NodePort"),
        world.service("no", selector={"app": "nobody"}, type="LoadBalancer"),
    ]
    services.append(world.service("local", type="LoadBalancer", externalTrafficPolicy="Local", sessionAffinity="ClientIP"))
    world.load_balancer(services[1], world.address_at(world.stage.b))
    world.load_balancer(services[2], world.address_at(world.stage.b))
    world.answers(world.stage.client_b, services[0].address, 80, SERVERS)
    world.answers(world.stage.outside, world.stage.b.address, services[2].node_port, {B}, count=5)
    if MODE == "iptables":
        assert agents.rules(node) != before
    for service in services:
        world.api.delete("Service", service.name)

    def as_before() -> bool:
        now = agents.rules(node)
        left = [line for line in now if line not in before]
        lost = [line for line in before if line not in now]
        assert not left and not lost, f"left {left[:5]}, lost {lost[:5]}"
        return True

    eventually(as_before, f"the rules of {node} are what they were")
