"""The roll-out operator in the cluster, and requests from everywhere while it works."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from e2e.harness.agents import Agents
from e2e.harness.flow import Lane
from e2e.harness.kind import hack_kind
from e2e.harness.load import served
from e2e.harness.rollouts import Rollouts
from e2e.harness.settings import CLUSTER_NAME
from e2e.harness.world import Service, World


@pytest.fixture(scope="session")
def operator() -> None:
    hack_kind("deploy-operator", "--name", CLUSTER_NAME)


@pytest.fixture
def rollouts(world: World, operator: None) -> Iterator[Rollouts]:
    made = Rollouts(world.api)
    made.operator_ready()
    yield made
    made.close()


@pytest.fixture
def agents(world: World) -> Agents:
    return Agents(world.stage.cluster, world.api)


@pytest.fixture
def load(world: World) -> tuple[Service, list[Lane]]:
    return served(world)
