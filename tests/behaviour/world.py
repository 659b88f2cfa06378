"""A node in the sandbox with an agent that is fed from manifests, and the few objects that behaviour tests need."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nodeproxy.kernel.ipvs import IPVS
from nodeproxy.sandbox.agent import AgentFlags, AgentProcess, http_get, nodeproxy_command
from nodeproxy.sandbox.client import Answered, Probe, Verdict, probe_many
from nodeproxy.sandbox.namespace import Namespace
from nodeproxy.sandbox.pace import scaled
from nodeproxy.sandbox.topology import Sandbox
from tests.ways import Way

NODE = "test-node"
NODE_ADDRESS = "192.168.0.2"
CLUSTER_IP = "10.96.0.10"


def service(
    name: str = "web", *, port: int = 80, protocol: str = "TCP", cluster_ip: str = CLUSTER_IP, **spec: Any
) -> dict[str, Any]:
    """A Service in namespace `test` with one port named `p`."""
    ports = [
        {
            "name": "p",
            "port": port,
            "protocol": protocol,
            **({"nodePort": spec.pop("nodePort")} if "nodePort" in spec else {}),
        }
    ]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "test", "creationTimestamp": "2025-01-01T00:00:00Z"},
        "spec": {
            "type": "NodePort" if "nodePort" in ports[0] else "ClusterIP",
            "clusterIP": cluster_ip,
            "ports": ports,
            **spec,
        },
    }


def endpoint_slice(
    addresses: Sequence[str], name: str = "web", *, port: int = 8080, protocol: str = "TCP"
) -> dict[str, Any]:
    """The ready endpoints of a Service, all on this node."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{name}-1", "namespace": "test", "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv6" if addresses and ":" in addresses[0] else "IPv4",
        "endpoints": [{"addresses": [address], "nodeName": NODE, "conditions": {"ready": True}} for address in addresses],
        "ports": [{"name": "p", "port": port, "protocol": protocol}],
    }


class World:
    """A sandbox, a manifest directory and an agent that reads it."""

    def __init__(
        self,
        box: Sandbox,
        way: Way,
        environment: Mapping[str, str] | None = None,
        flags: Sequence[str] = (),
        manifests: Path | None = None,
    ) -> None:
        self.box = box
        self.way = way
        self.manifests = manifests or box.directory / "manifests"
        self.manifests.mkdir(exist_ok=True)
        command = [*nodeproxy_command(AgentFlags(mode=way.mode), manifests=self.manifests, variant=way.variant), *flags]
        self.agent = AgentProcess(box, command, environment=environment)

    def put(self, file: str, *objects: dict[str, Any]) -> None:
        """Write a manifest file, atomically."""
        temporary = self.manifests / f".{file}.tmp"
        temporary.write_text("\n---\n".join(json.dumps(one) for one in objects))
        temporary.rename(self.manifests / f"{file}.yaml")

    def remove(self, file: str) -> None:
        """Remove a manifest file."""
        (self.manifests / f"{file}.yaml").unlink()

    def rules(self, table: str = "nat", *, family: int = 4) -> list[str]:
        """The lines of iptables-save for a table, without counters and comments."""
        tool = f"{'iptables' if family == 4 else 'ip6tables'}-{self.way.variant}-save"
        done = self.box.node.command([tool, "-t", table], check=False)
        while done.returncode and "in kernel doesn't exist" in done.stderr:  # a set went between its rule and its name
            done = self.box.node.command([tool, "-t", table], check=False)
        assert done.returncode == 0, done.stderr
        text = done.stdout
        return [line.split(" [")[0] for line in text.splitlines() if line[:1] in (":", "-")]

    def forwards_to(self, endpoint: str) -> bool:
        """Whether new connections may be sent to an endpoint, `address:port`."""
        if self.way.mode == "iptables":
            return any(endpoint in rule for rule in self.rules())
        return any(f" {endpoint} weight 1" in line for line in self.virtual_servers())

    def virtual_servers(self) -> list[str]:
        """Each virtual server, and each of its real servers, as a line of text without counters."""

        def read() -> list[str]:
            with IPVS() as ipvs:
                return [
                    f"{server} {settings.scheduler} {settings.persistence_seconds or ''}"
                    + "".join(sorted(f", {real.server} weight {real.weight}" for real in ipvs.real_servers(server)))
                    for server, settings in ipvs.virtual_servers().items()
                ]

        return sorted(self.box.node.run(read))

    def held(self) -> list[str]:
        """Everything of the agent's mode that the kernel holds, as lines of text in an order of their own."""
        tables = ("nat", "filter") if self.way.mode == "iptables" else ("mangle", "nat", "filter")
        lines = sorted(rule for table in tables for rule in self.rules(table))
        if self.way.mode == "ipvs":
            lines += self.virtual_servers()
            shown = self.box.node.command(["ip", "-o", "address", "show", "dev", "kube-ipvs0"], check=False).stdout
            lines += sorted(line.split()[3] for line in shown.splitlines())
            lines += sorted(self.box.node.command(["ipset", "save"]).stdout.splitlines())
        return lines

    def iptables(self, *arguments: str, check: bool = True) -> str:
        """Run the variant's iptables in the node."""
        return self.box.node.command([f"iptables-{self.way.variant}", "-w", "5", *arguments], check=check).stdout

    def settle(self, done: Callable[[], bool], what: str, timeout: float = 10) -> float:
        """Wait until `done`; returns the seconds it took."""
        start = time.monotonic()
        while time.monotonic() - start < scaled(timeout):
            if done():
                return time.monotonic() - start
            time.sleep(0.02)
        raise AssertionError(f"not within {timeout} s: {what}\n{self.agent.log_tail()}")

    def settle_as(self, before: Sequence[str], what: str, timeout: float = 6) -> None:
        """Wait until the kernel holds what it held `before`."""
        try:
            self.settle(lambda: self.held() == before, what, timeout)
        except AssertionError as error:
            now = self.held()
            differ = [f"- {line}" for line in before if line not in now] + [
                f"+ {line}" for line in now if line not in before
            ]
            raise AssertionError("\n".join([what, *differ])) from error

    def metric(self, name: str) -> float:
        """The value of an agent's metric without labels."""
        _, text = http_get(self.box.node, "http://127.0.0.1:10249/metrics")
        return next(float(line.split()[1]) for line in text.splitlines() if line.split()[0] == name)


def ask(where: Namespace, destination: str, port: int, count: int = 1, **probe: Any) -> list[Verdict]:
    """Send so many probes."""
    return probe_many(where, [Probe(destination, port, **probe) for _ in range(count)])


def names(verdicts: Sequence[Verdict]) -> set[str]:
    """Who answered; anything but an answer is shown as itself."""
    return {verdict.name if isinstance(verdict, Answered) else str(verdict) for verdict in verdicts}


def directory_of_wrappers(directory: Path, tools: Mapping[str, str]) -> str:
    """A PATH on which some tools are shell scripts; `$REAL` in a script is the real tool."""
    directory.mkdir()
    for tool, script in tools.items():
        path = directory / tool
        path.write_text(f"#!/bin/bash\nREAL=/usr/sbin/{tool}\n{script}\n")
        path.chmod(0o755)
    return f"{directory}:/usr/sbin:/usr/bin:/sbin:/bin"
