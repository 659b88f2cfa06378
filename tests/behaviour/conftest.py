"""One sandbox with two pods for each test, in both variants of iptables mode and in IPVS mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest

from nodeproxy.sandbox.topology import Sandbox
from tests.ways import IPVS_NFT, LEGACY, NFT, Way, ipvs

from .world import NODE_ADDRESS, World

POD_A, POD_B = "10.1.0.1", "10.1.0.2"


@pytest.fixture(params=[LEGACY, NFT, ipvs(IPVS_NFT)], ids=str)
def way(request: pytest.FixtureRequest) -> Way:
    return cast(Way, request.param)


@pytest.fixture
def box() -> Iterator[Sandbox]:
    with Sandbox(node_addresses=[NODE_ADDRESS, "2001:db8::2"]) as made:
        for name, addresses in (("a", (POD_A, "fd00:10::1")), ("b", (POD_B, "fd00:10::2"))):
            pod = made.add_pod(*addresses)
            for address in addresses:
                for protocol in ("TCP", "UDP", "SCTP"):
                    made.serve(pod, address, 8080, protocol=protocol, name=name)
        yield made


@pytest.fixture
def world(box: Sandbox, way: Way) -> Iterator[World]:
    """Not started yet: a test puts its manifests first, then uses `world.agent` as a context manager."""
    made = World(box, way)
    yield made
    made.agent.kill()
