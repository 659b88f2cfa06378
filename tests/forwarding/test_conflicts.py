"""Several Services that ask for one address and port: who gets it, who is told, and what follows when one goes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from world import HTTP, World, service

from nodeproxy.api.objects import Kind, Service

OLD, YOUNG = "2024-01-01T00:00:00Z", "2025-01-01T00:00:00Z"


def owners(world: World, address: str | None) -> list[str]:
    return [row.key.name.name for row in world.rows for f in row.frontends if f.address == address]


def node_port(name: str, last: int, created: str | None = None, port: int = 30080, **spec: Any) -> Service:
    ports = [{**HTTP, "nodePort": port}]
    return service(name, clusterIP=f"10.96.0.{last}", type="NodePort", ports=ports, created=created, **spec)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_oldest_wins_whatever_the_order(order: tuple[int, ...]) -> None:
    services = [node_port("a", 1, YOUNG), node_port("b", 2, OLD), node_port("c", 3, None)]
    world = World()
    for index in order:
        world.apply(services[index])
    assert owners(world, None) == ["b"]
    assert sorted(world.problems) == [
        "Service ns/a: spec.ports[0].nodePort: node port 30080/TCP belongs to Service ns/b",
        "Service ns/c: spec.ports[0].nodePort: node port 30080/TCP belongs to Service ns/b",
    ]


def test_of_the_same_age_the_first_by_name_wins() -> None:
    assert owners(World(node_port("b", 2, OLD), node_port("a", 1, OLD)), None) == ["a"]


def test_the_loser_keeps_everything_else() -> None:
    world = World(node_port("a", 1, OLD), node_port("b", 2, YOUNG))
    assert owners(world, "10.96.0.2") == ["b"]


def test_when_the_winner_goes_the_loser_gets_it_in_the_same_delta() -> None:
    world = World(node_port("a", 1, OLD), node_port("b", 2, YOUNG), node_port("c", 3, YOUNG))
    delta = world.delete(Kind.SERVICE, "a")
    assert {str(key.name): change.after is not None for key, change in delta.rows.items()} == {
        "ns/a:http": False,
        "ns/b:http": True,
    }
    assert owners(world, None) == ["b"]
    assert [str(p) for p in delta.problems] == [
        "Service ns/c: spec.ports[0].nodePort: node port 30080/TCP belongs to Service ns/b"
    ]


def test_when_the_winner_asks_for_another_port_both_have_theirs() -> None:
    world = World(node_port("a", 1, OLD), node_port("b", 2, YOUNG))
    delta = world.apply(node_port("a", 1, OLD, port=30081))
    assert len(delta.rows) == 2
    assert sorted(owners(world, None)) == ["a", "b"]
    assert not world.problems


def test_when_an_older_one_comes_the_younger_one_loses_in_the_same_delta() -> None:
    world = World(node_port("b", 2, YOUNG))
    delta = world.apply(node_port("a", 1, OLD))
    assert len(delta.rows) == 2
    assert owners(world, None) == ["a"]
    assert len(delta.problems) == 1


@pytest.mark.parametrize("spec", [{"externalIPs": ["192.0.2.1"]}, {"ingress": [{"ip": "192.0.2.1"}]}])
@pytest.mark.parametrize("other", [{"externalIPs": ["192.0.2.1"]}, {"ingress": [{"ip": "192.0.2.1"}]}])
def test_external_and_load_balancer_ips(spec: Any, other: Any) -> None:
    world = World(service("a", created=YOUNG, **spec), service("b", clusterIP="10.96.0.2", created=OLD, **other))
    assert owners(world, "192.0.2.1") == ["b"]
    assert len(world.problems) == 1


def test_the_same_address_with_other_ports_or_protocols_can_be_shared() -> None:
    a = service("a", externalIPs=["192.0.2.1"])
    b = service(
        "b",
        clusterIP="10.96.0.2",
        externalIPs=["192.0.2.1"],
        ports=[{"port": 443}, {"port": 80, "protocol": "UDP", "name": "u"}],
    )
    world = World(a, b)
    assert owners(world, "192.0.2.1") == ["a", "b", "b"]
    assert not world.problems


def test_a_cluster_ip_twice() -> None:
    world = World(service("a", created=YOUNG), service("b", created=OLD))
    assert owners(world, "10.96.0.1") == ["b"]
    assert len(world.rows) == 1
    world.delete(Kind.SERVICE, "b")
    assert owners(world, "10.96.0.1") == ["a"]


def test_an_external_ip_never_captures_the_cluster_ip_of_another_service() -> None:
    thief = service("thief", clusterIP="10.96.0.66", externalIPs=["10.96.0.1"], created=OLD)
    world = World(thief, service("api", created=YOUNG))
    assert owners(world, "10.96.0.1") == ["api"]
    assert world.problems == ["Service ns/thief: spec.externalIPs: 10.96.0.1 80/TCP belongs to Service ns/api"]


def test_a_service_that_quarrels_with_itself() -> None:
    ports = [{**HTTP, "nodePort": 30080}, {"name": "again", "port": 80, "nodePort": 30080}, {"name": "third", "port": 81}]
    world = World(service(type="NodePort", ports=ports))
    assert {row.key.name.port for row in world.rows} == {"http", "third"}
    assert world.problems == [
        "Service ns/web: spec.ports[1].port: 10.96.0.1 80/TCP is already used by spec.ports[0]",
        "Service ns/web: spec.ports[1].nodePort: node port 30080/TCP is already used by spec.ports[0]",
    ]


def test_a_thousand_quarrelling_services_settle() -> None:
    world = World(*(node_port(f"s{i}", i % 250 + 1, OLD, port=30000 + i % 7) for i in range(1000)))
    ports = [f.port for row in world.rows for f in row.frontends if f.address is None]
    assert sorted(ports) == list(range(30000, 30007))
