"""Which Service ports are probed where there are more than the limit."""

from __future__ import annotations

from pathlib import Path

from states import every_sort, snapshot, very_many

from nodeproxy.compare.sampling import choose, policy, scope, sort_of
from nodeproxy.forwarding.table import ForwardingTable
from nodeproxy.snapshot.view import NodeView


def table(directory: Path, many: int = 200) -> ForwardingTable:
    return NodeView(snapshot(every_sort() + very_many(many)[1:], directory)).table


def test_all_of_few_are_chosen(tmp_path: Path) -> None:
    found = table(tmp_path, 5)
    chosen = choose(found, 100, 1)
    assert {row.key for row in chosen} == set(found.rows)
    told = scope(found, chosen, 100, 1)
    assert told.complete
    assert told.words == f"all {len(found.rows)} Service ports are probed"


def test_a_sample_has_every_sort_and_says_so(tmp_path: Path) -> None:
    found = table(tmp_path)
    chosen = choose(found, 40, 1)
    assert len(chosen) == 40
    assert {sort_of(row) for row in chosen} == {sort_of(row) for row in found.rows.values()}
    told = scope(found, chosen, 40, 1)
    assert not told.complete
    assert f"a sample of 40 of {len(found.rows)} Service ports is probed (limit 40, seed 1), of every sort" in told.words
    assert "all are programmed" in told.words


def test_the_seed_decides(tmp_path: Path) -> None:
    found = table(tmp_path)
    assert choose(found, 40, 1) == choose(table(tmp_path), 40, 1)
    assert choose(found, 40, 1) != choose(found, 40, 2)


def test_fewer_than_there_are_sorts_is_said(tmp_path: Path) -> None:
    found = table(tmp_path)
    chosen = choose(found, 3, 1)
    assert len(chosen) == 3
    assert f"(3 of {len({sort_of(row) for row in found.rows.values()})} sorts" in scope(found, chosen, 3, 1).words


def test_policies_in_words(tmp_path: Path) -> None:
    view = NodeView(snapshot(every_sort(), tmp_path))
    words = {policy(frontend) for row in view.table.rows.values() for frontend in row.frontends}
    assert "cluster IP, forward to all endpoints, local pods' source kept" in words
    assert "load balancer IP, drop, short-cuts" in words
    assert "external IP, reject" in words
    assert "load balancer IP, forward to local endpoints, source kept, short-cuts, source ranges" in words
