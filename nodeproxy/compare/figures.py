"""Owns what a mode costs, measured: first sync, changes, the agent's CPU and memory, rules and the like, connect latency."""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from msgspec.structs import replace

from nodeproxy.compare.node import ThrowAwayNode
from nodeproxy.compare.places import Places
from nodeproxy.compare.plan import Plan, Target
from nodeproxy.compare.probing import Progress
from nodeproxy.compare.results import ConnectLatency, Count, Figures, SenderKind, spread_of
from nodeproxy.forwarding.table import Family, FrontendKind, IPProtocol
from nodeproxy.kernel.ipvs import IPVS
from nodeproxy.sandbox import processes
from nodeproxy.sandbox.agent import AgentProcess
from nodeproxy.sandbox.client import Answered, Probe, probe
from nodeproxy.sandbox.namespace import Namespace, NamespaceError
from nodeproxy.sandbox.pace import scaled
from nodeproxy.sandbox.sockets import RESET_ON_CLOSE, TCP_SYNCNT, family_of, host_port

NAMESPACE: Final = "nodeproxy-compare"
NAME: Final = "moving"
_FILE: Final = "nodeproxy-compare.json"
_PORT, _TARGET_PORT = 80, 8080
_CHANGE_TIMEOUT = 10.0
_PAUSE = 0.001
_WARM_UP = 20
_TOOL_TIMEOUT = 300.0
_LISTS = 3  # a list of virtual servers may lack some while others come or go in any namespace: the fullest counts


class NotMeasured(Exception):
    """A figure could not be taken; one line says why."""


def first_sync(figures: Figures, agent: AgentProcess, timeout: float) -> Figures:
    """Wait until the agent says that everything is programmed. Raises AgentError."""
    seconds = agent.wait_ready(timeout)
    used = processes.cpu(_pid(agent))
    memory = processes.memory(_pid(agent))
    return replace(
        figures, first_sync=seconds, cpu_own=used.own, cpu_children=used.children, rss=memory.rss, rss_peak=memory.peak
    )


def _pid(agent: AgentProcess) -> int:
    if agent.process is None:
        raise NotMeasured("the agent does not run")
    return agent.process.pid


def counts(node: Namespace, mode: str, variant: str) -> tuple[Count, ...]:
    """How much of everything there is in the kernel, both families together."""
    found: list[Count] = []
    texts = [
        node.command([f"{tool}-{variant}-save"], timeout=scaled(_TOOL_TIMEOUT)).stdout for tool in ("iptables", "ip6tables")
    ]
    lines = [line for text in texts for line in text.splitlines()]
    found.append(Count("rules", sum(line.startswith("-A ") for line in lines)))
    found.append(Count("chains", sum(line.startswith(":KUBE-") for line in lines)))
    if mode == "ipvs":
        servers, reals = node.run(_virtual_servers)
        found += [Count("virtual servers", servers), Count("real servers", reals)]
        links = node.command(["ip", "-j", "address", "show", "dev", "kube-ipvs0"], timeout=scaled(_TOOL_TIMEOUT)).stdout
        found.append(Count("service addresses on kube-ipvs0", sum(len(link["addr_info"]) for link in json.loads(links))))
    with contextlib.suppress(NamespaceError, OSError):  # no ipset program: the agent does without it
        text = node.command(["ipset", "list", "-t"], timeout=scaled(_TOOL_TIMEOUT)).stdout
        entries = [int(number) for number in re.findall(r"^Number of entries: (\d+)$", text, re.MULTILINE)]
        found += [Count("sets", len(entries)), Count("set entries", sum(entries))]
    return tuple(found)


def _virtual_servers() -> tuple[int, int]:
    with IPVS() as ipvs:
        fullest = max((ipvs.virtual_servers() for _ in range(_LISTS)), key=len)
        return len(fullest), sum(map(len, ipvs.all_real_servers(fullest).values()))


def connects(node: ThrowAwayNode, plan: Plan, samples: int, seed: int, progress: Progress) -> tuple[ConnectLatency, ...]:
    """connect() from the pod to the first, the last and a random cluster IP among those that are probed."""
    candidates = [ask.target for ask in plan.asks if ask.sender.kind is SenderKind.POD and _connectable(ask.target)]
    candidates = [one for one in candidates if one.row is not None and one.row.cluster_backends]
    if not candidates or samples < 1:
        return ()
    chosen = {"first": candidates[0], "last": candidates[-1], "random": random.Random(seed).choice(candidates)}
    found = []
    for done, (position, target) in enumerate(chosen.items()):
        progress("connect latency", done, len(chosen))
        with node.box.servers.paused():
            took = node.pod.run(_connect_many, target.address, target.port, samples)
        if (spread := spread_of(took)) is not None:
            name = f"{host_port(target.address, target.port)}/TCP"
            found.append(ConnectLatency(position, name, tuple(round(one, 1) for one in took), spread))
    return tuple(found)


