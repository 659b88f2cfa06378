"""From kube-proxy to nodeproxy, node by node, by the commands of deploy/docs/migrating.md, while requests run."""

from __future__ import annotations

import time

from e2e.harness.load import served
from e2e.harness.stage import SERVERS
from e2e.harness.world import World
from e2e.second.steps import Migration


def test_one_node_there_and_back(world: World, migration: Migration) -> None:
    """Steps 1 and 2, and back: one node is given to nodeproxy, and to kube-proxy again; no request fails meanwhile.

    With nodeproxy, and after the way back, a Service that is made then is served on that node as well.
    """
    migration.kube_proxy_everywhere()
    node, stage = world.stage.a.name, world.stage
    _, lanes = served(world)
    with world.requests(*lanes) as requests:
        migration.prepare()
        migration.first_node(node)
        migration.wait_for("nodeproxy", node)
        migration.wait_for("kube-proxy", stage.b.name)
        with_us = world.service("with-us")
        world.answers(stage.client_a, with_us.address, 80, SERVERS)
        migration.back(node)
        migration.wait_for("kube-proxy", node)
        afterwards = world.service("afterwards")
        for service in (with_us, afterwards):
            world.answers(stage.client_a, service.address, 80, SERVERS)
        time.sleep(2)
        print(requests.steady(least=100))


def test_all_nodes(world: World, migration: Migration) -> None:
    """Steps 1 to 3: all nodes, and then for good; kube-proxy is gone, and no request failed."""
    migration.kube_proxy_everywhere()
    stage = world.stage
    _, lanes = served(world)
    with world.requests(*lanes) as requests:
        migration.prepare()
        migration.first_node(stage.a.name)
        migration.all_nodes()
        for node in stage.nodes:
            migration.wait_for("nodeproxy", node.name)
        fresh = world.service("fresh")
        for place in stage.inside:
            world.answers(place, fresh.address, 80, SERVERS)
        time.sleep(2)
        print(requests.steady(least=100))
    assert not migration.has("kube-proxy")
