"""Owns the count of ServicePorts whose traffic policy is Local and that have endpoints, but none on this node."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nodeproxy.forwarding.table import Action, Delta, Family, ForwardingTable, FrontendKind, ServicePort, ServicePortKey

INTERNAL, EXTERNAL = "internal", "external"
"""Traffic policies, as the label `traffic_policy` of kube-proxy names them."""


class NoLocalEndpoints:
    """Follows the forwarding table, in proportion to what changes.

    As kube-proxy's iptables mode, a ServicePort without any endpoint does not count, and one may count for both policies.
    `report` is given `counts` whenever rows changed.
    """

    def __init__(self, report: Callable[[Mapping[tuple[str, Family], int]], None] = lambda _: None) -> None:
        self._report = report
        self._without: dict[tuple[str, Family], set[ServicePortKey]] = {
            (policy, family): set() for policy in (INTERNAL, EXTERNAL) for family in Family
        }
        self._complete = False

    @property
    def counts(self) -> Mapping[tuple[str, Family], int]:
        """How many ServicePorts, by traffic policy and family; all combinations are there."""
        return {which: len(keys) for which, keys in self._without.items()}

    def programmed(self, table: ForwardingTable, delta: Delta) -> None:
        """The table is in the kernel, and `delta` is what changed since the last call. The first one takes all of it."""
        first, self._complete = not self._complete, True
        keys = table.rows if first else delta.rows
        for key in keys:
            dropping = _dropping(table.rows.get(key))
            for policy in (INTERNAL, EXTERNAL):
                without = self._without[policy, key.family]
                if policy in dropping:
                    without.add(key)
                else:
                    without.discard(key)
        if keys or first:
            self._report(self.counts)


def _dropping(row: ServicePort | None) -> set[str]:
    """The traffic policies on whose account frontends of a row drop traffic."""
    if row is None:
        return set()
    return {
        INTERNAL if frontend.kind is FrontendKind.CLUSTER_IP else EXTERNAL
        for frontend in row.frontends
        if frontend.action is Action.DROP
    }
