"""Plans and transactions: rules reached by increments equal rules built afresh, and undoing a plan takes it back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodeproxy.forwarding.table import Family, ServicePort, ServicePortKey
from nodeproxy.programmer.base import LocalDetector, NodePortAddresses, ProgrammerConfig
from nodeproxy.programmer.iptables.base_chains import jumps
from nodeproxy.programmer.iptables.ruleset import TABLES, Ruleset
from nodeproxy.programmer.rules import transaction as tx
from nodeproxy.programmer.rules.common import Features
from nodeproxy.programmer.rules.names import MAX_CHAIN_NAME
from nodeproxy.programmer.rules.snapshot import TableSnapshot, parse_save

from .rows import row_changes
from .simulated_tables import SimulatedTables

CONFIG = ProgrammerConfig(
    families=(Family.IPV4, Family.IPV6),
    local_detector=LocalDetector(cidrs={Family.IPV4: "10.0.0.0/8", Family.IPV6: "fd00:10::/64"}),
    node_port_addresses={Family.IPV4: NodePortAddresses(loopback=True), Family.IPV6: NodePortAddresses()},
)
Step = dict[ServicePortKey, ServicePort | None]


def read(tables: SimulatedTables) -> dict[str, TableSnapshot]:
    return {table: parse_save(tables.save(table), table) for table in TABLES}


def wanted(ruleset: Ruleset) -> dict[str, dict[str, list[str]]]:
    return ruleset.chains()


def ours(tables: SimulatedTables, ruleset: Ruleset) -> dict[str, dict[str, list[str]]]:
    foreign = {"PREROUTING", "INPUT", "OUTPUT", "POSTROUTING", "FORWARD", "KUBE-FIREWALL"}
    return {table: {n: r for n, r in tables.chains[table].items() if n not in foreign} for table in TABLES}


def start(family: Family) -> tuple[SimulatedTables, Ruleset]:
    tables, ruleset = SimulatedTables(), Ruleset(family, CONFIG, Features())
    tables.restore(tx.render(tx.full(ruleset.chains(), jumps(family, CONFIG), read(tables))))
    return tables, ruleset


@pytest.mark.parametrize("family", list(Family))
def test_increments_equal_a_fresh_build(family: Family) -> None:
    @settings(max_examples=60, deadline=None)
    @given(row_changes(family))
    def check(steps: list[Step]) -> None:
        tables, ruleset = start(family)
        sets: set[str] = set()
        for step in steps:
            plan = ruleset.change(step)
            tables.restore(tx.render(tx.incremental(plan.tables)))
            sets = (sets | {item.name for item in plan.new_sets}) - set(plan.old_sets)
        fresh = Ruleset(family, CONFIG, Features())
        fresh.change(ruleset.rows)
        assert ours(tables, ruleset) == wanted(ruleset) == wanted(fresh)
        assert sets == {item.name for item in fresh.sets()}
        assert not any(tx.full(fresh.chains(), jumps(family, CONFIG), read(tables)).values()), (
            "a full pass finds something to do"
        )
        assert all(len(chain) <= MAX_CHAIN_NAME for table in TABLES for chain in tables.chains[table])

    check()


@settings(max_examples=60, deadline=None)
@given(row_changes(Family.IPV4), st.data())
def test_an_undone_plan_leaves_no_trace(steps: list[Step], data: st.DataObject) -> None:
    _, ruleset = start(Family.IPV4)
    kept: Step = {}
    for step in steps:
        plan = ruleset.change(step)
        if data.draw(st.booleans()):
            ruleset.undo(plan)
        else:
            kept |= step
    fresh = Ruleset(Family.IPV4, CONFIG, Features())
    fresh.change({key: row for key, row in kept.items() if row is not None})
    assert wanted(ruleset) == wanted(fresh)
    assert ruleset.rows == fresh.rows


@settings(max_examples=40, deadline=None)
@given(row_changes(Family.IPV4), row_changes(Family.IPV4))
def test_a_full_pass_mends_any_state_and_cleanup_removes_it(before: list[Step], after: list[Step]) -> None:
    tables, old = start(Family.IPV4)
    tables.chains["nat"]["PREROUTING"].append("-p tcp -j SOMEBODY-ELSE")
    tables.chains["nat"]["SOMEBODY-ELSE"] = []
    for step in before:
        tables.restore(tx.render(tx.incremental(old.change(step).tables)))
    tables.chains["filter"]["FORWARD"].clear()
    new = Ruleset(Family.IPV4, CONFIG, Features())
    for step in after:
        new.change(step)
    tables.restore(tx.render(tx.full(new.chains(), jumps(Family.IPV4, CONFIG), read(tables))))
    left = ours(tables, new)
    assert left["nat"].pop("SOMEBODY-ELSE") == []
    assert left == wanted(new)
    tables.restore(tx.render(tx.cleanup(jumps(Family.IPV4, CONFIG), read(tables))))
    empty = SimulatedTables()
    empty.chains["nat"]["PREROUTING"] = ["-p tcp -j SOMEBODY-ELSE"]
    empty.chains["nat"]["SOMEBODY-ELSE"] = []
    assert tables.chains == empty.chains


def test_jumps_of_kube_proxy_are_replaced_by_ours() -> None:
    tables = SimulatedTables()
    tables.chains["filter"] |= {"KUBE-SERVICES": [], "KUBE-PROXY-FIREWALL": [], "KUBE-EXTERNAL-SERVICES": []}
    theirs = '-m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL'
    tables.chains["filter"]["INPUT"] = [theirs, "-i lo -j ACCEPT"]
    ruleset = Ruleset(Family.IPV4, CONFIG, Features())
    tables.restore(tx.render(tx.full(ruleset.chains(), jumps(Family.IPV4, CONFIG), read(tables))))
    assert theirs not in tables.chains["filter"]["INPUT"]
    assert "-i lo -j ACCEPT" in tables.chains["filter"]["INPUT"]
    assert tables.chains["filter"]["KUBE-PROXY-FIREWALL"] == ["-j KUBE-SERVICES"]
