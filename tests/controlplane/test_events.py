"""Events on a real API server, with the rights of deploy/base/rbac.yaml, found as `kubectl describe` finds them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from hack.controlplane import ControlPlane
from hack.controlplane.load import node as node_object
from nodeproxy.agent import events
from nodeproxy.agent.api_server_events import ApiServerEvents
from nodeproxy.agent.metrics import Metrics
from nodeproxy.forwarding.table import ServiceName
from nodeproxy.source.apiserver.connection import Connection
from nodeproxy.source.apiserver.credentials import Credentials
from nodeproxy.source.apiserver.event_writer import EventWriter

pytestmark = pytest.mark.controlplane

NODE = "node-1"
SERVICES = "/api/v1/namespaces/default/services"
COLLECTIONS = {
    "ServiceAccount": "/api/v1/namespaces/kube-system/serviceaccounts",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
}
RBAC = Path(__file__).parents[2] / "deploy" / "base" / "rbac.yaml"


@pytest.fixture(scope="module")
def cluster() -> Iterator[ControlPlane]:
    with ControlPlane() as made:
        for document in yaml.safe_load_all(RBAC.read_text()):
            made.request("POST", COLLECTIONS[document["kind"]], document)
        made.request("POST", "/api/v1/nodes", node_object(NODE, ["192.168.0.1"]))
        yield made


class Recording:
    """A recorder that runs with the agent's service account."""

    def __init__(self, cluster: ControlPlane, kubeconfig: Path) -> None:
        cluster.service_account_access("kube-system", "nodeproxy").write_kubeconfig(kubeconfig)
        self.cluster = cluster
        self.metrics = Metrics()
        self.recorder = ApiServerEvents(EventWriter(Connection(Credentials(kubeconfig))), NODE, self.metrics)

    @property
    def dropped(self) -> float:
        return self.metrics.registry.get_sample_value("nodeproxy_events_dropped_total") or 0

    async def described(self, obj: Any, enough: Callable[[list[Any]], bool]) -> list[Any]:
        """The Events of an object by the fields that `kubectl describe` asks for, as soon as they are `enough`."""
        metadata = obj["metadata"]
        selector = f"involvedObject.name={metadata['name']},involvedObject.uid={metadata['uid']}"
        namespace = metadata.get("namespace", "default")
        path = f"/api/v1/namespaces/{namespace}/events?fieldSelector={quote(selector)}"
        deadline = time.monotonic() + 20
        while True:
            found: list[Any] = (await asyncio.to_thread(self.cluster.request, "GET", path))["items"]
            if enough(found):
                return found
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.1)


@pytest.fixture
async def recording(cluster: ControlPlane, tmp_path: Path) -> AsyncIterator[Recording]:
    made = Recording(cluster, tmp_path / "kubeconfig")
    task = asyncio.create_task(made.recorder.run())
    yield made
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def one(found: list[Any]) -> bool:
    return len(found) == 1


async def test_an_event_of_a_service_is_described_with_it(recording: Recording) -> None:
    body = {"metadata": {"name": "web"}, "spec": {"ports": [{"port": 80}]}}
    made = recording.cluster.request("POST", SERVICES, body)
    for _ in range(2):
        recording.recorder.service(ServiceName("default", "web"), events.HEALTH_CHECK_FAILED, "port 30000 is in use")

    (event,) = await recording.described(made, lambda found: one(found) and bool(found[0].get("series")))
    assert event["series"]["count"] == 2
    assert (event["type"], event["reason"], event["action"]) == ("Warning", "FailedToStartServiceHealthcheck", "Listen")
    assert (event["message"], event["reportingInstance"]) == ("port 30000 is in use", NODE)
    assert recording.dropped == 0

    recording.recorder.service(ServiceName("default", "web"), events.REFUSED_FIELD, "ä" * 1000)
    found = await recording.described(made, lambda found: len(found) == 2)
    assert any(event["message"].endswith("ä...") for event in found)


async def test_an_event_of_the_node_is_described_with_it(recording: Recording) -> None:
    node = recording.cluster.request("GET", f"/api/v1/nodes/{NODE}")
    recording.recorder.node(events.STARTING, "")
    (event,) = await recording.described(node, one)
    assert (event["type"], event["reason"], event["metadata"]["namespace"]) == ("Normal", "Starting", "default")
    assert event["reportingComponent"] == "nodeproxy"


async def test_what_the_server_does_not_take_is_dropped(recording: Recording) -> None:
    recording.recorder.service(ServiceName("no-such-namespace", "web"), events.REFUSED_FIELD, "x")
    async with asyncio.timeout(20):
        while recording.dropped == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    node = recording.cluster.request("GET", f"/api/v1/nodes/{NODE}")
    recording.recorder.node(events.FELL_BACK, "ipvs: no ip_vs in this kernel", warning=True)
    await recording.described(node, lambda found: any(event["reason"] == "FallbackMode" for event in found))


async def test_an_event_waits_while_the_server_is_away(recording: Recording) -> None:
    node = recording.cluster.request("GET", f"/api/v1/nodes/{NODE}")
    recording.cluster.kill_apiserver()
    recording.recorder.node(events.MODE_SWITCHED, "to ipvs")
    await asyncio.to_thread(recording.cluster.start_apiserver)
    await recording.described(node, lambda found: any(event["reason"] == "ModeSwitched" for event in found))
    assert recording.dropped == 0
