"""A second cluster: dual-stack, made with kube-proxy. It goes to nodeproxy, is tested in both families, and goes back.

The modules run in the order of their names. A cluster that was kept (E2E_KEEP=1) is taken as it is.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.harness import kind
from e2e.harness.settings import CLUSTER_NAME, MODE
from e2e.harness.stage import Stage
from e2e.second.steps import Migration
from hack.kind.cluster import Cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.disruptive)
            item.add_marker(pytest.mark.agent)


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    return kind.bring_up(f"{CLUSTER_NAME}-second", workers=1, ip_family="dual", kube_proxy=MODE)


@pytest.fixture(scope="session")
def migration(stage: Stage) -> Migration:
    return Migration(stage.cluster, stage.api)
