"""SPEC section 3, row by row: at which addresses a Service is reached, from where, and what happens there."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from world import HERE, HTTP, World, addresses, dead, draining, node, ready, service, slice_of

from nodeproxy.api.objects import Kind
from nodeproxy.forwarding.table import Action, Backend, BackendSet, Family, Frontend, FrontendKind, Masquerade

CLUSTER_IP, EXTERNAL_IP = FrontendKind.CLUSTER_IP, FrontendKind.EXTERNAL_IP
LOAD_BALANCER_IP, NODE_PORT = FrontendKind.LOAD_BALANCER_IP, FrontendKind.NODE_PORT
VIP = {"ip": "192.0.2.1"}
EVERYWHERE: dict[str, Any] = {
    "type": "LoadBalancer",
    "ports": [{**HTTP, "nodePort": 30080}],
    "externalIPs": ["198.51.100.1"],
}
BOTH = (ready("10.0.0.1", HERE), ready("10.0.0.2"))


def everywhere(*endpoints: Any, **spec: Any) -> World:
    """A Service with a frontend of each kind."""
    return World(service(ingress=[VIP], **{**EVERYWHERE, **spec}), slice_of("web", *endpoints))


def by_kind(world: World) -> dict[FrontendKind, Frontend]:
    return {frontend.kind: frontend for frontend in world.row.frontends}


def test_a_frontend_of_each_kind() -> None:
    found = by_kind(everywhere(*BOTH))
    assert {kind: (f.address, f.port) for kind, f in found.items()} == {
        CLUSTER_IP: ("10.96.0.1", 80),
        EXTERNAL_IP: ("198.51.100.1", 80),
        LOAD_BALANCER_IP: ("192.0.2.1", 80),
        NODE_PORT: (None, 30080),
    }


class TestPolicies:
    """Which set and whose source, by traffic policy."""

    def test_external_policy_cluster_masquerades_always(self) -> None:
        found = by_kind(everywhere(*BOTH))
        for kind in EXTERNAL_IP, LOAD_BALANCER_IP, NODE_PORT:
            assert found[kind].backend_set is BackendSet.CLUSTER
            assert found[kind].masquerade is Masquerade.ALWAYS
            assert not found[kind].short_cuts

    def test_external_policy_local_keeps_the_source_and_has_short_cuts(self) -> None:
        world = everywhere(*BOTH, externalTrafficPolicy="Local")
        found = by_kind(world)
        for kind in EXTERNAL_IP, LOAD_BALANCER_IP, NODE_PORT:
            assert found[kind].backend_set is BackendSet.LOCAL
            assert found[kind].masquerade is Masquerade.NEVER
            assert found[kind].short_cuts
        assert found[CLUSTER_IP].backend_set is BackendSet.CLUSTER
        assert addresses(world.row.local_backends) == ["10.0.0.1"]
        assert addresses(world.row.cluster_backends) == ["10.0.0.1", "10.0.0.2"]

    def test_internal_policy_decides_for_the_cluster_ip_only(self) -> None:
        found = by_kind(everywhere(*BOTH, internalTrafficPolicy="Local"))
        assert found[CLUSTER_IP].backend_set is BackendSet.LOCAL
        assert not found[CLUSTER_IP].short_cuts
        assert {found[kind].backend_set for kind in (EXTERNAL_IP, LOAD_BALANCER_IP, NODE_PORT)} == {BackendSet.CLUSTER}

    def test_a_cluster_ip_masquerades_all_but_local_pods_or_everybody(self) -> None:
        assert World(service()).frontend(CLUSTER_IP).masquerade is Masquerade.NOT_LOCAL_PODS
        assert World(service(), masquerade_all=True).frontend(CLUSTER_IP).masquerade is Masquerade.ALWAYS

    def test_masquerade_all_leaves_external_policy_local_alone(self) -> None:
        local = service(externalIPs=["198.51.100.1"], externalTrafficPolicy="Local")
        assert World(local, masquerade_all=True).frontend(EXTERNAL_IP).masquerade is Masquerade.NEVER

    def test_external_policy_holds_for_external_ips_of_type_cluster_ip(self) -> None:
        world = World(service(externalIPs=["198.51.100.1"], externalTrafficPolicy="Local"), slice_of("web", *BOTH))
        assert world.frontend(EXTERNAL_IP).backend_set is BackendSet.LOCAL

    def test_external_policy_holds_for_nothing_else_of_type_cluster_ip(self) -> None:
        """A load balancer IP left over from an earlier type: kube-proxy takes the policy for Cluster, and so do we."""
        world = World(service(ingress=[VIP], externalTrafficPolicy="Local"), slice_of("web", *BOTH))
        assert world.frontend(LOAD_BALANCER_IP).backend_set is BackendSet.CLUSTER

    def test_a_set_that_nobody_uses_is_empty(self) -> None:
        assert everywhere(*BOTH).row.local_backends == ()
        internal_only = World(service(internalTrafficPolicy="Local"), slice_of("web", *BOTH)).row
        assert (internal_only.cluster_backends, addresses(internal_only.local_backends)) == ((), ["10.0.0.1"])


class TestNoEndpoints:
    """REJECT where nobody can serve anywhere; DROP where only this node cannot."""

    @pytest.mark.parametrize("policy", ["Cluster", "Local"])
    @pytest.mark.parametrize("endpoints", [(), (dead("10.0.0.1", HERE),)])
    def test_reject_everywhere_without_any_usable_endpoint(self, endpoints: Any, policy: str) -> None:
        world = everywhere(*endpoints, externalTrafficPolicy=policy, internalTrafficPolicy=policy)
        assert {f.action for f in world.row.frontends} == {Action.REJECT}
        assert not any(f.short_cuts for f in world.row.frontends)
        assert world.row.all_backends == ()

    @pytest.mark.parametrize("elsewhere", [ready("10.0.0.2"), draining("10.0.0.2")])
    def test_drop_on_the_frontends_of_policy_local(self, elsewhere: Any) -> None:
        found = by_kind(everywhere(elsewhere, externalTrafficPolicy="Local"))
        assert found[CLUSTER_IP].action is Action.FORWARD
        for kind in EXTERNAL_IP, LOAD_BALANCER_IP, NODE_PORT:
            assert found[kind].action is Action.DROP
            assert found[kind].short_cuts
        found = by_kind(everywhere(elsewhere, internalTrafficPolicy="Local"))
        assert (found[CLUSTER_IP].action, found[NODE_PORT].action) == (Action.DROP, Action.FORWARD)

    def test_draining_endpoints_are_endpoints(self) -> None:
        world = everywhere(draining("10.0.0.1", HERE), externalTrafficPolicy="Local")
        assert {f.action for f in world.row.frontends} == {Action.FORWARD}

    def test_a_port_without_endpoints_does_not_harm_another(self) -> None:
        two = service(ports=[HTTP, {"name": "metrics", "port": 9090}])
        world = World(two, slice_of("web", ready("10.0.0.1")))
        assert {row.key.name.port: row.frontends[0].action for row in world.rows} == {
            "http": Action.FORWARD,
            "metrics": Action.REJECT,
        }


class TestSourceRanges:
    """loadBalancerSourceRanges: a firewall before load balancer IPs, and only there."""

    def sources(self, *ranges: str, world: World | None = None, **facts: Any) -> tuple[str, ...] | None:
        spec = {**EVERYWHERE, "loadBalancerSourceRanges": list(ranges)}
        world = World(service(ingress=[VIP], **spec), slice_of("web", *BOTH), **facts)
        return world.frontend(LOAD_BALANCER_IP).allowed_sources

    def test_unset_means_everybody(self) -> None:
        assert self.sources() is None

    def test_trimmed_and_canonical(self) -> None:
        assert self.sources(" 203.0.113.77/24", "10.1.0.0/16\t") == ("10.1.0.0/16", "203.0.113.0/24")

    def test_only_load_balancer_ips(self) -> None:
        world = everywhere(*BOTH, loadBalancerSourceRanges=["203.0.113.0/24"])
        assert {kind for kind, f in by_kind(world).items() if f.allowed_sources is not None} == {LOAD_BALANCER_IP}

    def test_the_other_family_is_ignored(self) -> None:
        assert self.sources("203.0.113.0/24", "2001:db8::/32") == ("203.0.113.0/24",)

    def test_the_other_family_alone_does_not_close_this_one(self) -> None:
        assert self.sources("2001:db8::/32") is None

    def test_an_unreadable_entry_allows_nobody(self) -> None:
        assert self.sources("everybody") == ()
        assert self.sources("everybody", "2001:db8::/32") == ()
        assert self.sources("everybody", "203.0.113.0/24") == ("203.0.113.0/24",)

    def test_a_range_with_a_node_address_lets_the_node_through(self) -> None:
        assert self.sources("192.168.0.0/24", addresses=("192.168.0.2",)) == ("192.0.2.1/32", "192.168.0.0/24")
        assert self.sources("192.168.9.0/24", addresses=("192.168.0.2",)) == ("192.168.9.0/24",)
        assert self.sources("192.168.0.0/24", addresses=("2001:db8::2",)) == ("192.168.0.0/24",)

    def test_the_node_may_come_from_any_of_the_load_balancer_ips(self) -> None:
        """As in kube-proxy; both may be bound on the node."""
        lb = service(ingress=[VIP, {"ip": "192.0.2.9"}], type="LoadBalancer", loadBalancerSourceRanges=["192.168.0.0/24"])
        world = World(lb, slice_of("web", *BOTH), addresses=("192.168.0.2",))
        found = [f.allowed_sources for f in world.row.frontends if f.kind is LOAD_BALANCER_IP]
        assert found == [("192.0.2.1/32", "192.0.2.9/32", "192.168.0.0/24")] * 2

    def test_the_addresses_of_the_node_object_count_before_those_of_the_agent(self) -> None:
        lb = service(ingress=[VIP], type="LoadBalancer", loadBalancerSourceRanges=["192.168.0.0/24"])
        world = World(lb, slice_of("web", *BOTH), addresses=("192.168.0.2",))
        assert "192.0.2.1/32" in (world.frontend(LOAD_BALANCER_IP).allowed_sources or ())
        delta = world.apply(node(None, "172.16.0.1"))
        assert len(delta.rows) == 1
        assert world.frontend(LOAD_BALANCER_IP).allowed_sources == ("192.168.0.0/24",)
        world.delete(Kind.NODE, HERE)
        assert "192.0.2.1/32" in (world.frontend(LOAD_BALANCER_IP).allowed_sources or ())

    def test_ipv6(self) -> None:
        lb = service(
            clusterIP="fd00::1",
            ingress=[{"ip": "2001:db8::9"}],
            type="LoadBalancer",
            loadBalancerSourceRanges=["fd00:1::/64"],
        )
        world = World(lb, slice_of("web", ready("fd01::1"), family=6), addresses=("fd00:1::5",))
        assert world.frontend(LOAD_BALANCER_IP, Family.IPV6).allowed_sources == ("2001:db8::9/128", "fd00:1::/64")

    def test_reject_is_for_everybody(self) -> None:
        assert by_kind(everywhere(loadBalancerSourceRanges=["203.0.113.0/24"]))[LOAD_BALANCER_IP].allowed_sources is None

    def test_they_hold_for_the_short_cuts_where_policy_local_drops(self) -> None:
        world = everywhere(ready("10.0.0.2"), loadBalancerSourceRanges=["203.0.113.0/24"], externalTrafficPolicy="Local")
        frontend = by_kind(world)[LOAD_BALANCER_IP]
        assert (frontend.action, frontend.allowed_sources) == (Action.DROP, ("203.0.113.0/24",))


class TestFrontends:
    """Which addresses a Service has, and which it does not."""

    def kinds(self, made: Any) -> list[FrontendKind]:
        return [f.kind for row in World(made).rows for f in row.frontends]

    @pytest.mark.parametrize(
        "spec", [{"clusterIP": "None"}, {"clusterIP": ""}, {"clusterIP": None}, {"type": "ExternalName"}]
    )
    def test_skipped(self, spec: Any) -> None:
        world = World(service(**spec), slice_of("web", *BOTH))
        assert not world.rows
        assert not world.problems

    def test_only_vips_are_programmed(self) -> None:
        ingress = [
            {"ip": "192.0.2.1", "ipMode": "VIP"},
            {"ip": "192.0.2.2", "ipMode": "Proxy"},
            {"ip": None},
            {"ip": "192.0.2.3"},
        ]
        made = World(service(type="LoadBalancer", ingress=ingress))
        assert [f.address for f in made.row.frontends] == ["10.96.0.1", "192.0.2.1", "192.0.2.3"]
        assert not made.problems

    def test_no_node_port_where_none_is_allotted(self) -> None:
        """allocateLoadBalancerNodePorts: false"""
        assert self.kinds(service(type="LoadBalancer", ports=[{**HTTP, "nodePort": 0}])) == [CLUSTER_IP]
        assert self.kinds(service(type="NodePort", ports=[{**HTTP, "nodePort": 30080}])) == [CLUSTER_IP, NODE_PORT]

    def test_cluster_ip_then_external_ip_then_load_balancer_ip(self) -> None:
        made = service(type="LoadBalancer", externalIPs=["10.96.0.1", "192.0.2.1", "192.0.2.1"], ingress=[VIP, VIP])
        assert self.kinds(made) == [CLUSTER_IP, EXTERNAL_IP]

    def test_several_ports_each_with_all_addresses(self) -> None:
        ports = [HTTP, {"name": "https", "port": 443}, {"name": "quic", "port": 443, "protocol": "UDP"}]
        world = World(service(ports=ports, externalIPs=["198.51.100.1"]))
        assert {str(row.key) for row in world.rows} == {
            "ns/web:http (tcp, IPv4)",
            "ns/web:https (tcp, IPv4)",
            "ns/web:quic (udp, IPv4)",
        }
        assert all([f.kind for f in row.frontends] == [CLUSTER_IP, EXTERNAL_IP] for row in world.rows)

    def test_sctp(self) -> None:
        assert World(service(ports=[{"port": 9, "protocol": "SCTP"}])).row.key.protocol == "sctp"

    @pytest.mark.parametrize(
        ("config", "seconds"),
        [(None, 10800), ({}, 10800), ({"clientIP": {}}, 10800), ({"clientIP": {"timeoutSeconds": 7}}, 7)],
    )
    def test_session_affinity(self, config: Any, seconds: int) -> None:
        assert World(service(sessionAffinity="ClientIP", sessionAffinityConfig=config)).row.affinity_seconds == seconds
        assert World(service(sessionAffinity="None", sessionAffinityConfig=config)).row.affinity_seconds is None

    def test_backends_are_sorted_and_say_who_is_local(self) -> None:
        row = World(service(), slice_of("web", ready("10.0.0.9", HERE), ready("10.0.0.10"))).row
        assert row.cluster_backends == (Backend("10.0.0.10", 8080, False), Backend("10.0.0.9", 8080, True))


class TestDualStack:
    """Each family on its own."""

    SPEC: ClassVar[dict[str, Any]] = {
        **EVERYWHERE,
        "clusterIPs": ["10.96.0.1", "fd00::1"],
        "externalIPs": ["2001:db8::7", "198.51.100.1"],
    }

    def test_every_frontend_in_its_family(self) -> None:
        world = World(service(ingress=[VIP, {"ip": "2001:db8::1"}], **self.SPEC), slice_of("web", *BOTH))
        found = {row.key.family: [f.address for f in row.frontends] for row in world.rows}
        assert found == {
            Family.IPV4: ["10.96.0.1", "198.51.100.1", "192.0.2.1", None],
            Family.IPV6: ["fd00::1", "2001:db8::7", "2001:db8::1", None],
        }
        actions = {row.key.family: {f.action for f in row.frontends} for row in world.rows}
        assert actions == {Family.IPV4: {Action.FORWARD}, Family.IPV6: {Action.REJECT}}

    def test_a_family_that_the_node_lacks_is_left_out(self) -> None:
        world = World(service(**self.SPEC), families=(Family.IPV6,))
        assert world.row.key.family is Family.IPV6
        assert not world.problems

    def test_a_family_without_a_cluster_ip_has_no_frontend(self) -> None:
        world = World(service(ingress=[{"ip": "2001:db8::1"}], **{**self.SPEC, "clusterIPs": ["10.96.0.1"]}))
        assert world.row.key.family is Family.IPV4
        assert world.problems == ["Service ns/web: spec.externalIPs[0]: 2001:db8::7: the Service has no IPv6 cluster IP"]


class TestHealthCheck:
    """healthCheckNodePort: type LoadBalancer, policy Local; ready endpoints of this node."""

    SPEC: ClassVar[dict[str, Any]] = {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 31000}

    def count(self, *endpoints: Any, **spec: Any) -> list[tuple[int, int]]:
        world = World(service(**{**self.SPEC, **spec}), slice_of("web", *endpoints))
        return [(check.port, check.local_endpoints) for check in world.tracker.table.health_checks.values()]

    def test_counts_ready_endpoints_of_this_node(self) -> None:
        assert self.count(ready("10.0.0.1", HERE), ready("10.0.0.2", HERE), ready("10.0.0.3")) == [(31000, 2)]

    def test_draining_ones_serve_but_do_not_count(self) -> None:
        assert self.count(draining("10.0.0.1", HERE)) == [(31000, 0)]

    def test_an_endpoint_with_two_ports_counts_once(self) -> None:
        ports = [HTTP, {"name": "https", "port": 443}]
        world = World(service(ports=ports, **self.SPEC), slice_of("web", ready("10.0.0.1", HERE), ports=ports))
        assert [check.local_endpoints for check in world.tracker.table.health_checks.values()] == [1]

    def test_a_slice_without_a_usable_port_does_not_count(self) -> None:
        world = World(service(**self.SPEC), slice_of("web", ready("10.0.0.1", HERE), ports=[{"name": "http", "port": None}]))
        assert [check.local_endpoints for check in world.tracker.table.health_checks.values()] == [0]

    def test_a_dual_stack_pod_counts_once(self) -> None:
        world = World(
            service(clusterIPs=["10.96.0.1", "fd00::1"], **self.SPEC),
            slice_of("web", ready("10.0.0.1", HERE)),
            slice_of("web", ready("fd01::1", HERE), family=6),
        )
        assert [check.local_endpoints for check in world.tracker.table.health_checks.values()] == [1]

    @pytest.mark.parametrize(
        "spec",
        [{"type": "NodePort"}, {"externalTrafficPolicy": "Cluster"}, {"healthCheckNodePort": 0}, {"clusterIP": "None"}],
    )
    def test_others_have_none(self, spec: Any) -> None:
        assert self.count(ready("10.0.0.1", HERE), **spec) == []

    def test_a_change_of_the_count_is_a_delta_without_rows(self) -> None:
        world = World(service(**self.SPEC), slice_of("web", ready("10.0.0.1", HERE), ports=[{"name": "other", "port": 1}]))
        delta = world.apply(slice_of("web", dead("10.0.0.1", HERE), ports=[{"name": "other", "port": 1}]))
        assert delta
        assert not delta.rows
        assert [check.local_endpoints for check in delta.health_checks.values() if check] == [0]
