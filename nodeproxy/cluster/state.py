"""Owns what the node knows of the cluster: checked Services, EndpointSlices by Service, its own Node; and what changed.

`ClusterState.apply` takes a source's events and says which Services they concern, in proportion to the events. An update
that leaves everything that decides forwarding as it was (a new resourceVersion, a foreign annotation) concerns nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from sys import intern
from types import MappingProxyType

from msgspec import Struct

from nodeproxy.api.objects import EndpointSlice, Kind, Node, ObjectKey, Service
from nodeproxy.cluster.checked import CheckedNode, CheckedService, CheckedSlice
from nodeproxy.cluster.names import ServiceName
from nodeproxy.cluster.slices import check_slice, service_of_slice, slice_identity_fault
from nodeproxy.cluster.validate import check_node, check_service, node_identity_fault, service_identity_fault
from nodeproxy.source.events import Deleted, Event, ListComplete, Refused, Upserted

_NO_SLICES: Mapping[str, CheckedSlice] = MappingProxyType({})


class ClusterChanges(Struct, frozen=True):
    """What a batch of events changed.

    `services` may forward differently now, be they new, changed or gone. `node` says that this node's Node changed.
    `refused` are the objects that could not be read or whose names cannot be trusted. `trigger_times` are the
    last-change-trigger-time annotations (RFC 3339, unchecked) of the slices that changed, by Service, for the metric of
    network programming latency. `lists_complete` says that the first list of Services and of EndpointSlices is in.
    """

    services: frozenset[ServiceName] = frozenset()
    node: bool = False
    refused: tuple[Refused, ...] = ()
    trigger_times: Mapping[ServiceName, tuple[str, ...]] = {}
    lists_complete: bool = False


class _Batch:
    """Collects the changes of one `apply`."""

    def __init__(self) -> None:
        self.services: set[ServiceName] = set()
        self.node = False
        self.refused: list[Refused] = []
        self.trigger_times: dict[ServiceName, list[str]] = {}


class ClusterState:
    """The checked state of the cluster, as this node sees it. Only `apply` changes it."""

    def __init__(self, node_name: str) -> None:
        """`node_name` is the Node that is ours; others are ignored."""
        self._node_name = node_name
        self._node: CheckedNode | None = None
        self._services: dict[ServiceName, CheckedService] = {}
        self._slices: dict[ServiceName, dict[str, CheckedSlice]] = {}
        self._service_of_slice: dict[tuple[str, str], ServiceName] = {}
        self._complete: set[Kind] = set()

    @property
    def node(self) -> CheckedNode | None:
        """This node's Node, once it was seen."""
        return self._node

    @property
    def services(self) -> Mapping[ServiceName, CheckedService]:
        """Services that are to be programmed."""
        return self._services

    @property
    def lists_complete(self) -> bool:
        """Whether the first complete list of Services and of EndpointSlices has been delivered."""
        return {Kind.SERVICE, Kind.ENDPOINT_SLICE} <= self._complete

    def slices(self, service: ServiceName) -> Mapping[str, CheckedSlice]:
        """The EndpointSlices of a Service by name, whether or not the Service itself is known."""
        return self._slices.get(service, _NO_SLICES)

    def apply(self, events: Sequence[Event]) -> ClusterChanges:
        """Take events in order, and say what they changed."""
        batch = _Batch()
        for event in events:
            if isinstance(event, Upserted):
                self._upsert(event.object, batch)
            elif isinstance(event, Deleted):
                self._delete(event.key, batch)
            elif isinstance(event, ListComplete):
                self._complete.add(event.kind)
            else:
                batch.refused.append(event)
        return ClusterChanges(
            services=frozenset(batch.services),
            node=batch.node,
            refused=tuple(batch.refused),
            trigger_times={service: tuple(times) for service, times in batch.trigger_times.items()},
            lists_complete=self.lists_complete,
        )

    def _upsert(self, obj: Service | EndpointSlice | Node, batch: _Batch) -> None:
        if isinstance(obj, EndpointSlice):
            self._upsert_slice(obj, batch)
        elif isinstance(obj, Service):
            self._upsert_service(obj, batch)
        else:
            self._upsert_node(obj, batch)

    def _delete(self, key: ObjectKey, batch: _Batch) -> None:
        if key.kind is Kind.ENDPOINT_SLICE:
            self._drop_slice((key.namespace, key.name), batch)
        elif key.kind is Kind.SERVICE:
            self._put_service(ServiceName(key.namespace, key.name), None, batch)
        elif key.name == self._node_name and self._node is not None:
            self._node = None
            batch.node = True

    def _upsert_service(self, service: Service, batch: _Batch) -> None:
        key = service.key
        if fault := service_identity_fault(key):
            batch.refused.append(Refused(key, fault, "cluster state"))
            return
        name = ServiceName(intern(key.namespace), intern(key.name))
        self._put_service(name, check_service(service, name), batch)

    def _put_service(self, name: ServiceName, new: CheckedService | None, batch: _Batch) -> None:
        old = self._services.get(name)
        if new == old:
            return  # the old one stays, so that those who hold on to it see by identity that nothing changed
        if new is None:
            del self._services[name]
        else:
            self._services[name] = new
        batch.services.add(name)

    def _upsert_slice(self, slice_: EndpointSlice, batch: _Batch) -> None:
        key = slice_.key
        _, namespace, name = key
        service = service_of_slice(slice_, key)
        if fault := slice_identity_fault(key, service):
            batch.refused.append(Refused(key, fault, "cluster state"))
            return
        checked = check_slice(slice_, service) if service is not None else None
        if service is None or checked is None:
            self._drop_slice((namespace, name), batch)
            return
        owner = self._service_of_slice.get((namespace, name))
        if owner is not None and owner != service:
            self._drop_slice((namespace, name), batch)
        siblings = self._slices.setdefault(service, {})
        if siblings.get(name) == checked:
            return
        siblings[name] = checked
        self._service_of_slice[service.namespace, name] = service
        batch.services.add(service)
        annotations = slice_.metadata.annotations
        if annotations is not None and annotations.last_change_trigger_time:
            batch.trigger_times.setdefault(service, []).append(annotations.last_change_trigger_time)

    def _drop_slice(self, key: tuple[str, str], batch: _Batch) -> None:
        service = self._service_of_slice.pop(key, None)
        if service is None:
            return
        siblings = self._slices[service]
        del siblings[key[1]]
        if not siblings:
            del self._slices[service]
        batch.services.add(service)
        # The annotation of a slice that goes is that of its last change, not of its end (as kube-proxy has it).
        batch.trigger_times.pop(service, None)

    def _upsert_node(self, node: Node, batch: _Batch) -> None:
        if node.metadata.name != self._node_name:
            return
        if fault := node_identity_fault(node.key):
            batch.refused.append(Refused(node.key, fault, "cluster state"))
            return
        checked = check_node(node)
        if checked != self._node:
            self._node = checked
            batch.node = True
