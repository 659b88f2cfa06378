"""Metrics: kube-proxy's names and labels, and the count of ServicePorts without local endpoints."""

from __future__ import annotations

import random
from typing import Any

import pytest

from nodeproxy.agent.metrics import Metrics
from nodeproxy.agent.observers.no_local_endpoints import EXTERNAL, INTERNAL, NoLocalEndpoints
from nodeproxy.api.objects import Kind
from nodeproxy.configuration.agent_config import Mode
from nodeproxy.forwarding.table import Delta, Family
from tests.forwarding.world import ELSEWHERE, HERE, World, dead, ready, service, slice_of

KUBE_PROXY: dict[str, tuple[str, frozenset[str]]] = {
    # name in the text format: type, labels (pkg/proxy/metrics/metrics.go of Kubernetes 1.36)
    "kubeproxy_sync_proxy_rules_duration_seconds": ("histogram", frozenset({"ip_family"})),
    "kubeproxy_sync_full_proxy_rules_duration_seconds": ("histogram", frozenset({"ip_family"})),
    "kubeproxy_sync_partial_proxy_rules_duration_seconds": ("histogram", frozenset({"ip_family"})),
    "kubeproxy_network_programming_duration_seconds": ("histogram", frozenset({"ip_family"})),
    "kubeproxy_conntrack_reconciler_sync_duration_seconds": ("histogram", frozenset({"ip_family"})),
    "kubeproxy_conntrack_reconciler_deleted_entries_total": ("counter", frozenset({"ip_family"})),
    "kubeproxy_sync_proxy_rules_last_timestamp_seconds": ("gauge", frozenset({"ip_family"})),
    "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds": ("gauge", frozenset({"ip_family"})),
    "kubeproxy_sync_proxy_rules_endpoint_changes_pending": ("gauge", frozenset()),
    "kubeproxy_sync_proxy_rules_endpoint_changes_total": ("counter", frozenset()),
    "kubeproxy_sync_proxy_rules_service_changes_pending": ("gauge", frozenset()),
    "kubeproxy_sync_proxy_rules_service_changes_total": ("counter", frozenset()),
    "kubeproxy_sync_proxy_rules_iptables_restore_failures_total": ("counter", frozenset({"ip_family"})),
    "kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total": ("counter", frozenset({"ip_family"})),
    "kubeproxy_sync_proxy_rules_iptables_total": ("gauge", frozenset({"table", "ip_family"})),
    "kubeproxy_sync_proxy_rules_iptables_last": ("gauge", frozenset({"table", "ip_family"})),
    "kubeproxy_sync_proxy_rules_no_local_endpoints_total": ("gauge", frozenset({"traffic_policy", "ip_family"})),
    "kubeproxy_proxy_healthz_total": ("counter", frozenset({"code"})),
    "kubeproxy_proxy_livez_total": ("counter", frozenset({"code"})),
}
BOTH = (Family.IPV4, Family.IPV6)


def used() -> Metrics:
    """Metrics in which every series of a dual-stack node has been touched."""
    metrics = Metrics()
    for family in BOTH:
        metrics.set_rules(family, {"nat": 10, "filter": 5}, {"nat": 1})
    metrics.set_no_local_endpoints(NoLocalEndpoints().counts)
    metrics.healthz.labels(code="200").inc()
    metrics.livez.labels(code="200").inc()
    metrics.set_mode("iptables")
    metrics.set_mode("ipvs")
    return metrics


def series(metrics: Metrics) -> dict[str, tuple[str, set[frozenset[str]], set[str]]]:
    """Of each metric: type, the sets of label names that its samples have, and the IP families."""
    found: dict[str, Any] = {}
    for line in metrics.text().decode().splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            found[name] = (kind, set(), set())
    for family in metrics.registry.collect():
        for sample in family.samples:
            base = sample.name
            for suffix in ("_bucket", "_sum", "_count", "_created"):
                base = base.removesuffix(suffix) if base not in found else base
            if base in found and not sample.name.endswith("_created"):
                found[base][1].add(frozenset(sample.labels) - {"le"})
                found[base][2].add(sample.labels.get("ip_family"))
    return found


@pytest.mark.parametrize("name", KUBE_PROXY)
def test_kube_proxys_metrics_have_its_types_and_labels(name: str) -> None:
    kind, labels = KUBE_PROXY[name]
    found = series(used())[name]
    assert (found[0], found[1]) == (kind, {labels})
    assert found[2] == ({"IPv4", "IPv6"} if "ip_family" in labels else {None})


