"""Changes of the legacy tables, with and without iptables: after each, iptables-save prints exactly what is wanted."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Mapping

import pytest

from nodeproxy.cluster.state import ClusterState
from nodeproxy.forwarding.node import NodeFacts
from nodeproxy.forwarding.table import Family, ServicePort, ServicePortKey
from nodeproxy.forwarding.tracker import ForwardingTracker
from nodeproxy.kernel.xtables import Variant, XTables
from nodeproxy.programmer.iptables.affinity import AffinitySets
from nodeproxy.programmer.iptables.family import FamilyProgrammer
from nodeproxy.programmer.iptables.ruleset import TABLES, Ruleset
from nodeproxy.programmer.rules.common import Features
from nodeproxy.programmer.rules.kernel_tables import KernelTables
from nodeproxy.programmer.rules.snapshot import parse_save
from nodeproxy.sandbox.namespace import Namespace, unique_stem

from .test_fuzz_rule_text import CONFIG, hostile_events

pytestmark = pytest.mark.kernel

Rows = dict[ServicePortKey, ServicePort]


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace(f"{unique_stem()}-changes") as made:
        yield made


def deltas(family: Family, seed: int, count: int) -> Iterator[tuple[Rows, Mapping[ServicePortKey, ServicePort | None]]]:
    """All rows after each of many events, and those that the event changed."""
    state, tracker = ClusterState("here"), ForwardingTracker(NodeFacts(name="here", addresses=("198.51.100.7",)))
    for event in hostile_events(random.Random(seed), count):
        delta = tracker.update(state, state.apply([event]))
        changed = {key: change.after for key, change in delta.rows.items() if key.family is family}
        if changed:
            yield {key: row for key, row in tracker.table.rows.items() if key.family is family}, changed


@pytest.mark.parametrize("variant", list(Variant))
@pytest.mark.parametrize("family", list(Family))
def test_changes_make_of_the_kernel_what_is_wanted(namespace: Namespace, variant: Variant, family: Family) -> None:
    tool = f"{'iptables' if family is Family.IPV4 else 'ip6tables'}-{variant}-save"
    tables = KernelTables(XTables(variant, family.value), TABLES)
    programmer = namespace.run(lambda: FamilyProgrammer(family, CONFIG, tables, AffinitySets(family)))

    def check(rows: Rows) -> None:
        wanted = Ruleset(family, CONFIG, Features())
        wanted.change(rows)
        for table, chains in wanted.chains().items():
            found = parse_save(namespace.command([tool, "-t", table]).stdout, table).chains
            assert {name: found[name] for name in chains} == chains
            assert {name for name in found if name.startswith("KUBE-")} - {"KUBE-FIREWALL"} == chains.keys()

    async def change(before: Rows, changed: Mapping[ServicePortKey, ServicePort | None]) -> None:
        if programmer.needs_full_pass:
            assert await programmer.full_pass(before, frozenset()) == {}
        assert await programmer.change(changed, frozenset()) == {}

    changes = 0
    before: Rows = {}
    for rows, changed in deltas(family, seed=11, count=120):
        namespace.run(asyncio.run, change(before, changed))
        check(rows)
        before, changes = rows, changes + 1
    assert namespace.run(asyncio.run, programmer.audit()) is False
    assert changes > 25
    if variant is Variant.LEGACY:  # without iptables, but for the first of their form and those that need an ipset
        assert tables.left_to_iptables <= changes / 2
    tables.xtables.close()
