"""A real API server with the operator's definitions and rights, nodes without kubelets, and operators as processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hack.controlplane import ControlPlane
from hack.controlplane.access import ApiError, Json
from hack.controlplane.processes import free_port
from nodeproxy.sandbox.pace import scaled
from tests.operator.fleet import MERGE, SYSTEM, Fleet, eventually

DEPLOY = Path(__file__).parents[2] / "deploy"
ROLLOUTS = "/apis/nodeproxy.io/v1alpha1/proxyrollouts"
COLLECTIONS = {
    "ServiceAccount": "/api/v1/namespaces/kube-system/serviceaccounts",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/kube-system/roles",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/kube-system/rolebindings",
    "CustomResourceDefinition": "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
    "Service": "/api/v1/namespaces/kube-system/services",
}


@pytest.fixture(scope="session")
def cluster() -> Iterator[ControlPlane]:
    """The API server. Nobody collects garbage, and nobody makes the service account of pods but this."""
    with ControlPlane() as made:
        paths = [*sorted((DEPLOY / "operator" / "crds").glob("proxy*.yaml")), DEPLOY / "operator" / "rbac.yaml"]
        paths.append(DEPLOY / "operator" / "probe.yaml")
        for path in paths:
            for document in yaml.safe_load_all(path.read_text()):
                if document["kind"] in COLLECTIONS:
                    made.request("POST", COLLECTIONS[document["kind"]], document)
        made.request("POST", COLLECTIONS["ServiceAccount"], {"metadata": {"name": "default"}})
        for plural in ("proxyrollouts", "proxynodes"):
            eventually(lambda plural=plural: _served(made, plural), f"{plural} are served", scaled(20))  # type: ignore[misc]
        yield made


def _served(cluster: ControlPlane, plural: str) -> bool:
    try:
        cluster.request("GET", f"/apis/nodeproxy.io/v1alpha1/{plural}")
    except ApiError:
        return False
    return True


class Rollouts:
    """ProxyRollouts of a test, as people write and read them."""

    def __init__(self, cluster: ControlPlane) -> None:
        self.cluster = cluster

    def create(self, name: str, target: Json, **spec: Any) -> Json:
        """Make one; soaking is short unless told otherwise."""
        whole = {"nodes": {"selector": {}}, "soakSeconds": 0, "timeouts": {"nodeReadySeconds": 30}, **spec, "target": target}
        body = {"apiVersion": "nodeproxy.io/v1alpha1", "kind": "ProxyRollout", "metadata": {"name": name}, "spec": whole}
        return self.cluster.request("POST", ROLLOUTS, body)

    def get(self, name: str) -> Json:
        """One as it is."""
        return self.cluster.request("GET", f"{ROLLOUTS}/{name}")

    def there(self, name: str) -> bool:
        """Whether it is there."""
        return any(item["metadata"]["name"] == name for item in self.cluster.request("GET", ROLLOUTS)["items"])

    def status(self, name: str) -> Json:
        """Its status."""
        status: Json = self.get(name).get("status", {})
        return status

    def phases(self, name: str) -> dict[str, str]:
        """Nodes by phase."""
        return {line["name"]: line["phase"] for line in self.status(name).get("nodes", [])}

    def edit(self, name: str, **spec: Any) -> None:
        """Change fields of its spec."""
        self.cluster.request("PATCH", f"{ROLLOUTS}/{name}", {"spec": spec}, content_type=MERGE)

    def delete(self, name: str) -> None:
        """Ask for its deletion."""
        self.cluster.request("DELETE", f"{ROLLOUTS}/{name}")

    def until(self, name: str, what: str, look: Callable[[Json], Any], seconds: float = 40) -> Json:
        """Wait until its status is so."""
        deadline = scaled(seconds)
        try:
            eventually(lambda: look(self.status(name)), what, deadline)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.status(name)}") from None
        return self.status(name)

    def ended(self, name: str, phase: str) -> Json:
        """Wait until it has ended, and see how."""
        status = self.until(name, "it ends", lambda status: status.get("finishedAt"))
        assert status["phase"] == phase, status
        return status


class OperatorProcess:
    """`nodeproxy operator`, with the service account of deploy/operator, not as root where that can be had."""

    def __init__(self, kubeconfig: Path, log: Path, identity: str, lease_seconds: float) -> None:
        self.identity = identity
        self.port = free_port("127.0.0.1")
        self._log = log
        program = Path(sys.executable).with_name("nodeproxy")
        self._command = [
            *(str(program), "operator", f"--kubeconfig={kubeconfig}", f"--identity={identity}", "--image=nodeproxy:probe"),
            *("--interval=100ms", f"--lease-duration={scaled(lease_seconds):g}s", f"--bind-address=127.0.0.1:{self.port}"),
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it (again)."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, env={**os.environ, "COLUMNS": "200"})

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self.process is not None
        return self.process.pid

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Signal it, and wait. Its exit status."""
        if self.process is None:
            return 0
        self.process.send_signal(how)
        status = self.process.wait(scaled(15))
        self.process = None
        return status

    def log(self) -> str:
        """What it said."""
        return self._log.read_text()


