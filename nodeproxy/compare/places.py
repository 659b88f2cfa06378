"""Owns where the throw-away node's pods and clients are: addresses that nothing in the snapshot has, alike in all modes."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from nodeproxy.api.objects import ApiObject, Node, NodeAddress
from nodeproxy.forwarding.table import Family, ForwardingTable
from nodeproxy.sandbox.many import CLIENT_HOST_LINK, POD_HOST_LINK
from nodeproxy.sandbox.topology import BRIDGE, CLIENT_GATEWAY, NODE_LINK, OUTSIDE_LINK
from nodeproxy.snapshot.model import Snapshot
from nodeproxy.snapshot.view import NodeView

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

LINKS: Final = frozenset({*BRIDGE, *CLIENT_GATEWAY, *NODE_LINK, *OUTSIDE_LINK, *POD_HOST_LINK, *CLIENT_HOST_LINK})
BRIDGE_NAME: Final = "br0"
# For benchmarks (RFC 2544, RFC 5180) and documentation (RFC 5737, RFC 3849), then what few have: the first unused counts.
_CLIENTS: Final = {
    Family.IPV4: ("198.19.0.0/16", "198.18.0.0/16", "203.0.113.0/24", "198.51.100.0/24", "25.200.0.0/16", "25.201.0.0/16"),
    Family.IPV6: ("2001:2:0:19::/112", "2001:db8:ffff:19::/112", "3fff:19::/112"),
}
_PODS: Final = {
    Family.IPV4: ("198.18.0.0/24", "192.0.2.0/24", "25.202.0.0/24"),
    Family.IPV6: ("2001:2:0:18::/112", "3fff:18::/112"),
}
_NODES: Final = {
    Family.IPV4: ("192.0.2.2", "198.51.100.2", "25.203.0.2"),
    Family.IPV6: ("2001:db8:fffe::2", "3fff:fffe::2"),
}
_SERVICES: Final = {
    Family.IPV4: ("198.18.255.0/24", "25.204.0.0/24"),
    Family.IPV6: ("2001:2:0:1855::/112", "3fff:1855::/112"),
}
_CHANGING: Final = 2


class PlacesError(Exception):
    """There is no room beside the snapshot's addresses; one line."""


class Places(Struct, frozen=True):
    """Of one family: the pod that probes, the pods between which an endpoint moves, clients outside, a Service's address."""

    family: Family
    node: str
    pod: str
    changing: tuple[str, ...]
    clients: str
    service: str

    def client(self, number: int) -> str:
        """One of the clients outside; there are at least 250."""
        network = ipaddress.ip_network(self.clients)
        return str(network[1 + number % (network.num_addresses - 2)])

    @property
    def outside(self) -> str:
        """The client that asks where one is enough."""
        return self.client(0)


def with_node_addresses(snapshot: Snapshot, view: NodeView) -> tuple[Snapshot, tuple[str, ...]]:
    """The snapshot with an address of the node in every family of its table, and what was made up for that, in words."""
    missing = [family for family in _families(view.table) if not view.facts.addresses_of(family)]
    taken = _taken(view)
    made = [next(text for text in _NODES[family] if text not in taken) for family in missing]
    if not made:
        return snapshot, ()
    note = f"the snapshot has no address of the node in this family, and the throw-away node has {', '.join(made)}"
    objects = tuple(_with_addresses(obj, made) for obj in snapshot.objects)
    return replace(snapshot, objects=objects, node_addresses=(*view.facts.addresses, *made)), (note,)


def _with_addresses(obj: ApiObject, made: Sequence[str]) -> ApiObject:
    """A Node object with these addresses as well (they count before `node_addresses`); anything else as it is."""
    if not isinstance(obj, Node) or obj.status is None or not obj.status.addresses:
        return obj
    more = [NodeAddress(type="InternalIP", address=address) for address in made]
    return replace(obj, status=replace(obj.status, addresses=[*obj.status.addresses, *more]))


def own_addresses(view: NodeView) -> list[str]:
    """The node's addresses, in a fixed order: those of its Node object first."""
    return list(dict.fromkeys((*view.facts.addresses, *view.snapshot.node_addresses)))


