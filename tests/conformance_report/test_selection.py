"""Which of Kubernetes' tests run: patterns that ginkgo (Go) and we (Python) read alike, and a reason for each left out."""

import re

import pytest

from hack.conformance import selection

SUITE = "Kubernetes e2e suite "


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("[sig-network] Services should serve a basic endpoint from pods [Conformance]", True),
        ("[sig-network] Networking Granular Checks: Services should function for pod-Service: udp", True),
        ("[sig-network] EndpointSlice should support creating EndpointSlice API operations [Conformance]", True),
        ("[sig-network] EndpointSliceMirroring should mirror a custom Endpoint", False),
        ("[sig-network] Service endpoints latency should not be very high [Conformance]", False),
        ("[sig-api-machinery] Services should not be here", False),
    ],
)
def test_the_groups_are_found_as_ginkgo_looks_for_them(name: str, found: bool) -> None:
    pattern = selection.pattern(selection.GROUPS)
    assert (re.search(pattern, SUITE + name) is not None) == found
    assert (selection.group_of(name, selection.GROUPS) is not None) == found


def test_focus_narrows_the_groups() -> None:
    pattern = selection.pattern(["Services"], "hairpin|affinity")
    assert re.search(pattern, f"{SUITE}[sig-network] Services should allow pods to hairpin back to themselves")
    assert re.search(pattern, f"{SUITE}[sig-network] Services should have session affinity work")
    assert not re.search(pattern, f"{SUITE}[sig-network] Services should release NodePorts on delete")
    assert not re.search(pattern, f"{SUITE}[sig-network] Networking should have session affinity")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("Services should allow creating a basic SCTP service with pod and endpoints [LinuxOnly] [Serial]", "SCTP"),
        ("Networking Granular Checks: Services should function for pod-Service: sctp [Feature:SCTPConnectivity]", "SCTP"),
        ("Services should work after restarting kube-proxy [Disruptive]", "ssh"),
        ("LoadBalancers [Feature:LoadBalancer] should be able to change the type [Slow]", "cloud"),
        ("Networking should provide Internet connection for containers [Feature:Networking-IPv4]", "internet"),
    ],
)
def test_what_is_left_out_has_its_reason(name: str, word: str) -> None:
    assert word in (selection.reason(name, selection.EXCLUSIONS) or "")


@pytest.mark.parametrize(
    "name",
    [
        "Services should serve endpoints on same port and different protocol for internal traffic on Type LoadBalancer",
        "DNS configMap nameserver Change stubDomain should be able to change stubDomain configuration [Slow] [Serial]",
        "Networking Granular Checks: Services should update nodePort: http [Slow]",
    ],
)
def test_what_can_run_here_is_not_left_out(name: str) -> None:
    assert selection.reason(name, selection.EXCLUSIONS) is None


def test_a_group_with_brackets_is_found() -> None:
    name = "[sig-network] [Feature:IPv6DualStack] should create service with ipv4,v6 cluster ip"
    assert re.search(selection.pattern([selection.DUAL_STACK]), SUITE + name)
    assert selection.group_of(name, [selection.DUAL_STACK]) == selection.DUAL_STACK
    assert not re.search(selection.pattern(selection.GROUPS), SUITE + name)
