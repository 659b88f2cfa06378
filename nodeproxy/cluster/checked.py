"""Owns checked objects: what is left of Services, EndpointSlices and the Node once every value in them is known to be good.

Compact, because a node holds all of the cluster's: only what decides forwarding, addresses in canonical text, names proven
to be DNS labels. Whatever was left out as bad is named in `problems`.
"""

from __future__ import annotations

import enum

from msgspec import Struct

from nodeproxy.cluster.addresses import Address, Cidr
from nodeproxy.cluster.names import Family, IPProtocol, Problem, ServiceName


class Readiness(enum.IntEnum):
    """What an endpoint's conditions amount to (KEP-1672, KEP-1669); of two entries for one endpoint the greater holds.

    So an entry that does not terminate holds against one that does, whose address was given to it (as in kube-proxy).
    """

    GONE = 0
    """Terminating, and no longer serving."""
    DRAINING = 1
    """Not ready, but serving and terminating: used where nothing is ready."""
    UNUSABLE = 2
    """Not ready, and not terminating."""
    READY = 3


class CheckedEndpoint(Struct, frozen=True, gc=False):
    """endpoints[] of a slice. `node` is empty where unknown; hints are empty where none were given."""

    address: str
    readiness: Readiness
    node: str = ""
    zone_hints: tuple[str, ...] = ()
    node_hints: tuple[str, ...] = ()


class CheckedSlicePort(Struct, frozen=True, gc=False):
    """ports[] of a slice, usable ones only."""

    name: str
    protocol: IPProtocol
    port: int


class CheckedSlice(Struct, frozen=True, gc=False):
    """An EndpointSlice of one of the two IP families."""

    family: Family
    ports: tuple[CheckedSlicePort, ...]
    endpoints: tuple[CheckedEndpoint, ...]
    problems: tuple[Problem, ...] = ()


class CheckedServicePort(Struct, frozen=True, gc=False):
    """spec.ports[`index`] of a Service; `node_port` 0 means none."""

    index: int
    name: str
    protocol: IPProtocol
    port: int
    node_port: int = 0


class CheckedService(Struct, frozen=True, gc=False):
    """A Service that is to be programmed: it is not headless and not an ExternalName.

    `cluster_ips` has at most one address of each family. `source_ranges` is None where loadBalancerSourceRanges is not set,
    `source_ranges_unreadable` says that entries of it had to be left out. `external_local` and `internal_local` are the two
    traffic policies, as they take effect. `health_check_port` is 0 where there is none to serve.
    """

    name: ServiceName
    created: str
    ports: tuple[CheckedServicePort, ...]
    cluster_ips: tuple[Address, ...]
    external_ips: tuple[Address, ...] = ()
    load_balancer_ips: tuple[Address, ...] = ()
    source_ranges: tuple[Cidr, ...] | None = None
    source_ranges_unreadable: bool = False
    affinity_seconds: int | None = None
    internal_local: bool = False
    external_local: bool = False
    health_check_port: int = 0
    problems: tuple[Problem, ...] = ()


class CheckedNode(Struct, frozen=True):
    """This node's Node. `eligible` is false where it is being deleted or scaled away (SPEC section 4, KEP-3836)."""

    name: str
    zone: str | None
    addresses: tuple[Address, ...]
    pod_cidrs: tuple[Cidr, ...]
    eligible: bool
