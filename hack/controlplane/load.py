"""Fills an API server with Services and EndpointSlices, quickly, and changes them one at a time.

    async with Load(cluster.access, Shape(services=5000, endpoints=10)) as load:
        await load.create()
        address = await load.update_slice(17)  # one endpoint of Service 17 is now at this address
        await load.delete()

The Services have no selector, so that no controller touches their slices.
"""

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec

from hack.controlplane.access import Access, ApiError, Json
from hack.controlplane.processes import socket_in

_SERVICES = "/api/v1/namespaces/{}/services"
_SLICES = "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices"
_SLICE_SIZE = 100  # as the controller makes them
_SCATTER = 2654435761  # Knuth's factor of multiplicative hashing


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What to create.

    Attributes:
        services: how many, named `PREFIX-0` and on.
        first: the number to begin with instead, so that two Shapes have different names and addresses.
        endpoints: how many each has (of each family).
        node_ports: the share of Services that are of type NodePort, spread evenly: 0.1 makes every tenth one.
        dual_stack: whether each has IPv4 and IPv6.
        nodes: names of the nodes on which the endpoints are, in turn.
        service_cidr: the cluster's ranges for cluster IPs, to scatter addresses over in a way that is always the same, and
            because addresses that the API server chooses are handed out one at a time. None lets it choose.
        addresses, addresses6: where the endpoints' addresses are taken from; the upper half of each range is for those
            that `update_slice` puts in.
    """

    services: int
    endpoints: int
    first: int = 0
    node_ports: float = 0.0
    dual_stack: bool = False
    namespace: str = "load"
    prefix: str = "service"
    port: int = 80
    target_port: int = 8080
    protocol: str = "TCP"
    nodes: Sequence[str] = field(default=("node-0", "node-1", "node-2", "node-3"))
    service_cidr: str | None = "10.96.0.0/12,fd00:10:96::/112"
    addresses: str = "10.128.0.0/9"
    addresses6: str = "fd00:10:244::/64"

    @property
    def families(self) -> tuple[str, ...]:
        """The address families of every Service."""
        return ("IPv4", "IPv6") if self.dual_stack else ("IPv4",)

    @property
    def numbers(self) -> range:
        """The numbers of the Services."""
        return range(self.first, self.first + self.services)

    def name(self, service: int) -> str:
        """The name of a Service."""
        return f"{self.prefix}-{service}"

    def service(self, number: int) -> Json:
        """A Service, to be sent to the API."""
        with_node_port = int((number + 1) * self.node_ports) > int(number * self.node_ports)
        cluster_ips = self.cluster_ips(number)
        return {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": self.name(number), "namespace": self.namespace},
            "spec": {
                "type": "NodePort" if with_node_port else "ClusterIP",
                "ipFamilyPolicy": "RequireDualStack" if self.dual_stack else "SingleStack",
                "ipFamilies": self.families,
                **({"clusterIP": cluster_ips[0], "clusterIPs": cluster_ips} if cluster_ips else {}),
                "ports": [{"name": "main", "port": self.port, "targetPort": self.target_port, "protocol": self.protocol}],
            },
        }

    def cluster_ips(self, service: int) -> list[str]:
        """The cluster IPs that a Service asks for: in the upper half of the ranges, none if the API server shall choose."""
        if self.service_cidr is None:
            return []
        networks = [ipaddress.ip_network(part) for part in self.service_cidr.split(",")]
        chosen = [next(net for net in networks if f"IPv{net.version}" == family) for family in self.families]
        # An odd factor makes a permutation of a range whose size is a power of two.
        halves = [(network, min(network.num_addresses // 2, 1 << 32)) for network in chosen]
        return [str(network.broadcast_address - 1 - service * _SCATTER % half) for network, half in halves]

    def slices(self, service: int, changed: dict[int, int] | None = None) -> Iterator[Json]:
        """The EndpointSlices of a Service; `changed` gives endpoints of it that are somewhere new, and the how manieth."""
        changed = changed or {}
        for family in self.families:
            for part, start in enumerate(range(0, self.endpoints, _SLICE_SIZE)):
                members = range(start, min(start + _SLICE_SIZE, self.endpoints))
                yield {
                    "apiVersion": "discovery.k8s.io/v1",
                    "kind": "EndpointSlice",
                    "metadata": {
                        "name": f"{self.name(service)}-{family.lower()}-{part}",
                        "namespace": self.namespace,
                        "labels": {
                            "kubernetes.io/service-name": self.name(service),
                            "endpointslice.kubernetes.io/managed-by": "nodeproxy-load",
                        },
                    },
                    "addressType": family,
                    "ports": [{"name": "main", "port": self.target_port, "protocol": self.protocol}],
                    "endpoints": [
                        {
                            "addresses": [self.address(family, service, member, changed.get(member))],
                            "nodeName": self.nodes[(service + member) % len(self.nodes)],
                            "conditions": {"ready": True, "serving": True, "terminating": False},
                        }
                        for member in members
                    ],
                }

    def address(self, family: str, service: int, endpoint: int, change: int | None = None) -> str:
        """The address of an endpoint: where it was created, or where that change put it."""
        network = ipaddress.ip_network(self.addresses if family == "IPv4" else self.addresses6)
        offset = 1 + service * self.endpoints + endpoint if change is None else network.num_addresses // 2 + change
        return str(network.network_address + offset)


class Load:
    """Creates, changes and deletes the objects of a Shape; use it as `async with`.

    Attributes:
        services: the Services as the API server made them, by number, with cluster IPs and node ports; filled by `create`,
            and by `read` for a Shape that is there already.
    """

    def __init__(self, access: Access, shape: Shape, *, concurrency: int = 16) -> None:
        self.shape = shape
        self.services: dict[int, Json] = {}
        self._access = access
        self._concurrency = concurrency
        self._changes = 0
        self._changed: dict[int, dict[int, int]] = {}
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        netns = self._access.netns
        context = self._access.ssl_context() if self._access.url.startswith("https:") else True
        connector = aiohttp.TCPConnector(
            ssl=context,
            limit=self._concurrency,
            socket_factory=(lambda info: _non_blocking(netns, info)) if netns else None,
        )
        self._session = aiohttp.ClientSession(connector=connector, headers=self._access.headers)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def create(self) -> None:
        """Creates the namespace if it is missing, and all Services and EndpointSlices."""
        namespace: Json = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.shape.namespace}}
        await self._send("POST", "/api/v1/namespaces", namespace, allowed=(409,))
        await self._in_parallel(self.shape.numbers, self.create_one)

    async def read(self) -> None:
        """Fills `services` from the API, for a Shape that is there already (`ControlPlane.seed`)."""
        answer = await self._send("GET", _SERVICES.format(self.shape.namespace))
        by_name = {item["metadata"]["name"]: item for item in answer["items"]}
        self.services = {number: by_name[self.shape.name(number)] for number in self.shape.numbers}

    async def create_one(self, service: int) -> None:
        """Creates one Service and its EndpointSlices."""
        path = _SERVICES.format(self.shape.namespace)
        self.services[service] = await self._send("POST", path, self.shape.service(service))
        for slice_ in self.shape.slices(service):
            await self._send("POST", _SLICES.format(self.shape.namespace), slice_)

    async def update_slice(self, service: int, endpoint: int = 0, *, family: str = "IPv4") -> str:
        """Moves one endpoint to an address that none had before, and returns the address."""
        changed = self._changed.setdefault(service, {})
        changed[endpoint] = self._changes
        self._changes += 1
        address = self.shape.address(family, service, endpoint, changed[endpoint])
        for slice_ in self.shape.slices(service, changed):
            if any(address in entry["addresses"] for entry in slice_["endpoints"]):
                path = f"{_SLICES.format(self.shape.namespace)}/{slice_['metadata']['name']}"
                await self._send("PUT", path, slice_)
                return address
        raise ValueError(f"Service {service} has no endpoint {endpoint} of {family}.")

    async def delete(self) -> None:
        """Deletes all Services and EndpointSlices; those already gone do not matter."""
        await self._in_parallel(self.shape.numbers, self.delete_one)

    async def delete_one(self, service: int) -> None:
        """Deletes one Service and its EndpointSlices."""
        self.services.pop(service, None)
        self._changed.pop(service, None)
        await self._send("DELETE", f"{_SERVICES.format(self.shape.namespace)}/{self.shape.name(service)}", allowed=(404,))
        for slice_ in self.shape.slices(service):
            path = f"{_SLICES.format(self.shape.namespace)}/{slice_['metadata']['name']}"
            await self._send("DELETE", path, allowed=(404,))

    async def _in_parallel(self, numbers: Iterable[int], action: Callable[[int], Awaitable[None]]) -> None:
        remaining = iter(numbers)  # shared: each worker takes the next one

        async def work() -> None:
            for number in remaining:
                await action(number)

        async with asyncio.TaskGroup() as group:
            for _ in range(self._concurrency):
                group.create_task(work())

    async def _send(self, method: str, path: str, body: Json | None = None, *, allowed: Sequence[int] = ()) -> Json:
        data = None if body is None else msgspec.json.encode(body)
        headers = {"Content-Type": "application/json"}
        async with self._session.request(method, self._access.url + path, data=data, headers=headers) as response:
            answer = await response.read()
            if response.status >= 400 and response.status not in allowed:
                raise ApiError(method, path, response.status, answer.decode(errors="replace"))
        return msgspec.json.decode(answer, type=dict[str, Any])


def node(name: str, addresses: Sequence[str], pod_cidrs: Sequence[str] = ()) -> Json:
    """A Node as a kubelet would register it, to be sent to `/api/v1/nodes`."""
    spec = {"podCIDR": pod_cidrs[0], "podCIDRs": list(pod_cidrs)} if pod_cidrs else {}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "spec": spec,
        "status": {"addresses": [{"type": "InternalIP", "address": address} for address in addresses]},
    }


def _non_blocking(netns: str, info: tuple[Any, ...]) -> Any:
    sock = socket_in(netns, *info[:3])
    sock.setblocking(False)
    return sock