@pytest.fixture
def rollouts(cluster: ControlPlane) -> Iterator[Rollouts]:
    """ProxyRollouts; removed afterwards, whoever holds a finalizer."""
    yield Rollouts(cluster)
    for item in cluster.request("GET", ROLLOUTS)["items"]:
        path = f"{ROLLOUTS}/{item['metadata']['name']}"
        if item["metadata"].get("finalizers"):
            cluster.request("PATCH", path, {"metadata": {"finalizers": None}}, content_type=MERGE)
        if "deletionTimestamp" not in item["metadata"]:
            cluster.request("DELETE", path)


MakeFleet = Callable[..., Fleet]


@pytest.fixture
def make_fleet(cluster: ControlPlane) -> Iterator[MakeFleet]:
    """Makes the nodes of a test."""
    made: list[Fleet] = []

    def make(count: int, *, by_label: bool = False, labelled: bool = True, mirror: str = "") -> Fleet:
        fleet = Fleet(cluster, [f"n{i}" for i in range(count)], mirror=mirror)
        made.append(fleet)
        fleet.start(by_label=by_label, labelled=labelled)
        return fleet

    yield make
    for fleet in made:
        fleet.stop()


MakeOperator = Callable[[str], OperatorProcess]


@contextlib.contextmanager
def _operators(cluster: ControlPlane, directory: Path, lease_seconds: float) -> Iterator[MakeOperator]:
    kubeconfig = directory / "kubeconfig"
    cluster.service_account_access("kube-system", "nodeproxy-operator").write_kubeconfig(kubeconfig)
    made: list[OperatorProcess] = []

    def make(identity: str) -> OperatorProcess:
        operator = OperatorProcess(kubeconfig, directory / f"{identity}.log", identity, lease_seconds)
        made.append(operator)
        operator.start()
        return operator

    try:
        yield make
    finally:
        for operator in made:
            operator.end(signal.SIGKILL)
        lease = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/nodeproxy-operator"
        try:
            cluster.request("DELETE", lease)
        except ApiError as error:
            assert error.status == 404


@pytest.fixture
def make_operator(cluster: ControlPlane, tmp_path: Path) -> Iterator[MakeOperator]:
    """Starts replicas."""
    with _operators(cluster, tmp_path, lease_seconds=6) as make:
        yield make


@pytest.fixture(scope="module")
def operator(cluster: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    """One replica, for all tests of a module."""
    with _operators(cluster, tmp_path_factory.mktemp("operator"), lease_seconds=60) as make:
        yield make("one")


def probe_pods(cluster: ControlPlane) -> list[str]:
    """What is left of probes."""
    items = cluster.request("GET", f"{SYSTEM}/pods")["items"]
    return [item["metadata"]["name"] for item in items if item["metadata"]["name"].startswith("nodeproxy-probe-")]
