"""Owns the facts about this node that decide forwarding."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from nodeproxy.cluster.addresses import Address, parse_address
from nodeproxy.cluster.checked import CheckedNode
from nodeproxy.cluster.names import Family


class NodeFacts(Struct, frozen=True):
    """This node, as far as forwarding depends on it.

    `name` decides which endpoints are local; never empty. `zone` is the label topology.kubernetes.io/zone, None without.
    `addresses` are the node's own (canonical), which loadBalancerSourceRanges may hold. `masquerade_all` extends
    masquerading on cluster IPs to local pods. Nothing is computed for a family that is not in `families`.
    """

    name: str
    families: tuple[Family, ...] = (Family.IPV4, Family.IPV6)
    zone: str | None = None
    addresses: tuple[str, ...] = ()
    masquerade_all: bool = False

    def with_node(self, node: CheckedNode | None) -> NodeFacts:
        """These facts, with zone and addresses as the Node object has them; without one (or its addresses): as they are."""
        if node is None:
            return self
        addresses = tuple(address.text for address in node.addresses) or self.addresses
        return replace(self, zone=node.zone, addresses=addresses)

    def addresses_of(self, family: Family) -> list[Address]:
        """The node's addresses in one family."""
        parsed = [parse_address(text) for text in self.addresses]
        return [address for address in parsed if address is not None and address.family is family]
