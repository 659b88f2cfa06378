"""Services that are not the proxy's: headless ones, those of another proxy, and names outside the cluster."""

from __future__ import annotations

from e2e.harness.dns import resolve
from e2e.harness.objects import port
from e2e.harness.settings import NAMESPACE
from e2e.harness.stage import A1, SERVERS
from e2e.harness.waiting import eventually
from e2e.harness.world import REJECTED, World
from nodeproxy.sandbox.client import Answered

PROXY_NAME = "service.kubernetes.io/service-proxy-name"
HEADLESS = "service.kubernetes.io/headless"


def test_service_proxy_name(world: World) -> None:
    """A Service labelled for another proxy is not served; without the label it is, and with it again no more."""
    other = world.service("other", labels={PROXY_NAME: "somebody-else"})
    ours = world.service("ours")
    client = world.stage.client_a
    world.answers(client, ours.address, 80, SERVERS)
    assert not any(isinstance(one, Answered) for one in client.ask(other.address, 80, 2, timeout=1.0))
    world.label(other, {PROXY_NAME: None})
    world.answers(client, other.address, 80, SERVERS)
    world.label(other, {PROXY_NAME: "somebody-else"})
    world.gone(client, other.address, 80)
    world.answers(client, ours.address, 80, SERVERS)


def test_headless_label(world: World) -> None:
    """An EndpointSlice labelled headless, as Kubernetes labels those of headless Services, is not for proxies."""
    service = world.service(selector=None)
    name = world.slice(service, [world.endpoint(A1)])
    for labels, wanted in ((None, {A1}), ("", REJECTED), (None, {A1})):
        world.api.patch("EndpointSlice", name, {"metadata": {"labels": {HEADLESS: labels}}})
        for place in (world.stage.client_a, world.stage.node_b):
            if wanted == REJECTED:
                world.never(place, service.address, 80, REJECTED)
            else:
                world.answers(place, service.address, 80, wanted)


def test_headless_service(world: World) -> None:
    """A headless Service has no address that could be served: its name is its pods' addresses. Others go on as before."""
    headless = world.service("headless", clusterIP="None")
    assert headless.addresses == ()
    plain = world.service("plain")
    world.answers(world.stage.client_a, plain.address, 80, SERVERS)
    wanted = {world.stage.pod_address(name) for name in SERVERS}
    name = f"{headless.name}.{NAMESPACE}.svc.cluster.local"
    eventually(lambda: resolve(world.stage.client_a, world.dns(), name) == wanted, f"{name} is {wanted}")


def test_headless_to_served_and_external_name(world: World) -> None:
    """A Service that becomes an ExternalName is served no more, and is again when it becomes a ClusterIP."""
    service = world.service()
    client = world.stage.client_b
    world.answers(client, service.address, 80, SERVERS)
    world.change(service, type="ExternalName", externalName="example.org", clusterIP=None, clusterIPs=None)
    world.gone(client, service.address, 80)
    back = world.change(service, type="ClusterIP", externalName=None, ports=[port()])
    world.answers(client, back.address, 80, SERVERS)
