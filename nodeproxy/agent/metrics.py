"""Owns the metrics: kube-proxy's names and labels wherever the same thing is measured, our own under `nodeproxy_`.

kube-proxy 1.36 labels what one of its two proxiers did with `ip_family`. Our loop programs both families in one pass. Such a
metric therefore has a series for each family of the node, and what is true of the pass is said of each: it took so long
until the rules of that family were in force. Queries over the label find it, and sums count a pass once for each family, as
they do with kube-proxy. Where a family is known, `of` is for that one alone.

Names, labels, types and buckets: pkg/proxy/metrics/metrics.go of Kubernetes 1.36. Nothing here has a series per Service.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from nodeproxy.api.objects import Kind
from nodeproxy.configuration.agent_config import Mode
from nodeproxy.forwarding.table import Family

_SYNC_BUCKETS = tuple(0.001 * 2**power for power in range(15))
_PROGRAMMING_BUCKETS = (
    *(0.25, 0.5),
    *range(1, 60),
    *range(60, 120, 5),
    *range(120, 300, 30),
    300,
)
_SYNC = "kubeproxy_sync_proxy_rules"
_FAMILY = "ip_family"

_T = TypeVar("_T", Counter, Gauge, Histogram)


def family_label(family: Family) -> str:
    """The value of the label `ip_family`: IPv4 or IPv6, as the API names IP families."""
    return f"IPv{int(family)}"


def count_of(counter: Counter) -> int:
    """What one series of a counter has come to."""
    return round(
        next(
            sample.value
            for metric in counter.collect()
            for sample in metric.samples
            if sample.name == f"{metric.name}_total"
        )
    )


class _ByFamily(Generic[_T]):
    """A metric with the label `ip_family` alone. Its series exist from the start, one for each family of the node."""

    def __init__(self, metric: _T, families: Iterable[Family]) -> None:
        self._series: dict[Family, _T] = {family: metric.labels(ip_family=family_label(family)) for family in families}

    def of(self, family: Family) -> _T:
        """The series of one family of the node. Raises KeyError for another."""
        return self._series[family]

    def each(self) -> Iterable[_T]:
        """The series of all families."""
        return self._series.values()


class FamilyHistogram(_ByFamily[Histogram]):
    """A histogram of what is done for all families at once."""

    def observe(self, amount: float) -> None:
        """It took so much for each family."""
        for series in self.each():
            series.observe(amount)


class FamilyCounter(_ByFamily[Counter]):
    """A counter of what happens to all families at once."""

    def inc(self, amount: float = 1) -> None:
        """It happened to each family."""
        for series in self.each():
            series.inc(amount)

    @property
    def count(self) -> int:
        """How often that was."""
        return max((count_of(series) for series in self.each()), default=0)


class FamilyGauge(_ByFamily[Gauge]):
    """A gauge of what is the same for all families."""

    def set_to_current_time(self) -> None:
        """It happened to each family just now."""
        for series in self.each():
            series.set_to_current_time()


class Metrics:
    """All metrics of one agent, in a registry of its own. Durations in seconds, timestamps in Unix seconds.

    `families`: those that the node has.
    """

    def __init__(self, families: Iterable[Family] = (Family.IPV4, Family.IPV6)) -> None:
        self.registry = CollectorRegistry()
        self._families = tuple(families)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._add_syncs()
        self._add_changes()
        self._add_rules()
        self._add_conntrack()
        self._add_ours()
        self.healthz = self._counter("kubeproxy_proxy_healthz_total", "Answers of /healthz by HTTP status", ("code",))
        self.livez = self._counter("kubeproxy_proxy_livez_total", "Answers of /livez by HTTP status", ("code",))

    def set_mode(self, mode: str) -> None:
        """Note which mode carries Services now: its series is 1, those of former modes are 0."""
        for former in self._modes - {mode}:
            self.mode.labels(mode=former).set(0)
        self._modes.add(mode)
        self.mode.labels(mode=mode).set(1)

    def set_rules(self, family: Family, rules: Mapping[str, int], written: Mapping[str, int]) -> None:
        """Note how many iptables rules of ours each table holds, and how many the last sync wrote."""
        for gauge, counts in ((self.rules, rules), (self.rules_written, written)):
            for table, count in counts.items():
                gauge.labels(table=table, ip_family=family_label(family)).set(count)

    def set_no_local_endpoints(self, counts: Mapping[tuple[str, Family], int]) -> None:
        """Note `NoLocalEndpoints.counts`, by traffic policy and family."""
        for (policy, family), count in counts.items():
            if family in self._families:
                self.no_local_endpoints.labels(traffic_policy=policy, ip_family=family_label(family)).set(count)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _add_syncs(self) -> None:
        self.sync = self._histogram(f"{_SYNC}_duration_seconds", "Time that a sync took")
        self.full_sync = self._histogram(
            "kubeproxy_sync_full_proxy_rules_duration_seconds", "Time that a sync took which wrote everything"
        )
        self.partial_sync = self._histogram(
            "kubeproxy_sync_partial_proxy_rules_duration_seconds", "Time that a sync took which wrote only what changed"
        )
        self.network_programming = self._histogram(
            "kubeproxy_network_programming_duration_seconds",
            "Time from a change of endpoints, as their trigger time says, until it was programmed",
            _PROGRAMMING_BUCKETS,
        )
        self.last_sync = self._family_gauge(f"{_SYNC}_last_timestamp_seconds", "When the last sync succeeded")
        self.last_queued = self._family_gauge(f"{_SYNC}_last_queued_timestamp_seconds", "When a sync was last asked for")

    def _add_changes(self) -> None:
        self.endpoint_changes = self._counter(f"{_SYNC}_endpoint_changes_total", "Changes of EndpointSlices so far")
        self.endpoint_changes_pending = self._gauge(
            f"{_SYNC}_endpoint_changes_pending", "Changes of EndpointSlices that are not programmed yet"
        )
        self.service_changes = self._counter(f"{_SYNC}_service_changes_total", "Changes of Services so far")
        self.service_changes_pending = self._gauge(
            f"{_SYNC}_service_changes_pending", "Changes of Services that are not programmed yet"
        )
        self.no_local_endpoints = self._gauge(
            f"{_SYNC}_no_local_endpoints_total",
            "ServicePorts of traffic policy Local that have endpoints, but none on this node",
            ("traffic_policy", _FAMILY),
        )

    def _add_rules(self) -> None:
        self.restore_failures = self._family_counter(
            f"{_SYNC}_iptables_restore_failures_total", "Syncs that the kernel refused as a whole"
        )
        self.partial_restore_failures = self._family_counter(
            f"{_SYNC}_iptables_partial_restore_failures_total",
            "Transactions of what changed that failed, so that a full one followed",
        )
        self.rules = self._gauge(f"{_SYNC}_iptables_total", "iptables rules of ours in force", ("table", _FAMILY))
        self.rules_written = self._gauge(
            f"{_SYNC}_iptables_last", "iptables rules that the last sync wrote", ("table", _FAMILY)
        )

    def _add_conntrack(self) -> None:
        self.conntrack_duration = self._histogram(
            "kubeproxy_conntrack_reconciler_sync_duration_seconds", "Time that the removal of stale conntrack entries took"
        )
        self.conntrack_deleted = self._family_counter(
            "kubeproxy_conntrack_reconciler_deleted_entries_total", "Stale conntrack entries deleted so far"
        )

    def _add_ours(self) -> None:
        self._modes: set[str] = set()
        self.mode = self._gauge("nodeproxy_mode", "1 for the mode that carries Services", ("mode",))
        self.mode_switches = self._counter(
            "nodeproxy_mode_switches_total", "Switches of the mode while running, by target and outcome", ("to", "result")
        )
        self.config_reloads = self._counter(
            "nodeproxy_config_reloads_total", "Changed configurations that were read, by outcome", ("result",)
        )
        self.draining_real_servers = self._gauge(
            "nodeproxy_draining_real_servers", "IPVS real servers that keep their connections and get no new ones"
        )
        self.health_check_ports = self._gauge(
            "nodeproxy_health_check_ports", "Services whose health-check node port is open wherever it should be"
        )
        self.events_dropped = self._counter(
            "nodeproxy_events_dropped_total", "Kubernetes Events that were not written: too many, or not taken"
        )
        self.refused_service_ports = self._gauge("nodeproxy_refused_service_ports", "ServicePorts that the kernel refuses")
        self.refused_objects = self._counter(
            "nodeproxy_refused_objects_total", "Objects or parts of them that were refused", ("kind",)
        )
        self.drift = self._counter(
            "nodeproxy_drift_repairs_total", "Times that rules were found changed by others, and put back"
        )
        self.service_ports = self._gauge("nodeproxy_service_ports", "Rows of the forwarding table")
        self._begin_with_zeros()

    def _begin_with_zeros(self) -> None:
        """Make the series of what seldom happens: of one that comes with its first event, `increase` does not see that."""
        for result in ("applied", "refused"):
            self.config_reloads.labels(result=result)
        for mode in Mode:
            for result in ("done", "failed"):
                self.mode_switches.labels(to=str(mode), result=result)
        for kind in (*map(str, Kind), "unknown"):  # what cannot be read may not even tell its kind
            self.refused_objects.labels(kind=kind)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _SYNC_BUCKETS) -> FamilyHistogram:
        metric = Histogram(name, text, (_FAMILY,), buckets=buckets, registry=self.registry)
        return FamilyHistogram(metric, self._families)

    def _family_counter(self, name: str, text: str) -> FamilyCounter:
        return FamilyCounter(self._counter(name, text, (_FAMILY,)), self._families)

    def _family_gauge(self, name: str, text: str) -> FamilyGauge:
        return FamilyGauge(self._gauge(name, text, (_FAMILY,)), self._families)
