"""Owns live probes by pods: one on the node under test, through cluster IPs; one elsewhere, to the node's node port."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final
from zlib import crc32

import msgspec

from nodeproxy.api.proxy_node import ApiObjectBase, ObjectMeta
from nodeproxy.operator.api import ProbeFigures, ProxyRollout
from nodeproxy.operator.cluster import Cluster, name_of
from nodeproxy.operator.objects import Pod
from nodeproxy.operator.pods import VERIFICATION_LABEL, probe_pod
from nodeproxy.operator.probe import NAME, Destination, destination, results
from nodeproxy.operator.world import ProbesSeen, StartProbes
from nodeproxy.source.apiserver.connection import RequestError, StatusError

_SAMPLE_SECONDS: Final = 2.0
"""Nodes whose turn comes at the same time share a sample. The second try of a verification, 3 s after the first one at the
earliest, must not: a Service that has gone meanwhile is no fault of the node."""
_TRIED: Final = 4
"""Services are looked at, for one that is sampled, until endpoints were found: at most so many times as many."""
_ENDPOINT_SLICES: Final = "/apis/discovery.k8s.io/v1/namespaces"


class _Port(ApiObjectBase, frozen=True):
    port: int
    protocol: str | None = None
    node_port: int | None = None


class _ServiceSpec(ApiObjectBase, frozen=True):
    cluster_ip: str | None = msgspec.field(default=None, name="clusterIP")
    ports: list[_Port] | None = None
    type: str | None = None
    internal_traffic_policy: str | None = None


class _Service(ApiObjectBase, frozen=True):
    metadata: ObjectMeta
    spec: _ServiceSpec = _ServiceSpec()

    def destination(self, target: str, *, named: bool = False) -> Destination | None:
        """Its first TCP port; None where it has no cluster IP or no such port."""
        address = self.spec.cluster_ip
        ports = [one.port for one in self.spec.ports or [] if one.protocol in (None, "TCP")]
        return Destination(target, address, ports[0], named) if address and address != "None" and ports else None


class _Conditions(ApiObjectBase, frozen=True):
    ready: bool | None = None


class _Endpoint(ApiObjectBase, frozen=True):
    conditions: _Conditions = _Conditions()


class _Slice(ApiObjectBase, frozen=True):
    endpoints: list[_Endpoint] | None = None


class PodProber:
    """Probes by pods in the operator's namespace. `image` gives the image of these pods, once it is known."""

    def __init__(self, cluster: Cluster, namespace: str, image: Callable[[], str]) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._pods = f"/api/v1/namespaces/{namespace}/pods"
        self._image = image
        self._trouble: dict[str, str] = {}
        self._sample: tuple[float, list[Destination]] = (float("-inf"), [])
        self._sampled = 0

    async def look(self) -> Mapping[str, ProbesSeen]:
        """All probes that are there, by verification; ended once both pods have."""
        pods = await self._cluster.list_as(self._pods, Pod, {"labelSelector": VERIFICATION_LABEL})
        found: dict[str, list[Pod]] = {}
        for pod in pods:
            if pod.metadata.deletion_timestamp is None:
                found.setdefault((pod.metadata.labels or {}).get(VERIFICATION_LABEL, ""), []).append(pod)
        seen = {id: _seen(group) for id, group in found.items()}
        for id, why in self._trouble.items():
            seen.setdefault(id, ProbesSeen(started=False, trouble=why))
        return seen

    async def start(self, request: StartProbes, rollout: ProxyRollout) -> None:
        """Make both pods. What stands in the way is told by `look`."""
        id = request.verification
        try:
            own = await self._own()
            port = next((one.node_port for one in own.spec.ports or [] if one.node_port), None)
            here = [one for one in (own.destination(NAME, named=True), *await self._others(rollout)) if one is not None]
            there = []
            if request.address and port:
                there = [Destination(f"{NAME} node port", request.address, port, named=True)]
            image = self._image()
            if there:
                await self._make(
                    probe_pod(f"nodeproxy-probe-{id}-to", id, request.elsewhere, there, image=image, rollout=rollout)
                )
            # Last: where this one is, all are.
            await self._make(probe_pod(f"nodeproxy-probe-{id}-from", id, request.node, here, image=image, rollout=rollout))
        except RequestError as error:
            self._trouble[id] = str(error)
            raise
        self._trouble.pop(id, None)

    async def end(self, verification: str) -> None:
        """Delete the pods."""
        self._trouble.pop(verification, None)
        for which in ("from", "to"):
            await self._cluster.delete(f"{self._pods}/nodeproxy-probe-{verification}-{which}", grace_seconds=0)

    async def _own(self) -> _Service:
        path = f"/api/v1/namespaces/{self._namespace}/services/{NAME}"
        service = await self._cluster.get_as(path, _Service)
        if service is None:
            raise RequestError(f"there is no Service {NAME} in namespace {self._namespace}: apply deploy/operator")
        return service

    async def _others(self, rollout: ProxyRollout) -> list[Destination]:
        """kubernetes.default, and a sample of the cluster's Services that have ready endpoints."""
        wanted = rollout.spec.checks.probes.services
        taken, sample = self._sample
        if time.monotonic() - taken > _SAMPLE_SECONDS or self._sampled != wanted:
            sample = await self._take_sample(wanted)
            self._sample, self._sampled = (time.monotonic(), sample), wanted
        return sample

    async def _take_sample(self, wanted: int) -> list[Destination]:
        services = await self._cluster.list_as("/api/v1/services", _Service)
        found: list[Destination] = []
        candidates: list[tuple[int, _Service, Destination]] = []
        for service in services:
            namespace, name = service.metadata.namespace or "default", service.metadata.name
            where = service.destination(f"{namespace}/{name}")
            if where is None or (namespace, name) == (self._namespace, NAME) or service.spec.type == "ExternalName":
                continue
            if (namespace, name) == ("default", "kubernetes"):
                found.append(where)
            elif service.spec.internal_traffic_policy != "Local":
                candidates.append((crc32(where.target.encode()), service, where))
        candidates.sort(key=lambda one: one[0])  # by chance, but the same before and after
        for _, service, where in candidates[: wanted * _TRIED]:
            if len(found) > wanted:
                break
            if await self._has_endpoints(service):
                found.append(where)
        return found

    async def _has_endpoints(self, service: _Service) -> bool:
        path = f"{_ENDPOINT_SLICES}/{name_of(service.metadata.namespace or 'default')}/endpointslices"
        selector = {"labelSelector": f"kubernetes.io/service-name={service.metadata.name}"}
        slices = await self._cluster.list_as(path, _Slice, selector)
        return any(endpoint.conditions.ready is not False for one in slices for endpoint in one.endpoints or [])

    async def _make(self, pod: object) -> None:
        try:
            await self._cluster.send("POST", self._pods, pod)
        except StatusError as error:
            if error.status != 409:  # made already
                raise


