"""kube-proxy, running beside us in a network namespace: what we measure and compare ourselves with.

    with KubeProxyPeer(netns="node", kubeconfig=path, iptables_variant="legacy") as peer:
        peer.wait_synced()

The control plane must be reachable from that namespace, at the address that the kubeconfig names.
"""

import http.client
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from hack.controlplane.build import binary
from hack.controlplane.processes import Process, connect_in

_LOOPBACK = "127.0.0.1"
_HEALTH_PORT = 10256
_METRICS_PORT = 10249
_LAST_WRITTEN = re.compile(r"^kubeproxy_sync_proxy_rules_last_timestamp_seconds(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


class KubeProxyPeer:
    """A kube-proxy process that ends with the `with` block, or with this program; its rules stay in the namespace.

    Args:
        netns: the network namespace that is its node.
        kubeconfig: how to reach the API server.
        iptables_variant: which iptables it finds on its PATH.
        mode: its --proxy-mode; `iptables`, `ipvs` or `nftables`.
        node: its --hostname-override. kube-proxy waits half a minute for a Node of this name: create one (`load.node`).
        extra_flags: further flags; a later flag overrides an earlier one.
        program: the kube-proxy to run, if not the one of our build.
        directory: keeps the log; without it, a temporary directory is used and removed.
    """

    def __init__(
        self,
        *,
        netns: str,
        kubeconfig: Path,
        iptables_variant: Literal["legacy", "nft"] = "legacy",
        mode: str = "iptables",
        node: str = "test-node",
        extra_flags: Sequence[str] = (),
        program: Path | None = None,
        directory: Path | None = None,
    ) -> None:
        self._netns = netns
        self._variant = iptables_variant
        self._program = program
        self._given_directory = directory
        self._directory: Path | None = None
        self._process: Process | None = None
        self._flags = [
            f"--kubeconfig={kubeconfig.absolute()}",
            f"--proxy-mode={mode}",
            f"--hostname-override={node}",
            "--cluster-cidr=10.0.0.0/8",
            "--detect-local-mode=ClusterCIDR",
            # The table's size is the machine's, not the namespace's: leave it.
            "--conntrack-max-per-core=0",
            "--conntrack-min=0",
            f"--healthz-bind-address={_LOOPBACK}:{_HEALTH_PORT}",
            f"--metrics-bind-address={_LOOPBACK}:{_METRICS_PORT}",
            *extra_flags,
        ]

    @property
    def pid(self) -> int:
        """The process id, for figures of CPU and memory."""
        return self._running().pid

    @property
    def log(self) -> Path:
        """The log file."""
        return self._running().log

    def __enter__(self) -> Self:
        program = self._program or binary("kube-proxy")
        self._directory = self._given_directory or Path(tempfile.mkdtemp(prefix="kube-proxy-"))
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            path = f"{self._write_tools(self._directory / 'bin')}:/usr/sbin:/usr/bin:/sbin:/bin"
            # A lock of its own: the machine's is shared by all namespaces, though their tables are not.
            env = {"PATH": path, "XTABLES_LOCKFILE": str(self._directory / "xtables.lock")}
            log = self._directory / "kube-proxy.log"
            self._process = Process("kube-proxy", [program, *self._flags], log=log, netns=self._netns, env=env)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is not None:
            self._process.kill()
        if self._directory is not None and self._given_directory is None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def wait_synced(self, timeout: float = 300.0) -> None:
        """Waits until it is healthy and has written its rules once; raises StartError with the end of the log if not."""
        self._running().wait_ready(self._synced, timeout, interval=0.1)  # its metrics are costly

    def get(self, port: int, path: str) -> tuple[int, str]:
        """Status and body of a page that kube-proxy serves on the loopback of its namespace."""
        connection = http.client.HTTPConnection(_LOOPBACK, port, timeout=10.0)
        with closing(connection):
            connection.sock = connect_in(self._netns, _LOOPBACK, port, 10.0)
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()

    def metrics(self) -> str:
        """Its metrics, in Prometheus' text format."""
        return self.get(_METRICS_PORT, "/metrics")[1]

    def _synced(self) -> bool:
        try:
            if self.get(_HEALTH_PORT, "/healthz")[0] != 200:
                return False
            written = _LAST_WRITTEN.findall(self.metrics())
        except http.client.HTTPException:
            return False
        return bool(written) and all(float(value) > 0 for value in written)

    def _write_tools(self, directory: Path) -> Path:
        """A directory in which the names of the iptables programs mean those of the chosen variant."""
        directory.mkdir(exist_ok=True)
        for family in ("iptables", "ip6tables"):
            for suffix in ("", "-save", "-restore"):
                name = f"{family}-{self._variant}{suffix}"
                tool = shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
                if tool is None:
                    raise FileNotFoundError(f"There is no {name}: apt-get install iptables")
                link = directory / f"{family}{suffix}"
                link.unlink(missing_ok=True)
                link.symlink_to(tool)
        return directory

    def _running(self) -> Process:
        if self._process is None:
            raise RuntimeError("kube-proxy is not started: use it as `with KubeProxyPeer(...) as peer`.")
        return self._process
