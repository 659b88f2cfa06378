"""A small cluster to try things in: API objects in one line each, and a tracker that follows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from nodeproxy.api.objects import ApiObject, EndpointSlice, Kind, Node, ObjectKey, Service
from nodeproxy.cluster.state import ClusterState
from nodeproxy.forwarding.node import NodeFacts
from nodeproxy.forwarding.table import Delta, Family, Frontend, FrontendKind, ServiceName, ServicePort
from nodeproxy.forwarding.tracker import ForwardingTracker
from nodeproxy.source.events import Deleted, Event, Upserted

HERE, ELSEWHERE = "here", "elsewhere"
HTTP = {"name": "http", "port": 80, "protocol": "TCP"}


def service(name: str = "web", *, ingress: Any = (), created: str | None = None, **spec: Any) -> Service:
    """A Service in namespace `ns` with one port `http`, of cluster IP 10.96.0.1, unless said otherwise."""
    spec = {"clusterIP": "10.96.0.1", "type": "ClusterIP", "ports": [HTTP], **spec}
    return msgspec.convert(
        {
            "metadata": {"name": name, "namespace": "ns", "creationTimestamp": created},
            "spec": spec,
            "status": {"loadBalancer": {"ingress": list(ingress)}},
        },
        Service,
    )


def endpoint(address: str, node: str | None = ELSEWHERE, *, zones: Any = None, nodes: Any = None, **conditions: Any) -> Any:
    """An endpoint; `conditions` are ready, serving, terminating; `zones` and `nodes` are hints."""
    hints = {"forZones": [{"name": z} for z in zones or ()], "forNodes": [{"name": n} for n in nodes or ()]}
    return {"addresses": [address], "nodeName": node, "conditions": conditions, "hints": hints}


def ready(address: str, node: str | None = ELSEWHERE, **hints: Any) -> Any:
    """An endpoint that is ready."""
    return endpoint(address, node, ready=True, serving=True, terminating=False, **hints)


def draining(address: str, node: str | None = ELSEWHERE, **hints: Any) -> Any:
    """An endpoint that terminates and still serves."""
    return endpoint(address, node, ready=False, serving=True, terminating=True, **hints)


def dead(address: str, node: str | None = ELSEWHERE, **hints: Any) -> Any:
    """An endpoint that does not serve."""
    return endpoint(address, node, ready=False, serving=False, terminating=True, **hints)


def slice_of(
    service_name: str, *endpoints: Any, name: str | None = None, family: int = 4, ports: Any = None
) -> EndpointSlice:
    """An EndpointSlice of a Service in namespace `ns`, port `http` at 8080 unless said otherwise."""
    return msgspec.convert(
        {
            "metadata": {
                "name": name or f"{service_name}-{family}",
                "namespace": "ns",
                "labels": {"kubernetes.io/service-name": service_name},
            },
            "addressType": f"IPv{family}",
            "endpoints": list(endpoints),
            "ports": ports or [{"name": "http", "port": 8080, "protocol": "TCP"}],
        },
        EndpointSlice,
    )


def node(zone: str | None = None, *addresses: str, name: str = HERE) -> Node:
    """A Node with a zone label and internal addresses."""
    return msgspec.convert(
        {
            "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone} if zone else {}},
            "status": {"addresses": [{"type": "InternalIP", "address": address} for address in addresses]},
        },
        Node,
    )


class World:
    """A cluster state and the tracker that follows it, on the node `here`."""

    def __init__(self, *objects: ApiObject, **facts: Any) -> None:
        self.state = ClusterState(HERE)
        self.tracker = ForwardingTracker(NodeFacts(HERE, **facts))
        self.apply(*objects)

    def apply(self, *objects: ApiObject) -> Delta:
        """These objects appear or change."""
        return self.feed(*(Upserted(obj) for obj in objects))

    def delete(self, kind: Kind, name: str) -> Delta:
        """An object of namespace `ns` goes."""
        return self.feed(Deleted(ObjectKey(kind, "" if kind is Kind.NODE else "ns", name)))

    def feed(self, *events: Event) -> Delta:
        """Any events."""
        return self.tracker.update(self.state, self.state.apply(events))

    @property
    def rows(self) -> list[ServicePort]:
        """All rows."""
        return list(self.tracker.table.rows.values())

    @property
    def row(self) -> ServicePort:
        """The only row."""
        (row,) = self.rows
        return row

    @property
    def problems(self) -> list[str]:
        """All problems, as they are logged."""
        return [str(problem) for problems in self.tracker.problems.values() for problem in problems]

    def frontend(self, kind: FrontendKind, family: Family = Family.IPV4) -> Frontend:
        """The only frontend of a kind in a family."""
        (found,) = [f for row in self.rows if row.key.family is family for f in row.frontends if f.kind is kind]
        return found


def addresses(backends: Any) -> list[str]:
    """The addresses of backends."""
    return [backend.address for backend in backends]


def strings_in(value: Any) -> Iterator[str]:
    """Every string in a table, the names of enum members apart."""
    if type(value) is str:
        yield value
    elif isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            yield from strings_in(getattr(value, name))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings_in(key)
            yield from strings_in(item)
    elif isinstance(value, tuple | list | set | frozenset):
        for item in value:
            yield from strings_in(item)


WEB = ServiceName("ns", "web")
