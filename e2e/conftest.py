"""Fixtures of the suite: the cluster that `hack.kind` made, what all tests share in it, and each test's own world."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from e2e.harness.api import Api
from e2e.harness.settings import ALL_ROLLOUTS, CLUSTER_NAME, MODE, PROXY
from e2e.harness.snapshot import snapshot
from e2e.harness.stage import Stage
from e2e.harness.world import World
from hack.kind.cluster import Cluster, existing
from nodeproxy.kernel.errors import KernelError
from nodeproxy.kernel.ipvs import IPVS

MARKERS = (
    "smoke: the short suite for IPVS in a VM",
    "disruptive: does things to nodes, agents or the control plane; these run last, and alone",
    "agent: about nodeproxy itself, so there is nothing to see with E2E_PROXY=kube-proxy",
    "only(mode): says something about one mode only",
    "long: of roll-outs, what takes long or comes close to what others show; with E2E_ROLLOUT=all",
    "without_ipvs: says something about nodes whose kernel has no IPVS",
)


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        only = item.get_closest_marker("only")
        if item.get_closest_marker("agent") and PROXY != "nodeproxy":
            item.add_marker(pytest.mark.skip(reason=f"about nodeproxy, and this cluster runs {PROXY}"))
        elif only and only.args[0] != MODE:
            item.add_marker(pytest.mark.skip(reason=f"about {only.args[0]} mode, and this cluster runs {MODE} mode"))
        elif item.get_closest_marker("long") and not ALL_ROLLOUTS:
            item.add_marker(pytest.mark.skip(reason="of the long form, which E2E_ROLLOUT=all runs"))
        elif item.get_closest_marker("without_ipvs") and has_ipvs():
            item.add_marker(pytest.mark.skip(reason="about a kernel without IPVS, and this one has it"))


def has_ipvs() -> bool:
    """Whether the kernel of the nodes, which is ours, has IPVS."""
    try:
        with IPVS() as ipvs:
            ipvs.require()
    except KernelError:
        return False
    return True


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    """What the cluster looked like when a test failed, before its objects go."""
    outcome = yield
    report = outcome.get_result()
    world = getattr(item, "funcargs", {}).get("world")
    if report.when == "call" and report.failed and world is not None:
        report.sections.append(("the cluster when it failed", snapshot(world.stage)))


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    return existing(CLUSTER_NAME)


@pytest.fixture(scope="session")
def stage(cluster: Cluster) -> Iterator[Stage]:
    made = Stage(cluster, Api(cluster.kubeconfig))
    yield made
    made.close()


@pytest.fixture
def world(stage: Stage) -> Iterator[World]:
    made = World(stage)
    yield made
    made.close()
