"""The control plane itself: what other tests rely on, checked against the real programs."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hack.controlplane import ApiError, Cluster, ControlPlane, ExternalCluster, NotSupported, StartError, open_cluster
from hack.controlplane.load import Load, Shape

pytestmark = pytest.mark.controlplane

SERVICES = "/api/v1/namespaces/default/services"
SLICES = "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices"


@pytest.fixture(scope="module")
def own() -> Iterator[ControlPlane]:
    """A control plane that these tests may kill and compact."""
    with ControlPlane() as cluster:
        yield cluster


def service(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"ports": [{"name": "http", "port": 80}], **spec},
    }


def first_event(cluster: Cluster, resource_version: str) -> tuple[int, dict[str, Any]]:
    """Status and first line of a watch of the Services from that version on."""
    path = f"{SERVICES}?watch=1&resourceVersion={resource_version}&timeoutSeconds=10"
    with cluster.access.open("GET", path) as response:
        return response.status, json.loads(response.readline())


def names(cluster: Cluster) -> set[str]:
    return {item["metadata"]["name"] for item in cluster.request("GET", SERVICES)["items"]}


def test_a_service_that_is_created_is_listed(control_plane: Cluster) -> None:
    created = control_plane.request("POST", SERVICES, service("listed"))
    try:
        assert created["spec"]["clusterIP"]
        assert "listed" in names(control_plane)
    finally:
        control_plane.request("DELETE", f"{SERVICES}/listed")
    assert "listed" not in names(control_plane)


def test_services_can_be_dual_stack_and_have_node_ports(own: ControlPlane) -> None:
    spec = own.request("POST", SERVICES, service("dual", type="NodePort", ipFamilyPolicy="RequireDualStack"))["spec"]
    assert spec["ipFamilies"] == ["IPv4", "IPv6"]
    assert 30000 <= spec["ports"][0]["nodePort"] <= 32767


def test_a_refused_request_says_why(own: ControlPlane) -> None:
    with pytest.raises(ApiError, match=r"404 services \"absent\" not found") as refusal:
        own.request("GET", f"{SERVICES}/absent")
    assert refusal.value.status == 404


def test_a_watch_tells_of_changes(own: ControlPlane) -> None:
    version = own.request("GET", SERVICES)["metadata"]["resourceVersion"]
    own.request("POST", SERVICES, service("watched"))
    status, event = first_event(own, version)
    assert (status, event["type"], event["object"]["metadata"]["name"]) == (200, "ADDED", "watched")


def test_a_killed_api_server_comes_back_with_its_data_at_the_same_address(own: ControlPlane) -> None:
    own.request("POST", SERVICES, service("survivor"))
    url, pid = own.url, own.pid("kube-apiserver")
    own.kill_apiserver()
    with pytest.raises(ConnectionRefusedError):
        own.request("GET", SERVICES)
    own.start_apiserver()
    assert own.url == url
    assert own.pid("kube-apiserver") != pid
    assert "survivor" in names(own)


def test_after_compaction_a_watch_from_before_is_answered_410(own: ControlPlane) -> None:
    version = own.request("GET", SERVICES)["metadata"]["resourceVersion"]
    own.compact()
    _, event = first_event(own, version)
    assert (event["type"], event["object"]["code"], event["object"]["reason"]) == ("ERROR", 410, "Expired")


def test_after_compaction_a_list_cannot_be_continued(own: ControlPlane) -> None:
    for name in ("page-1", "page-2"):
        own.request("POST", SERVICES, service(name))
    token = own.request("GET", f"{SERVICES}?limit=1")["metadata"]["continue"]
    own.compact()
    with pytest.raises(ApiError) as refusal:
        own.request("GET", f"{SERVICES}?limit=1&continue={token}")
    assert refusal.value.status == 410


def test_without_a_watch_cache_compaction_needs_no_restart() -> None:
    with ControlPlane(watch_cache=False, authorization="AlwaysAllow") as cluster:
        version = cluster.request("GET", SERVICES)["metadata"]["resourceVersion"]
        pid = cluster.pid("kube-apiserver")
        cluster.compact()
        assert cluster.pid("kube-apiserver") == pid
        _, event = first_event(cluster, version)
        assert event["object"]["code"] == 410


def test_rbac_lets_users_do_what_their_groups_may(tmp_path: Path) -> None:
    with ControlPlane(tmp_path, users={"system:kube-proxy": [], "somebody": []}) as cluster:
        assert cluster.user_access("system:kube-proxy").request("GET", "/api/v1/services")["kind"] == "ServiceList"
        with pytest.raises(ApiError, match="403"):
            cluster.user_access("somebody").request("GET", "/api/v1/services")
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "agent"}}
        cluster.request("POST", "/api/v1/namespaces/default/serviceaccounts", account)
        with pytest.raises(ApiError, match=r"403 .*system:serviceaccount:default:agent"):
            cluster.service_account_access("default", "agent").request("GET", "/api/v1/services")


def test_a_directory_used_again_has_its_data_and_credentials(tmp_path: Path) -> None:
    with ControlPlane(tmp_path, authorization="AlwaysAllow") as cluster:
        cluster.request("POST", SERVICES, service("kept"))
        token = cluster.access.token
    with ControlPlane(tmp_path, authorization="AlwaysAllow") as cluster:
        assert "kept" in names(cluster)
        assert cluster.access.token == token


def test_the_controllers_make_endpoint_slices() -> None:
    with ControlPlane(controller_manager=True) as cluster:
        cluster.request("POST", SERVICES, service("selecting", selector={"app": "web"}))
        deadline = time.monotonic() + 30
        while not cluster.request("GET", f"{SLICES.format('default')}?labelSelector=kubernetes.io/service-name=selecting")[
            "items"
        ]:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_failure_to_start_shows_the_end_of_the_log() -> None:
    with pytest.raises(StartError, match="unknown flag: --no-such-flag"):
        ControlPlane(apiserver_flags=["--no-such-flag"]).start()


def test_no_process_outlives_a_killed_parent(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import pathlib, signal, sys
        from hack.controlplane import ControlPlane
        with ControlPlane(pathlib.Path(sys.argv[1]), authorization="AlwaysAllow") as cluster:
            print(cluster.pid("etcd"), cluster.pid("kube-apiserver"), flush=True)
            signal.pause()
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        parent.send_signal(signal.SIGKILL)
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_an_external_cluster_is_used_but_not_harmed(
    own: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    own.write_kubeconfig(kubeconfig)
    assert kubeconfig.stat().st_mode & 0o777 == 0o600
    own.request("POST", SERVICES, service("theirs"))
    monkeypatch.setenv("NODEPROXY_TEST_KUBECONFIG", str(kubeconfig))
    with open_cluster() as cluster:
        assert isinstance(cluster, ExternalCluster)
        assert cluster.url == own.url
        assert "theirs" in names(cluster)
        copy = tmp_path / "copy"
        cluster.write_kubeconfig(copy)
        assert copy.read_text() == kubeconfig.read_text()
        for forbidden in (cluster.kill_apiserver, cluster.start_apiserver, cluster.compact):
            with pytest.raises(NotSupported, match="external cluster"):
                forbidden()
    assert "theirs" in names(own)


async def test_load_creates_changes_and_deletes(own: ControlPlane) -> None:
    shape = Shape(services=20, endpoints=120, node_ports=0.25, dual_stack=True, namespace="bulk")
    async with Load(own.access, shape) as load:
        await load.create()
        services = own.request("GET", "/api/v1/namespaces/bulk/services")["items"]
        assert len(services) == 20
        assert sum(item["spec"]["type"] == "NodePort" for item in services) == 5
        assert load.services[7]["spec"]["clusterIPs"] == shape.cluster_ips(7)
        slices = own.request("GET", SLICES.format("bulk"))["items"]
        assert len(slices) == 20 * 2 * 2  # families, and 100 + 20 endpoints
        assert sum(len(item["endpoints"]) for item in slices) == 20 * 2 * 120

        address = await load.update_slice(7, 110)
        changed = own.request("GET", f"{SLICES.format('bulk')}/service-7-ipv4-1")
        assert changed["endpoints"][10]["addresses"] == [address]
        second = await load.update_slice(7, 111)
        changed = own.request("GET", f"{SLICES.format('bulk')}/service-7-ipv4-1")
        assert [entry["addresses"] for entry in changed["endpoints"][10:12]] == [[address], [second]]

        await load.delete()
        assert not own.request("GET", "/api/v1/namespaces/bulk/services")["items"]
        assert not own.request("GET", SLICES.format("bulk"))["items"]


async def test_seeded_objects_are_as_if_created(own: ControlPlane) -> None:
    shape = Shape(services=200, first=1000, endpoints=3, node_ports=0.1, dual_stack=True, namespace="seeded")
    seeded = own.seed(shape)
    async with Load(own.access, shape) as load:
        await load.read()
        assert {number: item["spec"]["clusterIPs"] for number, item in load.services.items()} == {
            number: item["spec"]["clusterIPs"] for number, item in seeded.items()
        }
        ports = {
            item["spec"]["ports"][0]["nodePort"] for item in load.services.values() if item["spec"]["type"] == "NodePort"
        }
        assert len(ports) == 20
        assert len(own.request("GET", SLICES.format("seeded"))["items"]) == 400

        # Their addresses and ports are taken.
        with pytest.raises(ApiError, match="provided IP is already allocated"):
            own.request("POST", SERVICES, service("same-address", clusterIP=seeded[1000]["spec"]["clusterIP"]))
        taken = [{"port": 80, "nodePort": ports.pop()}]
        with pytest.raises(ApiError, match="provided port is already allocated"):
            own.request("POST", SERVICES, service("same-port", type="NodePort", ports=taken))

        address = await load.update_slice(1017)
        changed = own.request("GET", f"{SLICES.format('seeded')}/service-1017-ipv4-0")
        assert changed["endpoints"][0]["addresses"] == [address]
        await load.delete()
        assert not own.request("GET", "/api/v1/namespaces/seeded/services")["items"]
