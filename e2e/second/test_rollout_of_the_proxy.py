"""From kube-proxy to nodeproxy and back by the roll-out operator, node by node, while requests run."""

from __future__ import annotations

import pytest

from e2e.harness.kind import hack_kind
from e2e.harness.load import served
from e2e.harness.rollouts import Rollouts, phases
from e2e.harness.stage import SERVERS
from e2e.harness.world import World
from e2e.second.steps import Migration


@pytest.mark.long
def test_to_nodeproxy_and_back(world: World, migration: Migration) -> None:
    """The target `proxy` moves all nodes one after the other, and then back; no request fails, every node is verified."""
    migration.kube_proxy_everywhere()
    migration.prepare()
    stage = world.stage
    hack_kind("deploy-operator", "--name", stage.cluster.name)
    rollouts = Rollouts(world.api)
    _, lanes = served(world)
    try:
        with world.requests(*lanes) as requests:
            for proxy in ("nodeproxy", "kube-proxy"):
                with rollouts.transcript(f"to-{proxy}"):
                    status = rollouts.ends(rollouts.start(f"to-{proxy}", {"proxy": proxy}), "Completed", within=300)
                assert phases(status) == ["Updated"] * len(stage.nodes)
                fresh = world.service(f"with-{proxy}")
                for node in stage.nodes:
                    migration.wait_for(proxy, node.name)
                for place in stage.inside:
                    world.answers(place, fresh.address, 80, SERVERS)
            print(requests.steady(least=100))
    finally:
        rollouts.close()