def _seen(pods: list[Pod]) -> ProbesSeen:
    """What the pods of one verification have found."""
    targets: list[ProbeFigures] = []
    if not any(pod.metadata.name.endswith("-from") for pod in pods):
        return ProbesSeen(started=False)
    for pod in pods:
        text = pod.termination()
        if text is None:
            return ProbesSeen(trouble=pod.trouble())
        found = results(text)
        try:
            where = _destinations(pod)
        except ValueError as error:  # none of our pods: anybody may give one our label
            return ProbesSeen(trouble=f"pod {pod.metadata.name}: {error}")
        if found is None or len(found) != len(where):
            return ProbesSeen(trouble=f"a probe pod ended without an answer{f': {text[:100]}' if text else ''}")
        for one, result in zip(where, found, strict=True):
            p50 = None if result.p50 is None else result.p50 / 1000
            targets.append(
                ProbeFigures(
                    target=one.target, sent=result.sent, failed=result.failed, p50_seconds=p50, reason=result.reason
                )
            )
    return ProbesSeen(done=True, targets=tuple(targets))


def _destinations(pod: Pod) -> list[Destination]:
    """What the arguments of a probe pod say."""
    found = []
    for argument in pod.spec.containers[0].args if pod.spec.containers else []:
        flag, _, text = argument.partition("=")
        if flag in ("--named", "--target"):
            found.append(destination(text, named=flag == "--named"))
    return found
