"""What a trace says about the table's verdict: every endpoint and why, policies, claims, what is near. No kernel."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from nodeproxy.api.objects import ServiceStatus
from nodeproxy.cluster.names import IPProtocol
from nodeproxy.trace.results import Agreement, Trace
from tests.trace.cluster import endpoint, service, slice_of, trace_one, view

POD, REMOTE = "10.0.0.9", "203.0.113.9"


def reasons(trace: Trace) -> dict[str, str]:
    return {one.address: f"{'in' if one.used else 'out'}: {one.reason}" for one in trace.endpoints}


def reason(subject: dict[str, Any], *others: dict[str, Any], **spec: Any) -> str:
    """Why one endpoint is in or out, among others."""
    state = view(service(**spec), slice_of(subject, *others))
    return reasons(trace_one(state, POD, "10.96.0.1:80"))[subject["addresses"][0]]


READY = endpoint("10.1.0.1")


def hinted(address: str, zones: str = "", nodes: str = "") -> dict[str, Any]:
    zone_hints, node_hints = [{"name": zone} for zone in zones.split()], [{"name": node} for node in nodes.split()]
    return endpoint(address, hints={"forZones": zone_hints, "forNodes": node_hints})


def test_ready_and_not_ready() -> None:
    assert reason(READY) == "in: ready"
    assert reason(endpoint("10.1.0.2", ready=False), READY) == "out: not ready"


def test_terminating() -> None:
    serving = endpoint("10.1.0.2", ready=False, serving=True, terminating=True)
    assert reason(serving, READY) == "out: terminating, and others are ready"
    assert reason(serving) == "in: terminating but serving, and nothing is ready"
    gone = endpoint("10.1.0.3", ready=False, serving=False, terminating=True)
    assert reason(gone, READY) == "out: terminating, and no longer serving"


def test_other_node() -> None:
    here = endpoint("10.0.0.1", "here")
    policy = {"internalTrafficPolicy": "Local"}
    assert reason(READY, here, **policy) == "out: on node there, and only endpoints on this node count"
    assert reason(here, READY, **policy) == "in: ready on this node"
    nowhere = endpoint("10.1.0.5", "")
    assert reason(nowhere, here, **policy) == "out: on a node that is not known, and only endpoints on this node count"


def test_zone_hints() -> None:
    near, far, both = hinted("10.1.0.1", "a"), hinted("10.1.0.2", "b"), hinted("10.1.0.3", "b c")
    assert reason(near, far, both) == "in: ready, hinted for zone a"
    assert reason(far, near, both) == "out: hinted for zone b, and this node is in zone a"
    assert reason(both, near, far) == "out: hinted for zones b, c, and this node is in zone a"
    state = view(service(), slice_of(near, far))
    why = trace_one(state, POD, "10.96.0.1:80").expected.why
    assert "every ready endpoint has zone hints: only those for zone a are used" in why
    assert reason(far, near, READY | {"addresses": ["10.1.0.9"]}) == "in: ready"  # one without hints: none counts


def test_node_hints() -> None:
    near, far = hinted("10.1.0.1", nodes="here"), hinted("10.1.0.2", nodes="there")
    assert reason(near, far) == "in: ready, hinted for node here"
    assert reason(far, near) == "out: hinted for node there, and this node is here"


def test_duplicates() -> None:
    """The same endpoint in two slices: one entry holds, and the other says which."""
    state = view(
        service(),
        slice_of(endpoint("10.1.0.1", ready=False), name="web-1"),
        slice_of(endpoint("10.1.0.1"), name="web-2"),
        slice_of(endpoint("10.1.0.2"), endpoint("10.1.0.2"), name="web-3"),
    )
    found = [(one.slice, one.used, one.reason) for one in trace_one(state, POD, "10.96.0.1:80").endpoints]
    assert found == [
        ("web-2", True, "ready"),
        ("web-3", True, "ready"),
        ("web-1", False, "a duplicate: the entry in EndpointSlice web-2 holds"),
        ("web-3", False, "a duplicate: the entry in the same slice holds"),
    ]


def test_slices_that_cannot_be_used() -> None:
    other_port = [{"name": "metrics", "port": 9090, "protocol": "TCP"}]
    state = view(
        service(),
        slice_of(READY),
        slice_of(endpoint("fd00::1"), name="web-2", family="IPv6"),
        slice_of(endpoint("web.example.com"), name="web-3", family="FQDN"),
        slice_of(endpoint("10.1.0.4"), name="web-4", ports=[{"name": "http", "protocol": "TCP"}]),
        slice_of(endpoint("10.1.0.5"), name="web-5", ports=other_port),
        slice_of(endpoint("10.1.0.6"), name="web-6", ports=[{"name": "http", "port": 1, "protocol": "UDP"}]),
        slice_of(endpoint("10.1.0.7"), name="web-7", ports=[]),
        slice_of(endpoint("127.0.0.1"), endpoint("1.2.3"), endpoint("10.1.0.8"), name="web-8"),
    )
    assert reasons(trace_one(state, POD, "10.96.0.1:80")) == {
        "10.1.0.1": "in: ready",
        "10.1.0.8": "in: ready",
        "fd00::1": "out: IPv6, and the packet is IPv4",
        "web.example.com": "out: addressType FQDN is neither IPv4 nor IPv6",
        "10.1.0.4": "out: the slice's port 'http' has no number: not usable here",
        "10.1.0.5": "out: the slice has no port 'http'",
        "10.1.0.6": "out: the slice's port 'http' is not TCP",
        "10.1.0.7": "out: the slice has no ports",
        "127.0.0.1": "out: its address cannot be used",
        "1.2.3": "out: its address cannot be used",
    }


@pytest.mark.parametrize(
    ("source", "spec", "why"),
    [
        (POD, {}, "from a pod of this node (detect-local: 10.0.0.0/16): the source is kept"),
        (REMOTE, {}, "not from a pod of this node (detect-local: 10.0.0.0/16): masqueraded"),
        ("10.1.0.1", {}, "10.1.0.1:8080 is where the packet comes from: if it is chosen, masqueraded in any case (hairpin)"),
        (POD, {"sessionAffinity": "ClientIP"}, "the same source stays with its endpoint for 10800 s"),
    ],
)
def test_why_at_a_cluster_ip(source: str, spec: dict[str, Any], why: str) -> None:
    trace = trace_one(view(service(**spec), slice_of(READY)), source, "shop/web:http")
    assert trace.expected.outcome == "forward"
    assert any(why in one for one in trace.expected.why), trace.expected.why
    assert (trace.agreement, trace.kernel, trace.kernel_left_out) == (Agreement.NOT_COMPARED, None, "offline")


@pytest.mark.parametrize(
    ("source", "local", "outcome", "why"),
    [
        (REMOTE, False, "drop", "policy Local, and no usable endpoint is on this node"),
        (REMOTE, True, "forward", "policy Local of external traffic: the source is kept"),
        (POD, False, "forward", "pods of this node take the short-cut to the Cluster set"),
        ("node", False, "forward", "the node itself takes the short-cut to the Cluster set; masqueraded"),
    ],
)
def test_why_at_a_node_port(source: str, local: bool, outcome: str, why: str) -> None:
    ports = [{"name": "http", "port": 80, "nodePort": 30080}]
    external = service(type="NodePort", externalTrafficPolicy="Local", ports=ports)
    state = view(external, slice_of(endpoint("10.0.0.1", "here" if local else "there")))
    trace = trace_one(state, source, "node:30080")
    assert (trace.expected.outcome, trace.packet.destination) == (outcome, "192.168.0.2")
    assert any(why in one for one in trace.expected.why), trace.expected.why


def test_source_ranges_and_no_endpoints() -> None:
    balanced = service(type="LoadBalancer", loadBalancerSourceRanges=["198.51.100.0/24"], externalIPs=["198.51.100.7"])
    state = view(balanced, slice_of(READY))
    assert trace_one(state, REMOTE, "198.51.100.7:80").expected.outcome == "forward"  # ranges are for load balancer IPs
    trace = trace_one(view(service(), slice_of(endpoint("10.1.0.1", ready=False))), POD, "10.96.0.1:80")
    assert trace.expected.outcome == "reject"
    assert "everybody is rejected" in trace.expected.why[0]
    assert reasons(trace) == {"10.1.0.1": "out: not ready"}


def test_two_services_claim_an_address() -> None:
    """Whoever does not get it is named, with the field; its problem is told where it is traced itself."""
    thief = service("thief", clusterIP="10.96.0.2", externalIPs=["10.96.0.1"])
    trace = trace_one(view(service(), thief, slice_of(READY)), POD, "10.96.0.1:80")
    assert trace.frontend is not None
    assert trace.frontend.service_port == "shop/web:http"
    assert trace.notes == (
        "Service shop/thief claims 10.96.0.1 80/TCP, too (spec.externalIPs), and does not get it: "
        "a cluster IP comes before other addresses, then the older Service, then the name",
    )
    assert any("belongs to Service shop/web" in text for text in trace_one(
        view(service(), thief, slice_of(READY)), POD, "10.96.0.2:80"
    ).problems)  # fmt: skip


def test_what_is_near_where_nothing_is() -> None:
    ports = [{"name": "http", "port": 80, "nodePort": 30080}]
    state = view(
        service(type="NodePort", ports=ports),
        slice_of(READY),
        service("dns", clusterIP="10.96.0.10", ports=[{"name": "dns", "port": 53, "protocol": "UDP"}]),
        service("name", type="ExternalName", clusterIP=None, externalIPs=["198.51.100.1"]),
        service("headless", clusterIP="None", externalIPs=["198.51.100.2"]),
        node_port_addresses=("192.168.7.0/24",),
    )

    def why(destination: str, protocol: IPProtocol | None = None) -> str:
        trace = trace_one(state, REMOTE, destination, protocol)
        assert trace.expected.outcome == "no match"
        return " | ".join(trace.expected.why)

    assert "ports at 10.96.0.1: 80/tcp" in why("10.96.0.1:81")
    assert "shop/dns:dns is there for UDP, not for TCP" in why("10.96.0.10:53", IPProtocol.TCP)
    assert "shop/web:http, but nodePortAddresses leaves out 192.168.0.2" in why("192.168.0.2:30080")
    assert "but 192.168.0.3 is not an address of this node" in why("192.168.0.3:30080")
    assert "loopback serves node ports only in IPv4, in iptables mode" in why("127.0.0.1:30080")
    assert "Service shop/name names this address, but it is an ExternalName" in why("198.51.100.1:80")
    assert "Service shop/headless names this address, but it is headless" in why("198.51.100.2:80")


def test_detect_local_by_interface_is_judged_by_endpoints_when_offline() -> None:
    from nodeproxy.programmer.base import DetectLocalMode

    state = view(
        service(),
        slice_of(endpoint("10.0.0.1", "here"), READY),
        detect_local_mode=DetectLocalMode.BRIDGE_INTERFACE,
        pod_bridge_interface="cni0",
    )
    assert trace_one(state, "10.0.0.1", "10.96.0.1:80").packet.from_local_pod is True
    assert trace_one(state, REMOTE, "10.96.0.1:80").packet.from_local_pod is False
    assert trace_one(state, "node", "10.96.0.1:80").packet.from_local_pod is False


def test_detect_local_by_interface_takes_nothing_of_the_node_itself_for_a_pod() -> None:
    """A pod in the host's network has the node's address, and so is an endpoint on this node."""
    from nodeproxy.programmer.base import DetectLocalMode

    state = view(
        service(),
        slice_of(endpoint("192.168.0.2", "here"), READY),
        detect_local_mode=DetectLocalMode.BRIDGE_INTERFACE,
        pod_bridge_interface="cni0",
    )
    traces = [trace_one(state, source, "10.96.0.1:80") for source in ("192.168.0.2", "node")]
    for trace in traces:
        assert (trace.packet.from_node, trace.packet.from_local_pod) == (True, False)
        assert (trace.packet, trace.expected) == (traces[1].packet, traces[1].expected)
        assert all(backend.masquerade for backend in trace.expected.backends)


@pytest.mark.parametrize(
    ("allowed", "destination", "answers"),
    [
        ((), "192.168.0.2", True),
        ((), "127.0.0.1", True),
        (("192.168.0.0/16",), "192.168.0.2", True),
        (("10.1.0.0/16",), "192.168.0.2", False),
        (("192.168.0.0/16",), "127.0.0.1", False),
        (("127.0.0.0/8",), "127.0.0.1", True),
    ],
)
def test_health_check_node_port(allowed: tuple[str, ...], destination: str, answers: bool) -> None:
    """Let through wherever it is asked at, but the agent listens at nodePortAddresses only."""
    checked = service(
        type="LoadBalancer",
        externalTrafficPolicy="Local",
        healthCheckNodePort=31000,
        ports=[{"name": "http", "port": 80, "nodePort": 30080}],
    )
    state = view(checked, slice_of(READY), node_port_addresses=allowed)
    expected = trace_one(state, "outside" if destination == "192.168.0.2" else "node", f"{destination}:31000").expected
    what = "the node itself answers"
    if not answers:
        what = "let through, but the agent does not listen there: nodePortAddresses leaves it out"
    assert (expected.outcome, expected.why) == ("accept", (f"health-check node port of Service shop/web: {what}",))


def test_source_ranges_and_policy_local() -> None:
    """Both that drop a packet are told."""
    ports = [{"name": "http", "port": 80, "nodePort": 30080}]
    spec = {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "loadBalancerSourceRanges": ["198.51.100.0/24"]}
    status = {"loadBalancer": {"ingress": [{"ip": "198.51.100.7"}]}}
    balanced = msgspec.structs.replace(service(ports=ports, **spec), status=msgspec.convert(status, ServiceStatus))
    state = view(balanced, slice_of(READY))
    nothing_here = "policy Local, and no usable endpoint is on this node"
    for source, why in (
        (REMOTE, (f"source {REMOTE} is in none of loadBalancerSourceRanges (198.51.100.0/24)", nothing_here)),
        ("198.51.100.9", (nothing_here,)),
        (POD, (f"source {POD} is in none of loadBalancerSourceRanges (198.51.100.0/24)",)),
    ):
        assert trace_one(state, source, "198.51.100.7:80").expected.why == why
