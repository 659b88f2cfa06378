"""Owns the throw-away node: the sandbox with everything in it that a plan asks of or from, and the agent that runs there."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from nodeproxy.compare.places import BRIDGE_NAME, Places, own_addresses
from nodeproxy.compare.plan import LOOPBACK, Plan
from nodeproxy.compare.results import SenderKind
from nodeproxy.configuration.agent_config import AgentConfig, Mode, WhileAnotherRuns
from nodeproxy.forwarding.table import Family
from nodeproxy.kernel.errors import KernelError
from nodeproxy.kernel.ipvs import IPVS
from nodeproxy.sandbox.agent import HEALTHZ, METRICS, AgentProcess
from nodeproxy.sandbox.many import add_client_host, add_pod_host
from nodeproxy.sandbox.namespace import Namespace
from nodeproxy.sandbox.sockets import host_port
from nodeproxy.sandbox.topology import Sandbox
from nodeproxy.snapshot.directory import CONFIG, save
from nodeproxy.snapshot.model import Snapshot
from nodeproxy.snapshot.view import NodeView

_AT_ONCE: Final = 0.001  # in a configuration file, 0 means the default
ON_NODE: Final = "node"
"""Name of the server that stands for what no rule matched and the node got itself."""
# Where the kernel limits ICMP for the whole machine (before 6.12 or so), rejected probes would be taken for dropped ones.
_ICMP: Final = {"net.ipv4.icmp_ratemask": 0, "net.ipv6.icmp.ratemask": "2"}
# Connections here are over in milliseconds, and the machine's table of them is for all namespaces.
_CONNTRACK: Final = {
    "net.netfilter.nf_conntrack_tcp_timeout_close": 1,
    "net.netfilter.nf_conntrack_udp_timeout": 5,
    "net.netfilter.nf_conntrack_udp_timeout_stream": 5,
}


class ThrowAwayNode:
    """A node in namespaces, laid out for a plan. Use as a context manager."""

    def __init__(self, view: NodeView, plan: Plan, places: Mapping[Family, Places]) -> None:
        self._view = view
        self._plan = plan
        self._places = places
        self._stack = ExitStack()

    def __enter__(self) -> ThrowAwayNode:
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _build(self) -> None:
        _allow_many_files()
        own = own_addresses(self._view)
        self.box = self._stack.enter_context(Sandbox(node_addresses=own))
        self._stack.callback(_forget_virtual_servers, self.box.node)
        self.box.node.sysctl(_ICMP | _CONNTRACK, optional=True)
        families = list(self._places.values())
        pods = [[place.pod for place in families]]
        pods += [[place.changing[number] for place in families] for number in range(len(families[0].changing))]
        self.pod, *self.changing = self.box.add_pods(pods)
        local = {backend.address for backend, _ in self._plan.backends if backend.local}
        self.local = add_pod_host(self.box, sorted(local - set(own)))
        clients = {place.clients for place in families} | self._plan.clients
        self.client = add_client_host(self.box, sorted(clients))
        self._serve(set(own))

    def _serve(self, own: set[str]) -> None:
        """Servers at every endpoint, and on the node at what nothing must match."""
        servers, node = self.box.servers, self.box.node
        anywhere: set[tuple[str, int, int, str]] = set()
        taken: set[tuple[str, int, str]] = set()
        for backend, protocol in self._plan.backends:
            name = protocol.upper()
            if backend.address in own:
                taken.add((backend.address, backend.port, name))
                servers.add(node, backend.address, backend.port, protocol=name)
                continue
            where = self.local if backend.local else self.box.outside
            family = 6 if ":" in backend.address else 4
            if (key := (where.name, family, backend.port, name)) not in anywhere:
                anywhere.add(key)
                servers.add_any(where, family, backend.port, protocol=name)
        for (
            target
        ) in self._plan.targets:  # what no rule matches leaves the node, and is answered there under its own address
            key = (self.box.outside.name, 6 if ":" in target.address else 4, target.port, target.protocol.upper())
            if key not in anywhere:
                anywhere.add(key)
                servers.add_any(self.box.outside, key[1], target.port, protocol=key[3])
        for ask in self._plan.asks:
            at = (ask.target.address, ask.target.port, ask.target.protocol.upper())
            unmatched = "no match" in (ask.expected.outcome, ask.table.outcome)
            if unmatched and at not in taken and (at[0] in own or at[0] == LOOPBACK):
                taken.add(at)
                servers.add(node, at[0], at[1], protocol=at[2], name=ON_NODE)

    def sender(self, kind: SenderKind) -> Namespace:
        """The namespace in which a sender is."""
        match kind:
            case SenderKind.NODE:
                return self.box.node
            case SenderKind.POD:
                return self.pod
            case SenderKind.ENDPOINT:
                return self.local
        return self.client

    def backend_is_on_node(self, name: str) -> bool:
        """Whether a backend, given as `ADDRESS:PORT`, is the node itself."""
        return any(name == host_port(address, int(name.rpartition(":")[2])) for address in own_addresses(self._view))

    @contextmanager
    def agent(self, snapshot: Snapshot, mode: Mode, variant: str) -> Iterator[AgentProcess]:
        """The agent, as an operator runs it, from the snapshot in the directory `manifests`. Not started yet."""
        save(replace(snapshot, config=adapted(snapshot.config, mode)), self.manifests)
        program = str(Path(sys.executable).with_name("nodeproxy"))
        command = [program, "run", "--manifests", str(self.manifests), "--config", str(self.manifests / CONFIG)]
        agent = AgentProcess(self.box, [*command, "--iptables-variant", variant])
        try:
            yield agent
        finally:
            agent.stop()

    @property
    def manifests(self) -> Path:
        """The directory that the agent reads."""
        return self.box.directory / "manifests"


def adapted(config: AgentConfig, mode: Mode) -> AgentConfig:
    """An agent's configuration for the throw-away node; `adapted_words` says what is otherwise."""
    return replace(
        config,
        mode=mode,
        fallback=None,
        kubeconfig=None,
        master=None,
        manifests=None,
        service_proxy_name=None,
        pod_bridge_interface=BRIDGE_NAME if config.pod_bridge_interface else None,
        pod_interface_name_prefix=BRIDGE_NAME if config.pod_interface_name_prefix else None,
        min_sync_period=_AT_ONCE,
        ipvs_min_sync_period=_AT_ONCE,
        conntrack_max_per_core=0,
        conntrack_min=0,
        healthz_bind_address=HEALTHZ,
        metrics_bind_address=METRICS,
        while_another_runs=WhileAnotherRuns.PROCEED,
        events=False,
    )


def adapted_words(config: AgentConfig) -> tuple[str, ...]:
    """What of the configuration is otherwise in the throw-away node, as far as it may matter to what is measured there."""
    words = ["least time between two syncs: 1 ms, so that the time of a change is that of programming it"]
    words += [f"pods' bridge: {BRIDGE_NAME} instead of {config.pod_bridge_interface}"] if config.pod_bridge_interface else []
    if config.pod_interface_name_prefix:
        words.append(f"prefix of pods' interfaces: {BRIDGE_NAME} instead of {config.pod_interface_name_prefix}")
    return tuple(words)


def _allow_many_files() -> None:
    """A listener for each port and family, and the probes under way."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _forget_virtual_servers(where: Namespace) -> None:
    """Those of thousands go with a namespace, but then while the next mode is measured."""

    def flush() -> None:
        with suppress(KernelError, OSError), IPVS() as ipvs:
            ipvs.flush()

    where.run(flush)
