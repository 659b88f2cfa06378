"""Owns which rows of a forwarding table are probed: all, or where there are too many, a seeded sample of every sort of row.

The same table, limit and seed give the same choice in every mode, on every machine.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence

from nodeproxy.compare.results import Scope
from nodeproxy.forwarding.table import ForwardingTable, Frontend, ServicePort

Sort = tuple[object, ...]


def policy(frontend: Frontend) -> str:
    """What a frontend does, in words: `cluster IP, forward to all endpoints, masquerading all`."""
    words = [str(frontend.kind), frontend.action.value]
    if frontend.action.value == "forward":
        words[-1] += " to local endpoints" if frontend.backend_set.value == "local" else " to all endpoints"
        words.append({"never": "source kept", "not local pods": "local pods' source kept", "always": "masquerading"}[
            frontend.masquerade.value
        ])  # fmt: skip
    if frontend.short_cuts:
        words.append("short-cuts")
    if frontend.allowed_sources is not None:
        words.append("source ranges")
    return ", ".join(words)


def sort_of(row: ServicePort) -> Sort:
    """Rows of the same sort are programmed by the same code: family, protocol, frontends' policies, how many endpoints."""
    backends = row.all_backends
    many = next(size for size, most in enumerate((0, 1, 9, 99, 1 << 30)) if len(backends) <= most)
    local = sum(backend.local for backend in backends)
    here = "none" if local == 0 else "all" if local == len(backends) else "some"
    policies = tuple(sorted({policy(frontend) for frontend in row.frontends}))
    return (int(row.key.family), str(row.key.protocol), policies, row.affinity_seconds is not None, many, here)


def choose(table: ForwardingTable, limit: int, seed: int) -> list[ServicePort]:
    """At most `limit` rows, in the order of their names; of more, some of every sort, the rest by chance."""
    rows = sorted(table.rows.values(), key=lambda row: row.key)
    if len(rows) <= limit:
        return rows
    chance = random.Random(seed)
    sorts: Mapping[Sort, list[ServicePort]] = defaultdict(list)
    for row in rows:
        sorts[sort_of(row)].append(row)
    shuffled = [chance.sample(group, len(group)) for group in sorts.values()]
    first = [group.pop() for group in shuffled]
    rest = [row for group in shuffled for row in group]
    chosen = chance.sample(first, limit) if len(first) > limit else first + chance.sample(rest, limit - len(first))
    return sorted(chosen, key=lambda row: row.key)


def scope(table: ForwardingTable, chosen: Sequence[ServicePort], limit: int, seed: int) -> Scope:
    """What that choice is, in figures and words."""
    rows = table.rows.values()
    sorts, covered = ({sort_of(row) for row in some} for some in (rows, chosen))
    if len(chosen) == len(rows):
        words = f"all {len(rows)} Service ports are probed"
    else:
        missing = "" if covered == sorts else f" ({len(covered)} of {len(sorts)} sorts; raise --limit to have all)"
        words = (
            f"a sample of {len(chosen)} of {len(rows)} Service ports is probed (limit {limit}, seed {seed}), "
            f"of every sort at least one{missing}; all are programmed"
        )
    return Scope(
        services=len({row.key.name.service for row in rows}),
        service_ports=len(rows),
        frontends=sum(len(row.frontends) for row in rows),
        endpoints=sum(len(row.all_backends) for row in rows),
        probed_service_ports=len(chosen),
        probed_frontends=sum(len(row.frontends) for row in chosen),
        words=words,
        complete=len(chosen) == len(rows),
    )
