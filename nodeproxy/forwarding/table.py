"""Owns the vocabulary of forwarding: frontends, backends, ServicePorts, the table of them and the delta between two tables.

Everything that SPEC sections 2 and 3 decide is in these values; a programmer only translates them. Addresses are canonical
text (as `ipaddress` prints them), ports are integers in host byte order, durations are seconds.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple

from msgspec import Struct

from nodeproxy.cluster.names import Family, IPProtocol, Problem, ServiceName

__all__ = [
    "Action",
    "Backend",
    "BackendSet",
    "Delta",
    "Family",
    "ForwardingTable",
    "Frontend",
    "FrontendKind",
    "HealthCheck",
    "IPProtocol",
    "Masquerade",
    "Problem",
    "RowChange",
    "ServiceName",
    "ServicePort",
    "ServicePortKey",
    "ServicePortName",
    "merge_deltas",
]


class ServicePortName(NamedTuple):
    """A port of a Service: `namespace/name:port`, or `namespace/name` where the port has no name."""

    namespace: str
    name: str
    port: str

    @property
    def service(self) -> ServiceName:
        """The Service that the port belongs to."""
        return ServiceName(self.namespace, self.name)

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}:{self.port}" if self.port else f"{self.namespace}/{self.name}"


class ServicePortKey(NamedTuple):
    """Identity of a row of the table. The same port name may exist once for each family and protocol."""

    family: Family
    name: ServicePortName
    protocol: IPProtocol

    def __str__(self) -> str:
        return f"{self.name} ({self.protocol}, IPv{int(self.family)})"


class Backend(Struct, frozen=True, order=True, gc=False):
    """One endpoint: canonical address, port, and whether it is on this node. Sorts as the three in turn."""

    address: str
    port: int
    local: bool


class FrontendKind(enum.StrEnum):
    """What sort of address a frontend is."""

    CLUSTER_IP = "cluster IP"
    EXTERNAL_IP = "external IP"
    LOAD_BALANCER_IP = "load balancer IP"
    NODE_PORT = "node port"


class Masquerade(enum.Enum):
    """Whose source address is rewritten on the way to a backend."""

    NEVER = "never"
    NOT_LOCAL_PODS = "not local pods"
    """All sources except pods of this node, as detect-local tells them apart; nobody where detect-local cannot."""
    ALWAYS = "always"


class Action(enum.Enum):
    """What happens to traffic to a frontend."""

    FORWARD = "forward"
    """To one of the frontend's backends. Who does not get there (outside the allowed sources) is dropped."""
    DROP = "drop"
    """Policy Local, endpoints elsewhere but none here. The short-cuts, where they hold, still forward."""
    REJECT = "reject"
    """No usable endpoint anywhere: ICMP port unreachable for everybody."""


class BackendSet(enum.Enum):
    """Which of the two sets of a ServicePort a frontend forwards to."""

    CLUSTER = "cluster"
    LOCAL = "local"


class Frontend(Struct, frozen=True, gc=False):
    """An address and port at which a ServicePort is reached.

    `address` is None for a node port: it stands for every local address that nodePortAddresses allows.
    `short_cuts` (external frontends of policy Local): traffic from local pods goes to the Cluster set unmasqueraded, and
    traffic from the node itself goes to the Cluster set masqueraded, whatever `action` and `backend_set` say.
    `allowed_sources` is None where anybody may come, else CIDRs of the family (loadBalancerSourceRanges); the Service's own
    load balancer IPs are in `allowed_sources` (as /32 or /128) where the node must get through (a range holds a node IP).
    """

    kind: FrontendKind
    address: str | None
    port: int
    action: Action
    backend_set: BackendSet
    masquerade: Masquerade
    short_cuts: bool = False
    allowed_sources: tuple[str, ...] | None = None


class ServicePort(Struct, frozen=True, gc=False):
    """One row of the table: a port of a Service in one family and protocol, with all its frontends and backends.

    Backends are sorted and without duplicates. `cluster_backends` is the Cluster set and `local_backends` the Local set of
    SPEC section 2; a set that no frontend uses is empty. `affinity_seconds` is None without session affinity.
    """

    key: ServicePortKey
    frontends: tuple[Frontend, ...]
    cluster_backends: tuple[Backend, ...]
    local_backends: tuple[Backend, ...]
    affinity_seconds: int | None = None

    def backends(self, which: BackendSet) -> tuple[Backend, ...]:
        """The backends of one of the two sets."""
        return self.cluster_backends if which is BackendSet.CLUSTER else self.local_backends

    @property
    def all_backends(self) -> tuple[Backend, ...]:
        """Backends of both sets, sorted, without duplicates."""
        if not self.local_backends:
            return self.cluster_backends
        return tuple(sorted({*self.cluster_backends, *self.local_backends}))


class HealthCheck(Struct, frozen=True, gc=False):
    """A health-check node port (type LoadBalancer, externalTrafficPolicy Local) and its ready local endpoints.

    `families` are those in which the Service has a cluster IP.
    """

    service: ServiceName
    port: int
    local_endpoints: int
    families: tuple[Family, ...]


class RowChange(NamedTuple):
    """A row before and after; None where it did not or does not exist."""

    before: ServicePort | None
    after: ServicePort | None


class Delta(Struct, frozen=True):
    """What changed between two tables: rows, health-check node ports, and problems found or gone."""

    rows: Mapping[ServicePortKey, RowChange]
    health_checks: Mapping[ServiceName, HealthCheck | None]
    problems: tuple[Problem, ...] = ()
    """Problems that are new with this delta."""

    def __bool__(self) -> bool:
        return bool(self.rows or self.health_checks)


class ForwardingTable(Struct):
    """All rows and health-check node ports. Owned and changed by `nodeproxy.forwarding.tracker` alone."""

    rows: dict[ServicePortKey, ServicePort]
    health_checks: dict[ServiceName, HealthCheck]


def merge_deltas(earlier: Delta, later: Delta) -> Delta:
    """The one delta that leads where `earlier` and then `later` lead. A row that changed and changed back is not in it."""
    rows = dict(earlier.rows)
    for key, change in later.rows.items():
        first = rows.pop(key, None)
        merged = change if first is None else RowChange(first.before, change.after)
        if merged.before != merged.after:
            rows[key] = merged
    return Delta(
        rows=rows,
        health_checks={**earlier.health_checks, **later.health_checks},
        problems=tuple(dict.fromkeys((*earlier.problems, *later.problems))),
    )
