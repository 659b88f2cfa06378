"""etcd, kube-apiserver and, if asked, kube-controller-manager, as child processes of a test."""

import base64
import contextlib
import http.client
import ipaddress
import itertools
import json
import secrets
import shutil
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from hack.controlplane.access import Access, ApiError, Json
from hack.controlplane.build import binary
from hack.controlplane.load import Shape
from hack.controlplane.processes import Process, free_port
from hack.controlplane.seed import stored

ADMIN = "admin"
_START_TIMEOUT = 120.0  # on a machine that builds Kubernetes at the same time
_TRANSACTION_SIZE = 64  # etcd takes up to 128 operations and 1.5 MB at once
_LOOPBACK = "127.0.0.1"


class Cluster(ABC):
    """An API server to test against: our own, or one given from outside."""

    @property
    @abstractmethod
    def access(self) -> Access:
        """Address and credentials of its administrator."""

    @property
    def url(self) -> str:
        """The address of the API server, as `https://127.0.0.1:6443`."""
        return self.access.url

    def write_kubeconfig(self, path: Path) -> None:
        """Writes a kubeconfig of the administrator that needs no other file."""
        self.access.write_kubeconfig(path)

    def request(self, method: str, path: str, body: Json | None = None, *, content_type: str = "application/json") -> Json:
        """Sends one request as administrator and returns the answer; raises ApiError for a status from 400 on."""
        return self.access.request(method, path, body, content_type=content_type)

    @abstractmethod
    def kill_apiserver(self) -> None:
        """Ends the API server at once, as in a crash: connections break, nothing is said to clients."""

    @abstractmethod
    def start_apiserver(self) -> None:
        """Starts the API server again, at the same address with the same data, and waits until it is ready."""

    @abstractmethod
    def compact(self) -> None:
        """Makes every resource version seen so far too old: a watch or a list continued from one is answered 410 Gone."""

    @abstractmethod
    def stop(self) -> None:
        """Ends all that was started."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


class ControlPlane(Cluster):
    """A control plane that lives as long as the `with` block, and no longer than this program.

    Entering the block starts it and returns once the API server is ready.

    Args:
        directory: keeps data, logs and credentials; used again, it continues with the same data. Without it a temporary
            directory is used and removed.
        netns: network namespace in which all processes run; its loopback must be up. Requests from here reach it all
            the same, as their sockets are made inside; other programs need a way to `bind_address`.
        bind_address: where the API server listens. Is it no loopback address, then the Service `kubernetes` has it as
            its endpoint.
        port: its port; 0 means a free one.
        names: further addresses and DNS names that its certificate shall be good for.
        service_cidr: one range, or two of different families.
        node_ports: the range of node ports.
        authorization: RBAC as in the field, or AlwaysAllow.
        users: further users and their groups; `user_access` gives their credentials. Tokens are of the static kind.
        controller_manager: whether to run the controllers (EndpointSlices from Services and Pods, and so forth).
        controllers: which ones; the one that judges nodes by their heartbeats is left out, as there is no kubelet.
        watch_cache: whether the API server keeps recent changes in memory, as in the field. Without it watches go to
            etcd, and `compact` need not restart the API server.
        apiserver_flags: further flags.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        netns: str | None = None,
        bind_address: str = _LOOPBACK,
        port: int = 0,
        names: Sequence[str] = (),
        service_cidr: str = "10.96.0.0/12,fd00:10:96::/112",
        node_ports: str = "30000-32767",
        authorization: Literal["RBAC", "AlwaysAllow"] = "RBAC",
        users: Mapping[str, Sequence[str]] | None = None,
        controller_manager: bool = False,
        controllers: str = "*,-node-lifecycle-controller",
        watch_cache: bool = True,
        apiserver_flags: Sequence[str] = (),
    ) -> None:
        self._given_directory = directory
        self._netns = netns
        self._address = bind_address
        self._port = port
        self._names = names
        self._service_cidr = service_cidr
        self._node_ports = node_ports
        self._authorization = authorization
        self._groups = {ADMIN: ["system:masters"], **(users or {})}
        self._with_controllers = controller_manager
        self._controllers = controllers
        self._watch_cache = watch_cache
        self._flags = apiserver_flags
        self._tokens: dict[str, str] = {}
        self._etcd_port = 0
        self._processes: dict[str, Process] = {}
        self._directory: Path | None = None

    @property
    def directory(self) -> Path:
        """Where data, logs and credentials are."""
        if self._directory is None:
            raise RuntimeError("The control plane is not started: use it as `with ControlPlane() as cluster`.")
        return self._directory

    @property
    def access(self) -> Access:
        """Address and credentials of the administrator."""
        return self.user_access(ADMIN)

    def user_access(self, user: str) -> Access:
        """Address and credentials of one of the users."""
        ca = self.directory / "apiserver.crt"
        return Access(url=f"https://{self._at(self._port)}", ca=ca, token=self._tokens[user], netns=self._netns)

    def service_account_access(self, namespace: str, name: str) -> Access:
        """Address and credentials of a service account, which must exist, as a pod gets them."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
        answer = self.request("POST", path, {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}})
        admin = self.access
        return Access(url=admin.url, ca=admin.ca, token=answer["status"]["token"], netns=admin.netns)

    def pid(self, component: str) -> int:
        """The process id of `etcd`, `kube-apiserver` or `kube-controller-manager`."""
        return self._processes[component].pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def start(self) -> None:
        """Starts everything and waits until it is ready; raises StartError with the end of the log if that fails."""
        if self._processes:
            raise RuntimeError("The control plane is started already.")
        binary("etcd")  # a build, if one is needed, comes before anything that must be cleaned up
        self._directory = self._given_directory or Path(tempfile.mkdtemp(prefix="controlplane-"))
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._port = self._port or free_port(self._address, self._netns)
            self._write_credentials()
            self._start_etcd()
            self.start_apiserver()
            if self._with_controllers:
                self._start_controllers()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kills every process and removes the directory, if it is a temporary one."""
        for process in reversed(self._processes.values()):
            process.kill()
        self._processes.clear()
        if self._directory is not None and self._given_directory is None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def kill_apiserver(self) -> None:
        """Ends the API server at once, as in a crash: connections break, nothing is said to clients."""
        process = self._processes.pop("kube-apiserver", None)
        if process is not None:
            process.kill()

    def start_apiserver(self) -> None:
        """Starts the API server (again: at the same address with the same data) and waits until it is ready."""
        if "kube-apiserver" in self._processes:
            raise RuntimeError("The API server is running: kill it first.")
        loopback = ipaddress.ip_address(self._address).is_loopback
        disabled = [] if self._with_controllers else ["ServiceAccount"]  # nobody makes the accounts that pods would need
        key, certificate = self.directory / "apiserver.key", self.directory / "apiserver.crt"
        flags = {
            "etcd-servers": f"http://{_LOOPBACK}:{self._etcd_port}",
            "bind-address": self._address,
            "secure-port": str(self._port),
            "tls-cert-file": str(certificate),
            "tls-private-key-file": str(key),
            "token-auth-file": str(self.directory / "tokens.csv"),
            "authorization-mode": self._authorization,
            "service-account-issuer": "https://kubernetes.default.svc",
            "service-account-key-file": str(certificate),
            "service-account-signing-key-file": str(key),
            "service-cluster-ip-range": self._service_cidr,
            "service-node-port-range": self._node_ports,
            "allow-privileged": "true",
            "advertise-address": self._address,  # else it looks for a default route, which a namespace may not have
            **({"endpoint-reconciler-type": "none"} if loopback else {}),  # the API refuses loopback endpoints
            **({"disable-admission-plugins": ",".join(disabled)} if disabled else {}),
            "watch-cache": str(self._watch_cache).lower(),
        }
        process = self._spawn("kube-apiserver", [*_flags(flags), *self._flags])
        process.wait_ready(self._apiserver_ready, _START_TIMEOUT)

    def compact(self) -> None:
        """Makes every resource version seen so far too old: a watch or a list continued from one is answered 410 Gone.

        The watch cache of the API server goes on to remember what etcd forgets, so the API server is restarted, unless
        it has no such cache.
        """
        for _ in range(2):  # so that even the newest version that a client has seen lies before what is kept
            answer = self._etcd("kv/put", {"key": _base64("nodeproxy-test/compaction"), "value": ""})
        self._etcd("kv/compaction", {"revision": answer["header"]["revision"], "physical": True})
        if self._watch_cache:
            self.kill_apiserver()
            self.start_apiserver()

    def seed(self, shape: Shape) -> dict[int, Json]:
        """Makes all objects of a Shape be there within seconds, and returns its Services by number.

        They are written to etcd while the API server is stopped; it is started again at the same address. Names and
        addresses must be new.
        """
        if shape.service_cidr is None:
            raise ValueError("Seeding needs a Shape with cluster IPs of its own (`service_cidr`).")
        low, high = map(int, self._node_ports.split("-"))
        services: dict[int, Json] = {}
        objects = stored(shape, range(low, high + 1))
        namespace: Json = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": shape.namespace}}
        try:
            self.request("POST", "/api/v1/namespaces", namespace)
        except ApiError as error:
            if error.status != 409:
                raise
        self.kill_apiserver()
        try:
            while batch := list(itertools.islice(objects, _TRANSACTION_SIZE)):
                puts = [{"requestPut": {"key": _base64(key), "value": _base64(json.dumps(obj))}} for key, obj in batch]
                self._etcd("kv/txn", {"success": puts})
                for _, obj in batch:
                    if obj["kind"] == "Service":
                        services[shape.first + len(services)] = obj
        finally:
            self.start_apiserver()
        return services

    def _start_etcd(self) -> None:
        self._etcd_port = free_port(_LOOPBACK, self._netns)
        client = f"http://{_LOOPBACK}:{self._etcd_port}"
        peer = f"http://{_LOOPBACK}:{free_port(_LOOPBACK, self._netns)}"
        flags = {
            "name": "default",
            "data-dir": str(self.directory / "etcd"),
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"default={peer}",
            "unsafe-no-fsync": "true",
            # A lone member elects itself as soon as the time-out lets it.
            "heartbeat-interval": "20",
            "election-timeout": "200",
            "log-level": "warn",
        }
        self._spawn("etcd", _flags(flags)).wait_ready(self._etcd_ready, _START_TIMEOUT)

    def _start_controllers(self) -> None:
        kubeconfig = self.directory / "controller-manager.kubeconfig"
        self.write_kubeconfig(kubeconfig)
        port = free_port(_LOOPBACK, self._netns)
        flags = {
            "kubeconfig": str(kubeconfig),
            "authentication-kubeconfig": str(kubeconfig),
            "authorization-kubeconfig": str(kubeconfig),
            "bind-address": _LOOPBACK,
            "secure-port": str(port),
            "cert-dir": str(self.directory / "controller-manager"),
            "leader-elect": "false",
            "controllers": self._controllers,
            "service-account-private-key-file": str(self.directory / "apiserver.key"),
            "root-ca-file": str(self.directory / "apiserver.crt"),
        }
        health = Access(url=f"https://{_LOOPBACK}:{port}", insecure=True, netns=self._netns)
        process = self._spawn("kube-controller-manager", _flags(flags))
        process.wait_ready(lambda: _answers_ok(health, "/healthz"), _START_TIMEOUT)

    def _spawn(self, name: str, flags: Sequence[str]) -> Process:
        process = Process(name, [binary(name), *flags], log=self.directory / f"{name}.log", netns=self._netns)
        self._processes[name] = process
        return process

    def _apiserver_ready(self) -> bool:
        return _answers_ok(self.access, "/readyz")

    def _etcd_ready(self) -> bool:
        with contextlib.suppress(ApiError):
            return "header" in self._etcd("maintenance/status", {})
        return False

    def _etcd(self, call: str, body: Json) -> Json:
        return Access(url=f"http://{_LOOPBACK}:{self._etcd_port}", netns=self._netns).request("POST", f"/v3/{call}", body)

    def _write_credentials(self) -> None:
        """A token for each user, and a key with a certificate that vouches for itself; what is there already is kept."""
        tokens = self.directory / "tokens.json"
        known = json.loads(tokens.read_text()) if tokens.exists() else {}
        self._tokens = {user: known.get(user) or secrets.token_hex(16) for user in self._groups}
        lines = [f'{self._tokens[user]},"{user}","{user}","{",".join(groups)}"\n' for user, groups in self._groups.items()]
        (self.directory / "tokens.csv").write_text("".join(lines))
        tokens.write_text(json.dumps(self._tokens))
        for file in (tokens, self.directory / "tokens.csv"):
            file.chmod(0o600)
        key, certificate = self.directory / "apiserver.key", self.directory / "apiserver.crt"
        if certificate.exists():
            return
        command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj /CN=kube-apiserver"
        subjects = ",".join(_subject(name) for name in dict.fromkeys([self._address, _LOOPBACK, "localhost", *self._names]))
        extensions = ["-addext", f"subjectAltName={subjects}"]
        subprocess.run([*command.split(), *extensions, "-keyout", key, "-out", certificate], check=True, capture_output=True)

    def _at(self, port: int) -> str:
        return f"[{self._address}]:{port}" if ":" in self._address else f"{self._address}:{port}"


def _answers_ok(access: Access, path: str) -> bool:
    try:
        with access.open("GET", path, timeout=5.0) as response:
            return response.status == 200
    except http.client.HTTPException:
        return False


def _subject(name: str) -> str:
    try:
        return f"IP:{ipaddress.ip_address(name)}"
    except ValueError:
        return f"DNS:{name}"


def _flags(values: Mapping[str, str]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
