"""Owns `Snapshot`: the cluster state at one moment, and the node that it is looked at from."""

from __future__ import annotations

from msgspec import Struct

from nodeproxy.api.objects import ApiObject
from nodeproxy.configuration.agent_config import AgentConfig
from nodeproxy.forwarding.table import Family
from nodeproxy.source.events import Refused

BOTH_FAMILIES = (Family.IPV4, Family.IPV6)


class SnapshotError(Exception):
    """A snapshot cannot be taken, read or written; the message is one line that names what is at fault."""


def left_out(refused: Refused) -> str:
    """What is missing in a snapshot, and why."""
    return f"{refused.key or refused.origin}: {refused.reason}"


class Snapshot(Struct, frozen=True):
    """Cluster state at one moment, and the node it is looked at from.

    `objects`: Services, EndpointSlices (the source's selectors applied) and this node's Node if there is one, sorted by
    kind, namespace and name. `refused`: what could not be read. `config`: how the node's agent is, or would be, configured.
    `node_addresses`: the node's own addresses (canonical, without loopback and link-local ones) where they are known;
    a Node object's count before them. `taken`: RFC 3339, UTC. `origin`: where the state comes from, in words. `families`:
    those that the node has.
    """

    objects: tuple[ApiObject, ...]
    refused: tuple[Refused, ...]
    config: AgentConfig
    node_addresses: tuple[str, ...]
    taken: str
    origin: str
    families: tuple[Family, ...] = BOTH_FAMILIES
