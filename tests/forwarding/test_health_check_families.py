"""A health-check node port is accepted in the families in which its Service has a cluster IP, and in no other."""

from __future__ import annotations

import msgspec
from world import service

from nodeproxy.cluster.state import ClusterState
from nodeproxy.forwarding.node import NodeFacts
from nodeproxy.forwarding.table import Family, ServiceName
from nodeproxy.forwarding.tracker import ForwardingTracker
from nodeproxy.source.events import Upserted


def test_families_of_a_health_check() -> None:
    for cluster_ips, families in (
        (["10.96.0.1"], (Family.IPV4,)),
        (["fd00:96::1"], (Family.IPV6,)),
        (["fd00:96::1", "10.96.0.1"], (Family.IPV4, Family.IPV6)),
    ):
        state, tracker = ClusterState("here"), ForwardingTracker(NodeFacts(name="here"))
        made = service(
            type="LoadBalancer",
            clusterIP=cluster_ips[0],
            clusterIPs=cluster_ips,
            externalTrafficPolicy="Local",
            healthCheckNodePort=30999,
        )
        delta = tracker.update(state, state.apply([Upserted(made)]))
        check = delta.health_checks[ServiceName("ns", "web")]
        assert check is not None
        assert msgspec.structs.astuple(check)[1:] == (30999, 0, families)
