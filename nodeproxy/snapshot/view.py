"""Owns the node's view of a snapshot: everything is decided as the agent decides it, and nothing is programmed."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from functools import cached_property

from msgspec import UNSET, UnsetType

from nodeproxy.agent.node import programmer_config
from nodeproxy.cluster.state import ClusterState
from nodeproxy.configuration.agent_config import Mode
from nodeproxy.forwarding.claims import Claim
from nodeproxy.forwarding.node import NodeFacts
from nodeproxy.forwarding.table import Family, IPProtocol
from nodeproxy.forwarding.tracker import ForwardingTracker
from nodeproxy.forwarding.verdict import Located, Packet, Verdict, index_frontends, verdict
from nodeproxy.snapshot.model import Snapshot
from nodeproxy.source.events import Upserted

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class NodeView:
    """What a node makes of a snapshot. `mode`: another one than the configuration's.

    `state`, `facts`, `table` and `problems` are those that the node's agent has; `programmer_config` is what its programmer
    is told.
    """

    def __init__(self, snapshot: Snapshot, *, mode: Mode | None = None) -> None:
        config = snapshot.config
        self.snapshot = snapshot
        self.mode = mode or config.mode
        self.state = ClusterState(config.node_name)
        tracker = ForwardingTracker(
            NodeFacts(
                name=config.node_name,
                families=snapshot.families,
                addresses=snapshot.node_addresses,
                masquerade_all=config.masquerade_all,
            )
        )
        changes = self.state.apply([Upserted(obj) for obj in snapshot.objects])
        tracker.update(self.state, changes)
        self.facts = tracker.facts_in_force
        self.table = tracker.table
        self.problems = tracker.problems
        self.refused = (*snapshot.refused, *changes.refused)
        self.programmer_config = programmer_config(config, self.mode, snapshot.families, self.state.node)
        self.node_addresses = _parsed((*self.facts.addresses, *snapshot.node_addresses))

    @cached_property
    def index(self) -> Mapping[Claim, Located]:
        """All frontends by where they are."""
        return index_frontends(self.table)

    @property
    def tells_local_pods_by_address(self) -> bool:
        """Whether detect-local goes by source address (or by nothing), and not by the interface that a packet came by."""
        detector = self.programmer_config.local_detector
        return detector.interface is None and detector.interface_prefix is None

    def packet(
        self,
        source: str,
        destination: str,
        port: int,
        protocol: IPProtocol = IPProtocol.TCP,
        *,
        from_node: bool | None = None,
        from_local_pod: bool | UnsetType | None = UNSET,
    ) -> Packet:
        """The first packet of a connection as the node sees it. What is not told is judged by the addresses.

        A source that is the destination means: the node itself, which holds that address. Raises ValueError where an address
        is none or the two are of different families, and where detect-local goes by interface and `from_local_pod` is not
        given for a packet that is not the node's own.
        """
        sender, target = ipaddress.ip_address(source), ipaddress.ip_address(destination)
        if sender.version != target.version:
            raise ValueError(f"{source} and {destination} are of different IP families")
        held = sender == target and target not in self.node_addresses and not target.is_loopback
        to_node = target in self.node_addresses or target.is_loopback
        own = self._is_own(sender) or held if from_node is None else from_node
        return Packet(
            family=Family(sender.version),
            source=str(sender),
            destination=str(target),
            port=port,
            protocol=protocol,
            from_local_pod=self._from_local_pod(sender, own) if isinstance(from_local_pod, UnsetType) else from_local_pod,
            from_node=own,
            to_node=to_node or held,
            to_node_port_address=to_node and self.serves_node_ports(destination),
        )

    def verdict(self, packet: Packet) -> Verdict:
        """What must happen to a packet."""
        return verdict(self.table, packet, self.index)

    def serves_node_ports(self, address: str) -> bool:
        """Whether an address of the node is one that nodePortAddresses allows, by the mode's rules for loopback."""
        parsed = ipaddress.ip_address(address)
        allowed = self.programmer_config.node_port_addresses.get(Family(parsed.version))
        if allowed is None:  # a family that the node does not have
            return False
        if parsed.is_loopback and not (parsed.version == 4 and allowed.loopback):
            return False
        if self.mode is Mode.IPVS and parsed.version == 6 and parsed.is_link_local:
            return False  # its virtual servers would need a zone
        return allowed.cidrs is None or any(parsed in ipaddress.ip_network(cidr) for cidr in allowed.cidrs)

    def _is_own(self, address: _Address) -> bool:
        return address in self.node_addresses or address.is_loopback

    def _from_local_pod(self, source: _Address, from_node: bool) -> bool | None:
        """As the rules tell: by the CIDR of the family; the node's own packets came by no interface."""
        if self.tells_local_pods_by_address:
            cidr = self.programmer_config.local_detector.cidrs.get(Family(source.version))
            return source in ipaddress.ip_network(cidr) if cidr else None
        if from_node:
            return False
        raise ValueError(f"whether {source} is a pod of this node: detect-local goes by interface, so it has to be said")


def _parsed(addresses: Iterable[str]) -> frozenset[_Address]:
    return frozenset(ipaddress.ip_address(text) for text in addresses)
