"""Our rule text and the kernel's are the same: what is written is what iptables-save prints, in both variants and families.

The audit depends on it: a chain that reads back otherwise than it was written would be rewritten for ever.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from nodeproxy.cluster.state import ClusterState
from nodeproxy.forwarding.node import NodeFacts
from nodeproxy.forwarding.table import Family
from nodeproxy.forwarding.tracker import ForwardingTracker
from nodeproxy.kernel.ipset import IPSets
from nodeproxy.kernel.ipset_messages import SetSpec
from nodeproxy.programmer.iptables.base_chains import jumps
from nodeproxy.programmer.iptables.ruleset import TABLES, Ruleset
from nodeproxy.programmer.rules import transaction as tx
from nodeproxy.programmer.rules.common import Features
from nodeproxy.programmer.rules.snapshot import TableSnapshot, parse_save
from nodeproxy.sandbox.namespace import Namespace, unique_stem

from .test_fuzz_rule_text import CONFIG, hostile_events

pytestmark = pytest.mark.kernel


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace(f"{unique_stem()}-rules") as made:
        yield made


@pytest.mark.parametrize("variant", ["legacy", "nft"])
@pytest.mark.parametrize("family", list(Family))
def test_what_is_written_reads_back_the_same(namespace: Namespace, variant: str, family: Family) -> None:
    tool = f"{'iptables' if family is Family.IPV4 else 'ip6tables'}-{variant}"

    def read() -> dict[str, TableSnapshot]:
        return {table: parse_save(namespace.command([f"{tool}-save", "-t", table]).stdout, table) for table in TABLES}

    state, tracker = ClusterState("here"), ForwardingTracker(NodeFacts(name="here", addresses=("198.51.100.7",)))
    for event in hostile_events(random.Random(7), 1500):
        tracker.update(state, state.apply([event]))
    ruleset = Ruleset(family, CONFIG, Features())
    ruleset.change({key: row for key, row in tracker.table.rows.items() if key.family is family})
    assert len(ruleset.rows) > 10
    specs = [SetSpec(item.name, family=int(family), timeout=10800) for item in ruleset.sets()]
    assert specs
    assert namespace.run(lambda: IPSets().create(specs)) == []
    empty = {table: parse_save("", table) for table in TABLES}
    text = tx.render(tx.full(ruleset.chains(), jumps(family, CONFIG), empty))
    namespace.command([f"{tool}-restore", "--noflush"], input=text)
    assert tx.render(tx.full(ruleset.chains(), jumps(family, CONFIG), read())) == ""


def test_an_independent_reader_sees_the_same_chains(namespace: Namespace) -> None:
    """python-iptables reads the legacy table itself, without iptables-save and without our parser."""
    family = Family.IPV4
    state, tracker = ClusterState("here"), ForwardingTracker(NodeFacts(name="here"))
    for event in hostile_events(random.Random(8), 300):
        tracker.update(state, state.apply([event]))
    ruleset = Ruleset(family, CONFIG, Features())
    rows = {key: row for key, row in tracker.table.rows.items() if key.family is family and row.affinity_seconds is None}
    ruleset.change(rows)
    wanted = ruleset.chains()["nat"]
    empty = {table: parse_save("", table) for table in TABLES}
    text = tx.render(tx.full(ruleset.chains(), jumps(family, CONFIG), empty))
    namespace.command(["iptables-legacy-restore", "--noflush"], input=text)

    def read() -> tuple[dict[str, int], list[str]]:
        import iptc

        table = iptc.Table(iptc.Table.NAT)
        table.refresh()
        chains = {chain.name: len(chain.rules) for chain in table.chains if not chain.is_builtin()}
        return chains, [rule.target.name for rule in iptc.Chain(table, "PREROUTING").rules]

    chains, targets = namespace.run(read)
    assert chains == {name: len(rules) for name, rules in wanted.items()}
    assert targets == ["KUBE-SERVICES"]