def find_places(view: NodeView) -> dict[Family, Places]:
    """Places for every family that the table has. Raises PlacesError where there is no room."""
    taken = _taken(view)
    if clash := sorted(taken & LINKS):
        raise PlacesError(f"the snapshot has {clash[0]}, which the throw-away node needs for its own links")
    return {family: _places(view, family, taken) for family in _families(view.table)}


def _families(table: ForwardingTable) -> list[Family]:
    return sorted({row.key.family for row in table.rows.values()})


def _taken(view: NodeView) -> set[str]:
    """Every address that the cluster or the node has."""
    rows = view.table.rows.values()
    frontends = {frontend.address for row in rows for frontend in row.frontends if frontend.address is not None}
    backends = {backend.address for row in rows for backend in row.all_backends}
    return {*frontends, *backends, *own_addresses(view)}


def _places(view: NodeView, family: Family, taken: set[str]) -> Places:
    detector = view.programmer_config.local_detector
    cidr = detector.cidrs.get(family)
    occupied = [ipaddress.ip_network(text) for text in taken if (":" in text) == (family is Family.IPV6)]
    occupied += [ipaddress.ip_network(cidr)] if cidr else []
    pods = _free(_pod_network(cidr, family, occupied), taken, 1 + _CHANGING, f"pods in {cidr}")
    addresses = view.facts.addresses_of(family)
    if not addresses:
        raise PlacesError(f"no address of the node is known in IPv{int(family)}")
    return Places(
        family=family,
        node=addresses[0].text,
        pod=pods[0],
        changing=tuple(pods[1:]),
        clients=str(_unused(_CLIENTS[family], occupied, "clients outside")),
        service=str(_unused(_SERVICES[family], occupied, "a Service")[1]),
    )


def _pod_network(cidr: str | None, family: Family, occupied: Sequence[Network]) -> Network:
    """Where pods of this node are: in the CIDR of detect-local, else anywhere."""
    return ipaddress.ip_network(cidr) if cidr else _unused(_PODS[family], occupied, "pods")


def _unused(candidates: Iterable[str], occupied: Sequence[Network], what: str) -> Network:
    for text in candidates:
        network = ipaddress.ip_network(text)
        if not any(network.version == other.version and _overlap(network, other) for other in occupied):
            return network
    raise PlacesError(f"no addresses are left for {what}: the snapshot has some of each of {', '.join(candidates)}")


def _overlap(one: Network, other: Network) -> bool:
    return int(one[0]) <= int(other[-1]) and int(other[0]) <= int(one[-1])


def _free(network: Network, taken: set[str], count: int, what: str) -> list[str]:
    """Addresses from the end of a network, where nothing is handed out soon."""
    found: list[str] = []
    for number in range(min(network.num_addresses - 2, len(taken) + count)):
        if (text := str(network[-2 - number])) not in taken:
            found.append(text)
            if len(found) == count:
                return found
    raise PlacesError(f"no {count} addresses are left for {what}")


def source_within(cidrs: Iterable[str], taken: Iterable[str], pods: str | None) -> str | None:
    """An address within some source ranges that nobody has and that is no pod's; None where there is none to be found."""
    used = set(taken)
    pod_network = ipaddress.ip_network(pods) if pods else None
    for text in cidrs:
        network = ipaddress.ip_network(text)
        for address in _some(network):
            inside_pods = pod_network is not None and address.version == pod_network.version and address in pod_network
            if str(address) not in used and not inside_pods and _ordinary(address):
                return str(address)
    return None


def _some(network: Network) -> Iterator[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """A few addresses spread over a network, its first and last left out where it has more than two."""
    size = network.num_addresses
    if size <= 2:
        yield from network
        return
    for step in range(16):
        yield network[1 + (size - 2) * step // 16]


def _ordinary(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return not (address.is_loopback or address.is_multicast or address.is_unspecified or address.is_link_local) and not (
        address.version == 4 and (int(address) >> 24 in (0, 127) or int(address) >> 28 == 15)
    )
