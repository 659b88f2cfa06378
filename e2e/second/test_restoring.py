"""From nodeproxy back to kube-proxy on all nodes, by the commands of deploy/docs/migrating.md, while requests run."""

from __future__ import annotations

import time

from e2e.harness.load import served
from e2e.harness.stage import SERVERS
from e2e.harness.world import World
from e2e.second.steps import LABEL, Migration


def test_back_to_kube_proxy(world: World, migration: Migration) -> None:
    """kube-proxy's DaemonSet is made again and the nodes go back one by one: no request fails, nothing of ours is left."""
    migration.nodeproxy_everywhere()
    stage = world.stage
    _, lanes = served(world)
    with world.requests(*lanes) as requests:
        migration.kube_proxy_everywhere()
        fresh = world.service("fresh")
        for place in stage.inside:
            world.answers(place, fresh.address, 80, SERVERS)
        time.sleep(2)
        print(requests.steady(least=100))
    assert world.api.list("Node", LABEL, None) == []
    for node in stage.nodes:
        migration.wait_for("kube-proxy", node.name)
