"""Affinity sets on the real kernel: full ones are made larger, and no client is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from nodeproxy.forwarding.table import Family
from nodeproxy.kernel.ipset import IPSets
from nodeproxy.kernel.ipset_messages import Entry, SetSpec
from nodeproxy.programmer.iptables.affinity import AffinitySets
from nodeproxy.sandbox.namespace import Namespace, unique_stem

pytestmark = pytest.mark.kernel

NAME = "KUBE-AFFINITY-AAAAAAAAAAAAAAAA"


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace(f"{unique_stem()}-sets") as made:
        yield made


def test_a_set_that_fills_up_is_made_larger(namespace: Namespace) -> None:
    def inside() -> None:
        ipsets = IPSets()
        assert not ipsets.create([SetSpec(NAME, timeout=10800, hash_size=64, max_elements=1 << 20)])
        clients = [Entry(f"10.0.{number // 250}.{number % 250 + 1}", 5000 + number) for number in range(300)]
        assert not ipsets.add(NAME, clients)
        (before,) = ipsets.sizes(NAME)
        assert before.elements == 300 > before.hash_size * 2
        sets = AffinitySets(Family.IPV4)
        assert asyncio.run(sets.grow()) == [NAME]
        assert asyncio.run(sets.grow()) == [], "not before ten seconds are over"
        (after,) = ipsets.sizes("KUBE-AFFINITY")
        assert (after.name, after.elements) == (NAME, 300)
        assert after.hash_size == before.hash_size * 8
        left = {entry.text: entry.timeout or 0 for entry in ipsets.contents(NAME).entries}
        assert all(0 <= (client.timeout or 0) - left[client.text] < 20 for client in clients)

    namespace.run(inside)
