"""Owns anonymising a snapshot: other names and addresses, and the same forwarding.

What stays: numbers (ports, timeouts), order (of ages and of slices, which decide who gets an address), conditions, policies,
the names of the Service default/kubernetes, interface names in the configuration, and addresses that mean the same
everywhere (`pseudonyms`). What decides nothing here is left out: Services that are not programmed, and their slices.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar

from msgspec.structs import replace

from nodeproxy.api.objects import (
    ApiObject,
    EndpointHints,
    EndpointPort,
    EndpointSlice,
    ForNode,
    ForZone,
    Labels,
    LoadBalancerIngress,
    LoadBalancerStatus,
    Node,
    NodeAddress,
    NodeSpec,
    NodeStatus,
    ObjectMeta,
    Service,
    ServicePortSpec,
    ServiceSpec,
    ServiceStatus,
)
from nodeproxy.api.objects import Endpoint as ApiEndpoint
from nodeproxy.cluster.addresses import parse_address, parse_cidr
from nodeproxy.cluster.checked import CheckedService
from nodeproxy.cluster.findings import is_label, protocol_of
from nodeproxy.cluster.names import ServiceName
from nodeproxy.cluster.slices import check_slice, service_of_slice
from nodeproxy.cluster.validate import check_node, check_service
from nodeproxy.configuration.addresses import parse_host_port
from nodeproxy.configuration.agent_config import PRIMARY, AgentConfig
from nodeproxy.snapshot.model import Snapshot, SnapshotError
from nodeproxy.snapshot.pseudonyms import Addresses, Names

_T = TypeVar("_T")

_SECRET_BYTES: Final = 32
_DRAWS: Final = 20
_KUBERNETES: Final = ServiceName("default", "kubernetes")
_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
_UNREADABLE: Final = "unreadable"  # in place of an address, CIDR or word that nobody can read
_WORDS: Final = frozenset({"ClusterIP", "NodePort", "LoadBalancer", "ExternalName", "Cluster", "Local", "ClientIP", "None"})


def anonymise(snapshot: Snapshot) -> Snapshot:
    """The snapshot under a new random secret, which nobody gets to know. Raises `SnapshotError`."""
    for draw in range(_DRAWS):
        anonymiser = Anonymiser(secrets.token_bytes(_SECRET_BYTES))
        made = anonymiser.snapshot(snapshot)
        # Wide ranges have few images to choose from; where it cannot be helped, one may stand for another.
        if not anonymiser.addresses.revealed(longer_than=0 if draw < _DRAWS // 2 else 16):
            return made
    raise SnapshotError("cannot be anonymised: its addresses are so many that they map onto each other")


class Anonymiser:
    """Replaces names and addresses consistently."""

    def __init__(self, secret: bytes) -> None:
        self.names = Names(secret)
        self.addresses = Addresses(secret)

    def snapshot(self, snapshot: Snapshot) -> Snapshot:
        """A whole snapshot. What was refused is not told: its reasons quote names."""
        services = [(one, _checked(one)) for one in snapshot.objects if isinstance(one, Service)]
        programmed = [(service, checked) for service, checked in services if checked is not None]
        slices = [one for one in snapshot.objects if isinstance(one, EndpointSlice)]
        known = {checked.name for _, checked in programmed}
        nodes = [one for one in snapshot.objects if isinstance(one, Node)]
        objects: list[ApiObject] = [
            *self._slices([one for one in slices if _owner(one) in known]),
            *(self._node(one) for one in nodes),
            *self._services(programmed),
        ]
        return Snapshot(
            objects=tuple(sorted(objects, key=lambda one: one.key)),
            refused=(),
            config=self._config(snapshot.config),
            node_addresses=tuple(self.addresses.address(text) for text in snapshot.node_addresses),
            taken=snapshot.taken,
            origin="a cluster that is not told (anonymised)",
            families=snapshot.families,
        )

    def service_name(self, name: ServiceName) -> ServiceName:
        """The pseudonym of a Service."""
        if name == _KUBERNETES:
            return name
        return ServiceName(self._namespace(name.namespace), self.names.of("svc", name.name))

    def port_name(self, name: str | None) -> str | None:
        """The pseudonym of a port; one that is no DNS label becomes one that is none either."""
        if not name:
            return name
        pseudonym = self.names.of("p", name)
        return pseudonym if is_label(name) else pseudonym.replace("-", "_")

    def node_name(self, name: str) -> str:
        """The pseudonym of a node."""
        return self.names.of("node", name) if name else name

    def zone(self, name: str) -> str:
        """The pseudonym of a zone."""
        return self.names.of("zone", name) if name else name

    def _namespace(self, name: str) -> str:
        return name if name == _KUBERNETES.namespace else self.names.of("ns", name)

    def _services(self, services: Iterable[tuple[Service, CheckedService]]) -> Iterable[Service]:
        """In the order in which they take precedence, with ages that keep it."""
        ordered = sorted(services, key=lambda item: (not item[1].created, item[1].created, item[1].name))
        for rank, (service, checked) in enumerate(ordered):
            name = self.service_name(checked.name)
            created = (_EPOCH + timedelta(seconds=rank)).strftime("%Y-%m-%dT%H:%M:%SZ")
            metadata = ObjectMeta(name=name.name, namespace=name.namespace, creation_timestamp=created)
            yield Service(metadata=metadata, spec=self._spec(service.spec), status=self._status(service.status))

    def _spec(self, spec: ServiceSpec) -> ServiceSpec:
        return replace(
            spec,
            ports=_each(spec.ports, self._service_port),
            cluster_ip=None if spec.cluster_ip is None else self._address(spec.cluster_ip),
            cluster_ips=_each(spec.cluster_ips, self._address),
            external_ips=_each(spec.external_ips, self._address),
            load_balancer_source_ranges=_each(spec.load_balancer_source_ranges, self._cidr),
            type=_word(spec.type),
            session_affinity=_word(spec.session_affinity),
            external_traffic_policy=_word(spec.external_traffic_policy),
            internal_traffic_policy=_word(spec.internal_traffic_policy),
        )

    def _service_port(self, port: ServicePortSpec) -> ServicePortSpec:
        return replace(port, name=self.port_name(port.name), protocol=_protocol(port.protocol))

    def _status(self, status: ServiceStatus | None) -> ServiceStatus | None:
        if status is None or status.load_balancer is None:
            return None
        ingress = _each(status.load_balancer.ingress, self._ingress)
        return ServiceStatus(load_balancer=LoadBalancerStatus(ingress=ingress))

    def _ingress(self, ingress: LoadBalancerIngress) -> LoadBalancerIngress:
        mode = ingress.ip_mode
        known = mode in {None, "", "VIP", "Proxy"}
        return LoadBalancerIngress(
            ip=self._address(ingress.ip) if ingress.ip else None, ip_mode=mode if known else _UNREADABLE
        )

    def _slices(self, slices: Iterable[EndpointSlice]) -> Iterable[EndpointSlice]:
        """With names that sort as those before: where slices contradict each other, the first by name may count."""
        ranks: dict[ServiceName, int] = {}
        for one in sorted(slices, key=lambda slice_: slice_.key):
            owner = service_of_slice(one, one.key)
            assert owner is not None
            rank = ranks[owner] = ranks.get(owner, 0) + 1
            name = self.service_name(owner)
            yield EndpointSlice(
                metadata=ObjectMeta(
                    name=f"{name.name}-{rank:06}", namespace=name.namespace, labels=Labels(service_name=name.name)
                ),
                address_type=one.address_type,
                endpoints=_each(one.endpoints, self._endpoint),
                ports=_each(one.ports, self._slice_port),
            )

    def _slice_port(self, port: EndpointPort) -> EndpointPort:
        return replace(port, name=self.port_name(port.name), protocol=_protocol(port.protocol))

    def _endpoint(self, endpoint: ApiEndpoint) -> ApiEndpoint:
        hints = endpoint.hints
        return ApiEndpoint(
            addresses=[self._address(text) for text in endpoint.addresses[:1]],
            conditions=endpoint.conditions,
            node_name=None if endpoint.node_name is None else self.node_name(endpoint.node_name),
            hints=None
            if hints is None
            else EndpointHints(
                for_zones=_each(hints.for_zones, lambda one: ForZone(self.zone(one.name))),
                for_nodes=_each(hints.for_nodes, lambda one: ForNode(self.node_name(one.name))),
            ),
        )

    def _node(self, node: Node) -> Node:
        checked = check_node(node)
        return Node(
            metadata=ObjectMeta(
                name=self.node_name(checked.name), labels=Labels(zone=self.zone(checked.zone)) if checked.zone else None
            ),
            spec=NodeSpec(pod_cidrs=[self.addresses.network(cidr.text) for cidr in checked.pod_cidrs]),
            status=NodeStatus(
                addresses=[
                    NodeAddress(type="InternalIP", address=self.addresses.address(address.text))
                    for address in checked.addresses
                ]
            ),
        )

    def _config(self, config: AgentConfig) -> AgentConfig:
        cidrs = config.node_port_addresses
        return replace(
            config,
            node_name=self.node_name(config.node_name),
            kubeconfig=None,
            master=None,
            manifests=None,
            service_proxy_name=None,
            cluster_cidrs=tuple(map(self.addresses.network, config.cluster_cidrs)),
            node_port_addresses=cidrs if cidrs == (PRIMARY,) else tuple(map(self.addresses.network, cidrs)),
            ipvs_exclude_cidrs=tuple(map(self.addresses.network, config.ipvs_exclude_cidrs)),
            bind_address=self.addresses.address(config.bind_address) if config.bind_address else None,
            healthz_bind_address=self._host_port(config.healthz_bind_address),
            metrics_bind_address=self._host_port(config.metrics_bind_address),
        )

    def _host_port(self, text: str) -> str:
        where = parse_host_port(text)
        if where is None:
            return ""
        host = self.addresses.address(where[0])
        return f"[{host}]:{where[1]}" if ":" in host else f"{host}:{where[1]}"

    def _address(self, text: str) -> str:
        if text in ("", "None"):
            return text
        address = parse_address(text)
        return _UNREADABLE if address is None else self.addresses.address(address.text)

    def _cidr(self, text: str) -> str:
        cidr = parse_cidr(text)
        return _UNREADABLE if cidr is None else self.addresses.network(cidr.text)


def _checked(service: Service) -> CheckedService | None:
    """None where the Service is not programmed."""
    key = service.key
    return check_service(service, ServiceName(key.namespace, key.name))


def _owner(slice_: EndpointSlice) -> ServiceName | None:
    """The Service whose endpoints it tells; None where it tells none."""
    owner = service_of_slice(slice_, slice_.key)
    return owner if owner is not None and check_slice(slice_, owner) is not None else None


def _each(values: list[_T] | None, made: Callable[[_T], _T]) -> list[_T] | None:
    return None if values is None else [made(value) for value in values]


def _word(word: str | None) -> str | None:
    return word if not word or word in _WORDS else _UNREADABLE


def _protocol(word: str | None) -> str | None:
    return word if protocol_of(word) is not None else _UNREADABLE
