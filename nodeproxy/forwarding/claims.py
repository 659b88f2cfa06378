"""Owns who gets an address and port that several Services ask for.

Every frontend is a claim on (family, address, protocol, port); a node port has no address. Within a Service, one claim is
made once: by the first of cluster IP, external IP, load balancer IP. Between Services the index here decides, the same way
whatever the order in which they came.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from nodeproxy.cluster.checked import CheckedService, CheckedServicePort
from nodeproxy.forwarding.table import Family, FrontendKind, IPProtocol, Problem, ServiceName


class Claim(NamedTuple):
    """What can be had only once on a node. `address` is None for a node port."""

    family: Family
    address: str | None
    protocol: IPProtocol
    port: int

    def __str__(self) -> str:
        host = "node port" if self.address is None else self.address
        return f"{host} {self.port}/{self.protocol.upper()}"


class Claimed(NamedTuple):
    """A claim that a Service makes, and what for."""

    claim: Claim
    kind: FrontendKind
    port: CheckedServicePort

    @property
    def field(self) -> str:
        """The API field that the claim comes from."""
        if self.kind is _NODE_PORT:
            return f"spec.ports[{self.port.index}].nodePort"
        return _FIELDS[self.kind]


class Holder(NamedTuple):
    """Who makes a claim. Holders sort by precedence, and the first one wins.

    A cluster IP comes before everything else: the API server allotted it to this Service, whereas external IPs and load
    balancer IPs are what users and controllers wrote, and must not capture it. Then age decides (unknown age is last), then
    the name.
    """

    claimed_address: bool
    unknown_age: bool
    created: str
    service: ServiceName


# Members of an Enum are slow to look up, and this runs for every frontend of the cluster.
_CLUSTER_IP = FrontendKind.CLUSTER_IP
_EXTERNAL_IP = FrontendKind.EXTERNAL_IP
_LOAD_BALANCER_IP = FrontendKind.LOAD_BALANCER_IP
_NODE_PORT = FrontendKind.NODE_PORT

_FIELDS = {
    _CLUSTER_IP: "spec.clusterIPs",
    _EXTERNAL_IP: "spec.externalIPs",
    _LOAD_BALANCER_IP: "status.loadBalancer.ingress",
}


def claims_of(service: CheckedService, families: Iterable[Family]) -> tuple[tuple[Claimed, ...], tuple[Problem, ...]]:
    """All claims of a Service in `families`, port by port and family by family; and its quarrels with itself."""
    made: dict[Claim, Claimed] = {}
    problems = []
    addresses = [(family, _addresses(service, family)) for family in families]
    for port in service.ports:
        for family, frontends in addresses:
            for kind, address in frontends:
                number = port.node_port if address is None else port.port
                if not number:
                    continue
                claimed = Claimed(Claim(family, address, port.protocol, number), kind, port)
                first = made.setdefault(claimed.claim, claimed)
                if first.port is not port:
                    reason = f"{claimed.claim} is already used by spec.ports[{first.port.index}]"
                    field = claimed.field if address is None else f"spec.ports[{port.index}].port"
                    problems.append(Problem(service.name, field, reason))
    return tuple(made.values()), tuple(dict.fromkeys(problems))


def _addresses(service: CheckedService, family: Family) -> list[tuple[FrontendKind, str | None]]:
    """Where the Service is reached in a family, in the order of precedence. Nowhere in a family it has no cluster IP of."""
    found: list[tuple[FrontendKind, str | None]] = []
    for kind, addresses in (
        (_CLUSTER_IP, service.cluster_ips),
        (_EXTERNAL_IP, service.external_ips),
        (_LOAD_BALANCER_IP, service.load_balancer_ips),
    ):
        if addresses:
            found += [(kind, address.text) for address in addresses if address.family is family]
        if not found:
            return found
    found.append((_NODE_PORT, None))
    return found


class ClaimIndex:
    """Who claims what. Changes collect until `settle` is asked whose fortune they changed."""

    def __init__(self) -> None:
        self._holders: dict[Claim, list[Holder]] = {}
        self._touched: dict[Claim, Holder | None] = {}

    def add(self, service: CheckedService, claims: Iterable[Claimed]) -> None:
        """`service` makes these claims from now on."""
        for claimed in claims:
            self._touch(claimed.claim)
            insort(self._holders.setdefault(claimed.claim, []), _holder(service, claimed))

    def remove(self, service: CheckedService, claims: Iterable[Claimed]) -> None:
        """`service` makes these claims no longer. They must be those that were added with the same object."""
        for claimed in claims:
            self._touch(claimed.claim)
            holders = self._holders[claimed.claim]
            del holders[bisect_left(holders, _holder(service, claimed))]
            if not holders:
                del self._holders[claimed.claim]

    def winner(self, claim: Claim) -> ServiceName:
        """The Service that gets what is claimed. There must be a claim on it."""
        return self._holders[claim][0].service

    def settle(self) -> set[ServiceName]:
        """The Services for which a claim was decided differently since the last call: winners, and all that quarrel."""
        affected = set(self._affected())
        self._touched.clear()
        return affected

    def _affected(self) -> Iterator[ServiceName]:
        for claim, before in self._touched.items():
            holders = self._holders.get(claim, ())
            if holders and before is not None and before.service == holders[0].service:
                continue
            yield from (holder.service for holder in holders)

    def _touch(self, claim: Claim) -> None:
        if claim not in self._touched:
            holders = self._holders.get(claim)
            self._touched[claim] = holders[0] if holders else None


def _holder(service: CheckedService, claimed: Claimed) -> Holder:
    created = service.created
    return Holder(claimed.kind is not _CLUSTER_IP, not created, created, service.name)