def test_a_family_that_the_node_lacks_has_no_series() -> None:
    metrics = Metrics((Family.IPV4,))
    metrics.sync.observe(1)
    metrics.last_sync.set_to_current_time()
    metrics.restore_failures.inc()
    metrics.set_no_local_endpoints(NoLocalEndpoints().counts)
    assert b"IPv6" not in metrics.text()


def test_what_is_said_of_a_pass_is_said_of_each_family() -> None:
    metrics = Metrics()
    metrics.sync.observe(0.5)
    metrics.conntrack_deleted.of(Family.IPV6).inc(3)
    value = metrics.registry.get_sample_value
    for family in ("IPv4", "IPv6"):
        assert value("kubeproxy_sync_proxy_rules_duration_seconds_count", {"ip_family": family}) == 1
    deleted = "kubeproxy_conntrack_reconciler_deleted_entries_total"
    assert [value(deleted, {"ip_family": family}) for family in ("IPv4", "IPv6")] == [0, 3]


def test_what_alerts_see_increase_is_there_before_it_happens() -> None:
    """`increase` takes the first value of a series for where it began, so that a 1 out of nothing would be no increase."""
    value = Metrics().registry.get_sample_value
    for result in ("applied", "refused"):
        assert value("nodeproxy_config_reloads_total", {"result": result}) == 0
    for mode in Mode:
        for result in ("done", "failed"):
            assert value("nodeproxy_mode_switches_total", {"to": str(mode), "result": result}) == 0
    for kind in (*map(str, Kind), "unknown"):
        assert value("nodeproxy_refused_objects_total", {"kind": kind}) == 0


def test_one_mode_is_in_force() -> None:
    metrics = used()
    value = metrics.registry.get_sample_value
    assert [value("nodeproxy_mode", {"mode": mode}) for mode in ("iptables", "ipvs")] == [0, 1]


LOCAL = {"type": "NodePort", "externalTrafficPolicy": "Local", "ports": [{"name": "http", "port": 80, "nodePort": 30080}]}


@pytest.mark.parametrize(
    ("spec", "endpoint", "internal", "external"),
    [
        (LOCAL, ready("10.0.0.1", ELSEWHERE), 0, 1),
        (LOCAL, ready("10.0.0.1", HERE), 0, 0),
        (LOCAL, dead("10.0.0.1", HERE), 0, 0),
        (LOCAL | {"internalTrafficPolicy": "Local"}, ready("10.0.0.1", ELSEWHERE), 1, 1),
        ({"internalTrafficPolicy": "Local"}, ready("10.0.0.1", ELSEWHERE), 1, 0),
        ({}, ready("10.0.0.1", ELSEWHERE), 0, 0),
    ],
)
def test_service_ports_without_local_endpoints(spec: Any, endpoint: Any, internal: int, external: int) -> None:
    world, tracker = World(service(**spec), slice_of("web", endpoint)), NoLocalEndpoints()
    tracker.programmed(world.tracker.table, Delta(rows={}, health_checks={}))
    counts = tracker.counts
    assert counts[INTERNAL, Family.IPV4] == internal
    assert counts[EXTERNAL, Family.IPV4] == external
    assert counts[INTERNAL, Family.IPV6] == counts[EXTERNAL, Family.IPV6] == 0


def test_the_count_follows_the_table() -> None:
    """Kept by deltas, it is what a look at the whole table gives; and it is reported."""
    choose = random.Random(1)
    world, reported = World(), []
    tracker = NoLocalEndpoints(lambda counts: reported.append(dict(counts)))
    tracker.programmed(world.tracker.table, Delta(rows={}, health_checks={}))
    seen = set()
    for step in range(300):
        name = f"s{choose.randrange(8)}"
        match choose.randrange(3):
            case 0:
                policies = {"internalTrafficPolicy": choose.choice(["Local", "Cluster"])}
                cluster_ip = f"10.96.0.{int(name[1:]) + 1}"
                delta = world.apply(
                    service(name, clusterIP=cluster_ip, externalIPs=[f"192.0.2.{step % 250 + 1}"], **policies)
                )
            case 1:
                delta = world.apply(slice_of(name, ready(f"10.0.0.{step % 250 + 1}", choose.choice([HERE, ELSEWHERE]))))
            case _:
                delta = world.delete(Kind.SERVICE, name)
        tracker.programmed(world.tracker.table, delta)
        fresh = NoLocalEndpoints()
        fresh.programmed(world.tracker.table, delta)
        assert tracker.counts == fresh.counts == reported[-1]
        seen.add(tracker.counts[INTERNAL, Family.IPV4])
    assert len(seen) > 2