def _connectable(target: Target) -> bool:
    frontend = target.frontend
    cluster_ip = frontend is not None and frontend.kind is FrontendKind.CLUSTER_IP and frontend.action.value == "forward"
    return cluster_ip and target.protocol is IPProtocol.TCP


def _connect_many(address: str, port: int, samples: int) -> list[float]:
    """Microseconds of each connect(); raises NotMeasured if one fails."""
    took = []
    limit = struct.pack("ll", int(scaled(2.0)) + 1, 0)
    for number in range(-_WARM_UP, samples):
        with socket.socket(family_of(address), socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, TCP_SYNCNT, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            # Not settimeout: Python would then poll, which is not part of connect().
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            started = time.perf_counter_ns()
            try:
                sock.connect((address, port))
            except OSError as error:
                raise NotMeasured(f"connect latency: {host_port(address, port)}: {error.strerror or error}") from error
            if number >= 0:
                took.append((time.perf_counter_ns() - started) / 1000)
    return took


def changes(
    figures: Figures,
    node: ThrowAwayNode,
    agent: AgentProcess,
    places: Mapping[Family, Places],
    *,
    wanted: int,
    progress: Progress,
) -> Figures:
    """A Service is added whose endpoint moves to another pod so many times; each until a new connection goes there.

    Raises NotMeasured where one does not go there in time.
    """
    if wanted < 1 or not places:
        return figures
    place = places[min(places)]
    for pod, address in zip(node.changing, place.changing, strict=True):
        node.box.serve(pod, address, _TARGET_PORT)
    moving = _Moving(node, place)
    moving.to(0)
    before = processes.cpu(_pid(agent))
    seconds = []
    for number in range(1, wanted + 1):
        progress("changes", number, wanted)
        time.sleep(random.uniform(0.02, 0.06))  # in step with no timer
        seconds.append(moving.to(number % 2))
    used = processes.cpu(_pid(agent)).since(before)
    memory = processes.memory(_pid(agent))
    return replace(
        figures,
        changes=tuple(seconds),
        change=spread_of(seconds),
        cpu_own_changes=used.own,
        cpu_children_changes=used.children,
        rss=memory.rss,
        rss_peak=memory.peak,
    )


class _Moving:
    """The Service whose endpoint moves."""

    def __init__(self, node: ThrowAwayNode, place: Places) -> None:
        self._node = node
        self._place = place

    def to(self, number: int) -> float:
        """Move the endpoint; how many seconds until a new connection goes there."""
        address = self._place.changing[number]
        name = host_port(address, _TARGET_PORT)
        what = Probe(self._place.service, _PORT, source=self._place.pod)
        started = time.monotonic()
        self._write(address)
        deadline = started + scaled(_CHANGE_TIMEOUT)
        while time.monotonic() < deadline:
            met = probe(self._node.pod, what, timeout=0.1)
            if isinstance(met, Answered) and met.name == name:
                return time.monotonic() - started
            time.sleep(_PAUSE)
        raise NotMeasured(f"a Service's endpoint was changed, and {_CHANGE_TIMEOUT:g} s later connections do not go there")

    def _write(self, address: str) -> None:
        items = _objects(self._place, address)
        temporary = self._node.box.directory / _FILE
        temporary.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
        temporary.rename(Path(self._node.manifests, _FILE))


def _objects(place: Places, address: str) -> Sequence[dict[str, Any]]:
    """The Service and its EndpointSlice, with the endpoint at an address."""
    family = f"IPv{int(place.family)}"
    ports = [{"name": "main", "port": _PORT, "targetPort": _TARGET_PORT, "protocol": "TCP"}]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": NAME, "namespace": NAMESPACE},
        "spec": {"clusterIP": place.service, "clusterIPs": [place.service], "ipFamilies": [family], "ports": ports},
    }
    endpoint_slice = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": NAME, "namespace": NAMESPACE, "labels": {"kubernetes.io/service-name": NAME}},
        "addressType": family,
        "ports": [{"name": "main", "port": _TARGET_PORT, "protocol": "TCP"}],
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
    }
    return [service, endpoint_slice]
