"""The control plane that the tests of this directory share."""

from collections.abc import Iterator

import pytest

from hack.controlplane import Cluster, open_cluster


@pytest.fixture(scope="session")
def control_plane() -> Iterator[Cluster]:
    """An API server: one that runs as long as the session, or that of `NODEPROXY_TEST_KUBECONFIG`."""
    with open_cluster() as cluster:
        yield cluster
