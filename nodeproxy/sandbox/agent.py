"""Owns starting, watching and stopping an agent in a node's namespace, as an operator would: by its command line.

Works for nodeproxy and for its peer kube-proxy; neither is imported. Both get the flags they share from `AgentFlags`.
Addresses of ports are in the node's namespace; times are in seconds.
"""

from __future__ import annotations

import http.client
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from nodeproxy.sandbox.namespace import Namespace
from nodeproxy.sandbox.pace import scaled
from nodeproxy.sandbox.topology import Sandbox

Variant = Literal["legacy", "nft"]
HEALTHZ: Final = "127.0.0.1:10256"
METRICS: Final = "127.0.0.1:10249"
READY_TIMEOUT: Final = 30.0
TOOLS: Final = tuple(f"{tool}{suffix}" for tool in ("iptables", "ip6tables") for suffix in ("", "-save", "-restore"))


class AgentError(Exception):
    """The agent ended, or did not become ready; the text holds the tail of its log."""


@dataclass(frozen=True, slots=True)
class AgentFlags:
    """The flags nodeproxy and kube-proxy share, for a node named `hostname`; CIDRs as text."""

    hostname: str = "test-node"
    mode: str = "iptables"
    cluster_cidr: str = "10.0.0.0/8"
    detect_local: bool = True
    nodeport_addresses: Sequence[str] = ("0.0.0.0/0",)
    localhost_nodeports: bool = True
    masquerade_all: bool = False

    def arguments(self) -> list[str]:
        """As command-line arguments."""
        detect = ["--detect-local-mode", "ClusterCIDR", "--cluster-cidr", self.cluster_cidr]
        return [
            *("--hostname-override", self.hostname),
            *(detect if self.detect_local else []),
            *(["--nodeport-addresses", ",".join(self.nodeport_addresses)] if self.nodeport_addresses else []),
            f"--iptables-localhost-nodeports={str(self.localhost_nodeports).lower()}",
            f"--masquerade-all={str(self.masquerade_all).lower()}",
            *("--iptables-min-sync-period", "0s", "--ipvs-min-sync-period", "0s"),
            *("--conntrack-max-per-core", "0", "--conntrack-min", "0"),
            *("--healthz-bind-address", HEALTHZ, "--metrics-bind-address", METRICS),
            *("-v", "2"),
        ]


def nodeproxy_command(
    flags: AgentFlags, *, manifests: Path | None = None, master: str | None = None, variant: Variant | None = None
) -> list[str]:
    """`nodeproxy run` of this Python's environment, fed from a manifest directory or an API server."""
    program = Path(sys.executable).with_name("nodeproxy")
    source = ["--manifests", str(manifests)] if manifests else ["--master", str(master)]
    choice = ["--iptables-variant", variant] if variant else []
    return [str(program), "run", "--mode", flags.mode, *source, *choice, *flags.arguments()]


def kube_proxy_command(binary: Path, flags: AgentFlags, *, master: str) -> list[str]:
    """kube-proxy by path, fed from an API server that speaks JSON without credentials."""
    api = ["--master", master, "--kube-api-content-type", "application/json"]
    return [str(binary), "--proxy-mode", flags.mode, *api, *flags.arguments()]


def variant_environment(box: Sandbox, variant: Variant) -> dict[str, str]:
    """A PATH on which `iptables` and its relatives are of the variant, for an agent that has no flag for it."""
    directory = box.directory / f"path-{variant}"
    if not directory.exists():
        directory.mkdir()
        for tool in TOOLS:
            family, _, verb = tool.partition("-")
            real = f"/usr/sbin/{family}-{variant}" + (f"-{verb}" if verb else "")
            (directory / tool).symlink_to(real)
    return {"PATH": f"{directory}:/usr/sbin:/usr/bin:/sbin:/bin"}


def http_get(where: Namespace, url: str, *, timeout: float = 5) -> tuple[int, str]:
    """GET an http:// URL from inside a namespace: status code and body."""
    return where.run(_get, url, timeout)


def _get(url: str, timeout: float) -> tuple[int, str]:
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    try:
        connection.request("GET", parts.path or "/")
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()


class AgentProcess:
    """A running agent. As a context manager it is started and ready inside, and stopped after."""

    def __init__(
        self,
        box: Sandbox,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        healthz: str = f"http://{HEALTHZ}/healthz",
        name: str = "agent",
    ) -> None:
        self.node = box.node
        self.command = list(command)
        self.environment = dict(environment or {})
        self.healthz = healthz
        self.log = box.directory / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0.0

    def start(self) -> None:
        """Start it; returns at once. The log is appended to, so a second start keeps the first's."""
        with self.log.open("ab") as output:
            self.started = time.monotonic()
            self.process = self.node.spawn(self.command, output=output, env=self.environment)

    def wait_ready(self, timeout: float = READY_TIMEOUT) -> float:
        """Wait until healthz says 200; returns the seconds since the start. A slow machine gets more time.

        Raises AgentError with the log's tail.
        """
        deadline = time.monotonic() + scaled(timeout)
        last = "no answer"
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                raise AgentError(f"{self._title()} ended before it was ready\n{self.log_tail()}")
            try:
                status, body = http_get(self.node, self.healthz, timeout=2)
            except (OSError, http.client.HTTPException) as error:
                last = str(error)
            else:
                if status == 200:
                    return time.monotonic() - self.started
                last = f"{status} {body.strip()}"
            time.sleep(0.02)
        raise AgentError(f"{self._title()} not ready after {timeout:g} s: {last}\n{self.log_tail()}")

    def wait_metric(self, name: str, *, series: int = 1, timeout: float = READY_TIMEOUT) -> float:
        """Wait until so many series of a metric (one for each set of labels) are above 0; returns the lowest.

        kube-proxy's healthz is 200 before it programmed both families; the time of the last sync of each tells.
        """
        deadline = time.monotonic() + scaled(timeout)
        while time.monotonic() < deadline:
            try:
                _, text = http_get(self.node, f"http://{METRICS}/metrics", timeout=2)
            except (OSError, http.client.HTTPException):
                text = ""
            lines = [line for line in text.splitlines() if line.partition(" ")[0].partition("{")[0] == name]
            values = [float(line.rpartition(" ")[2]) for line in lines]
            if len(values) >= series and min(values) > 0:
                return min(values)
            time.sleep(0.02)
        raise AgentError(f"{self._title()}: metric {name} still 0 after {timeout:g} s\n{self.log_tail()}")

    def running(self) -> bool:
        """Whether the process lives."""
        return self.process is not None and self.process.poll() is None

    def stop(self, timeout: float = 20) -> int:
        """SIGTERM, wait, and SIGKILL if that did not do; returns the exit status (negative: a signal's number)."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()

    def kill(self) -> None:
        """SIGKILL, as when the machine takes it away."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def log_text(self) -> str:
        """All it has written so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def log_tail(self, lines: int = 25) -> str:
        """The end of what it has written."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    def _title(self) -> str:
        status = "" if self.process is None or self.process.poll() is None else f" (exit {self.process.returncode})"
        return f"{Path(self.command[0]).name}{status}"

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()
