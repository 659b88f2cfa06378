"""Owns the metrics: kube-proxy's names and labels wherever the same thing is measured, our own under `nodeproxy_`."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

_SYNC_BUCKETS = tuple(0.001 * 2**power for power in range(15))
_PROGRAMMING_BUCKETS = (
    *(0.25, 0.5),
    *range(1, 60),
    *range(60, 120, 5),
    *range(120, 300, 30),
    300,
)


class Metrics:
    """All metrics of one agent, in a registry of its own. Durations in seconds, timestamps in Unix seconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SYNC_BUCKETS) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=self.registry)

        self.sync = histogram("kubeproxy_sync_proxy_rules_duration_seconds", "SyncProxyRules latency in seconds")
        self.full_sync = histogram(
            "kubeproxy_sync_full_proxy_rules_duration_seconds", "SyncProxyRules latency in seconds for full resyncs"
        )
        self.partial_sync = histogram(
            "kubeproxy_sync_partial_proxy_rules_duration_seconds", "SyncProxyRules latency in seconds for partial syncs"
        )
        self.network_programming = histogram(
            "kubeproxy_network_programming_duration_seconds", "In Cluster Network Programming Latency", _PROGRAMMING_BUCKETS
        )
        self.last_sync = gauge("kubeproxy_sync_proxy_rules_last_timestamp_seconds", "The last time proxy rules were synced")
        self.last_queued = gauge(
            "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds", "The last time a sync of proxy rules was queued"
        )
        self.endpoint_changes = counter(
            "kubeproxy_sync_proxy_rules_endpoint_changes_total", "Cumulative proxy rules Endpoint changes"
        )
        self.endpoint_changes_pending = gauge(
            "kubeproxy_sync_proxy_rules_endpoint_changes_pending", "Pending proxy rules Endpoint changes"
        )
        self.service_changes = counter(
            "kubeproxy_sync_proxy_rules_service_changes_total", "Cumulative proxy rules Service changes"
        )
        self.service_changes_pending = gauge(
            "kubeproxy_sync_proxy_rules_service_changes_pending", "Pending proxy rules Service changes"
        )
        self.restore_failures = counter(
            "kubeproxy_sync_proxy_rules_iptables_restore_failures_total", "Cumulative proxy iptables restore failures"
        )
        self.healthz = counter("kubeproxy_proxy_healthz_total", "Cumulative proxy healthz HTTP status", ("code",))
        self.livez = counter("kubeproxy_proxy_livez_total", "Cumulative proxy livez HTTP status", ("code",))
        self.refused_service_ports = gauge("nodeproxy_refused_service_ports", "ServicePorts that the kernel refuses")
        self.refused_objects = counter(
            "nodeproxy_refused_objects_total", "Objects or parts of them that were refused", ("kind",)
        )
        self.drift = counter("nodeproxy_drift_repairs_total", "Times that rules were found changed by others, and put back")
        self.service_ports = gauge("nodeproxy_service_ports", "Rows of the forwarding table")

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
