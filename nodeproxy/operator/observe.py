"""Owns what the operator reads before it plans: all Nodes now and then, and those in flight each time.

Read anew instead of watched: what is decided about a node must not rest on a cache that has missed something.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Final

from nodeproxy.api.proxy_node import PROXY_NODES, ProxyNode
from nodeproxy.operator.api import IN_FLIGHT, KUBE_PROXY, NODEPROXY, NodePhase, ProxyRollout
from nodeproxy.operator.cluster import Cluster, name_of
from nodeproxy.operator.objects import DaemonSet, Node, Pod
from nodeproxy.operator.pods import CLEANUP_LABEL, CLEANUP_NAME, NODE_ANNOTATION
from nodeproxy.operator.probing import Prober
from nodeproxy.operator.world import DaemonSetSeen, NodeSeen, PodSeen, ProbesSeen, World

_NODES: Final = "/api/v1/nodes"
_NODES_SECONDS: Final = 15.0
_PROXY_NODES_SECONDS: Final = 5.0
"""A list that is older than this is taken anew; of pods, of which there are many, only at the end of the soak time."""
_PODS_SECONDS: Final = 15.0
_PODS_OF_PROXIES: Final = f"k8s-app in ({NODEPROXY},{KUBE_PROXY})"


class Common:
    """What all roll-outs of one pass see alike."""

    def __init__(
        self,
        daemon_set: DaemonSetSeen | None,
        kube_proxy_there: bool,
        probes: Mapping[str, ProbesSeen],
        cleanups: Mapping[str, bool],
    ) -> None:
        self.daemon_set = daemon_set
        self.kube_proxy_there = kube_proxy_there
        self.probes = probes
        self.cleanups = cleanups


class Observer:
    """Reads the cluster. All methods raise `RequestError` or `CredentialsError`."""

    def __init__(self, cluster: Cluster, prober: Prober, namespace: str) -> None:
        self._cluster = cluster
        self._prober = prober
        self._pods = f"/api/v1/namespaces/{namespace}/pods"
        self._daemon_sets = f"/apis/apps/v1/namespaces/{namespace}/daemonsets"
        self._nodes: tuple[float, dict[str, NodeSeen]] = (float("-inf"), {})
        self._proxy_nodes: tuple[float, dict[str, ProxyNode]] = (float("-inf"), {})
        self._proxy_pods: tuple[float, list[Pod]] = (float("-inf"), [])

    async def common(self) -> Common:
        """What does not depend on the roll-out."""
        agent = await self._cluster.get_as(f"{self._daemon_sets}/{NODEPROXY}", DaemonSet)
        kube_proxy = await self._cluster.get(f"{self._daemon_sets}/{KUBE_PROXY}")
        cleanups = {}
        for pod in await self._cluster.list_as(self._pods, Pod, {"labelSelector": f"{CLEANUP_LABEL}={CLEANUP_NAME}"}):
            node = (pod.metadata.annotations or {}).get(NODE_ANNOTATION)
            if node:
                cleanups[node] = pod.status.phase == "Succeeded"
        return Common(agent.seen() if agent else None, kube_proxy is not None, await self._prober.look(), cleanups)

    async def world(self, rollout: ProxyRollout, others: Iterable[ProxyRollout], common: Common) -> World:
        """What matters for one roll-out. `others`: all roll-outs that have begun and not ended, but this one."""
        status = rollout.status
        ends = rollout.soak_ends
        over = max(time.time() - ends, 0.0) if ends is not None else 0.0
        # The soak time does not end with what was seen before its end.
        age = min(over, _PROXY_NODES_SECONDS) if over else _PODS_SECONDS
        new = not status.nodes
        nodes = dict(await self._all_nodes(0.0 if new else age))
        proxy_nodes: dict[str, ProxyNode] = {}
        agents: dict[str, PodSeen] = {}
        kube_proxies: dict[str, PodSeen] = {}
        gone = any(line.phase is NodePhase.GONE for line in status.nodes)
        if new or ends is not None or rollout.finished or gone:
            # Before it begins they tell how large its status will become. Once it has ended this is the last look: what is
            # not seen there is left for ever.
            last_or_first = new or rollout.finished
            proxy_nodes |= await self._all_proxy_nodes(0.0 if last_or_first else min(age, _PROXY_NODES_SECONDS))
        if ends is not None:
            _sort(await self._all_proxy_pods(age), agents, kube_proxies)
        for line in rollout.status.nodes:
            if line.phase in IN_FLIGHT:
                await self._look_at(line.name, nodes, proxy_nodes, agents, kube_proxies)
        return World(
            nodes=nodes,
            proxy_nodes=proxy_nodes,
            agents=agents,
            kube_proxies=kube_proxies,
            daemon_set=common.daemon_set,
            kube_proxy_there=common.kube_proxy_there,
            probes=common.probes,
            cleanups=common.cleanups,
            claims={
                line.name: other.metadata.name
                for other in others
                for line in other.status.nodes
                if line.phase is not NodePhase.GONE
            },
            image_claim=next((one.metadata.name for one in others if one.spec.target.image and one.status.nodes), None),
        )

    async def _look_at(
        self,
        name: str,
        nodes: dict[str, NodeSeen],
        proxy_nodes: dict[str, ProxyNode],
        agents: dict[str, PodSeen],
        kube_proxies: dict[str, PodSeen],
    ) -> None:
        node = await self._cluster.get_as(f"{_NODES}/{name_of(name)}", Node)
        nodes.pop(name, None)
        if node is not None:
            nodes[name] = node.seen()
        else:
            self._nodes[1].pop(name, None)  # nor is it a node to probe others from
        proxy_nodes.pop(name, None)
        told = await self._cluster.get_as(f"{PROXY_NODES}/{name_of(name)}", ProxyNode)
        if told is not None:
            proxy_nodes[name] = told
        agents.pop(name, None)
        kube_proxies.pop(name, None)
        selector = {"fieldSelector": f"spec.nodeName={name}", "labelSelector": _PODS_OF_PROXIES}
        _sort(await self._cluster.list_as(self._pods, Pod, selector), agents, kube_proxies)

    def forget(self) -> None:
        """Something is changed: what ProxyNodes said is no longer what they say."""
        self._proxy_nodes = (float("-inf"), {})

    async def _all_nodes(self, age: float) -> Mapping[str, NodeSeen]:
        taken, nodes = self._nodes
        if time.monotonic() - taken > age:
            nodes = {node.metadata.name: node.seen() for node in await self._cluster.list_as(_NODES, Node)}
            self._nodes = (time.monotonic(), nodes)
        return nodes

    async def _all_proxy_nodes(self, age: float) -> Mapping[str, ProxyNode]:
        taken, found = self._proxy_nodes
        if time.monotonic() - taken > age:
            found = {one.metadata.name: one for one in await self._cluster.list_as(PROXY_NODES, ProxyNode)}
            self._proxy_nodes = (time.monotonic(), found)
        return found

    async def _all_proxy_pods(self, age: float) -> list[Pod]:
        taken, found = self._proxy_pods
        if time.monotonic() - taken > age:
            found = await self._cluster.list_as(self._pods, Pod, {"labelSelector": _PODS_OF_PROXIES})
            self._proxy_pods = (time.monotonic(), found)
        return found


def _sort(pods: Iterable[Pod], agents: dict[str, PodSeen], kube_proxies: dict[str, PodSeen]) -> None:
    """Pods of proxies by their nodes; of two on one node that which stays."""
    for pod in pods:
        name = pod.spec.node_name or ""
        found = agents if (pod.metadata.labels or {}).get("k8s-app") == NODEPROXY else kube_proxies
        if name not in found or found[name].deleting:
            found[name] = pod.seen()
