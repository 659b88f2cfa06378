"""Owns the interface between the agent and whatever programs the kernel, and the configuration they share."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from msgspec import Struct

from nodeproxy.forwarding.table import Delta, Family, ForwardingTable, ServicePortKey


class DetectLocalMode(enum.StrEnum):
    """How traffic from pods of this node is recognised; names as in KubeProxyConfiguration."""

    CLUSTER_CIDR = "ClusterCIDR"
    NODE_CIDR = "NodeCIDR"
    BRIDGE_INTERFACE = "BridgeInterface"
    INTERFACE_NAME_PREFIX = "InterfaceNamePrefix"


class LocalDetector(Struct, frozen=True):
    """Tells traffic of local pods from other traffic: by source CIDR of the family, or by incoming interface.

    Everything None: local traffic cannot be told apart, and nothing is masqueraded on its account.
    """

    cidrs: Mapping[Family, str] = {}
    interface: str | None = None
    interface_prefix: str | None = None


class NodePortAddresses(Struct, frozen=True):
    """Which local addresses serve node ports, for one family: `cidrs` None means all local addresses.

    Loopback addresses are never served in IPv6, and in IPv4 only with `loopback`.
    """

    cidrs: tuple[str, ...] | None = None
    loopback: bool = False


class ProgrammerConfig(Struct, frozen=True):
    """What every programmer needs to know of the node. `masquerade_bit` is the bit number in the packet mark."""

    families: tuple[Family, ...]
    local_detector: LocalDetector
    node_port_addresses: Mapping[Family, NodePortAddresses]
    masquerade_bit: int = 14
    conntrack_tcp_be_liberal: bool = False
    draining_addresses: bool = False
    """IPVS mode has handed over, and its service addresses stay on the node until their connections have ended."""


class StaleFlowCount(NamedTuple):
    """Conntrack entries that were deleted, and how long finding and deleting them took, in seconds."""

    deleted: int
    seconds: float


class RuleCount(NamedTuple):
    """Rules of ours in one table: those in force, and those written by the last transaction."""

    in_force: int
    written: int


class ApplyResult(Struct, frozen=True):
    """Outcome of `Programmer.apply`: ServicePorts that the kernel refused, each with the kernel's reason; and for metrics:

    families whose change in proportion was refused, so that a full pass followed; rules by family and table; and, by family,
    how many stale conntrack entries were deleted.
    """

    refused: Mapping[ServicePortKey, str] = {}
    full: bool = False
    partial_failures: tuple[Family, ...] = ()
    rules: Mapping[Family, Mapping[str, RuleCount]] = {}
    stale_flows: Mapping[Family, StaleFlowCount] = {}


class Withdrawal(enum.Enum):
    """How far a programmer has let go of the kernel; see `Programmer.withdraw`."""

    CARRIES_FLOWS = "carries flows"
    """Established flows still go through what it programmed."""
    IDLE = "idle"
    """Nothing goes through it any more, but something of it could not be removed yet."""
    DONE = "done"
    """Nothing of it is left."""


class ProgrammingError(Exception):
    """A transaction failed as a whole and nothing of it is in the kernel. The message says what the kernel said."""


class Programmer(Protocol):
    """Programs a forwarding table into the kernel. All methods are called from one task, one at a time."""

    @property
    def draining(self) -> int:
        """How many real servers take no new connections and keep those that they have. In any thread."""

    async def prepare(self) -> None:
        """Check tools and kernel, take stock of what is there. Raises `ProgrammingError` with what is missing."""

    def configure(self, config: ProgrammerConfig) -> None:
        """Take a new configuration; the next apply is a full pass."""

    async def apply(self, table: ForwardingTable, delta: Delta) -> ApplyResult:
        """Make the kernel match `table`, given that only `delta` changed since the last call; in proportion to `delta`.

        The first call, and a call after drift or failure, is a full pass over `table`. Raises `ProgrammingError`.
        """

    async def audit(self, *, whole: bool = False) -> Sequence[str]:
        """Compare the kernel with what was programmed, cheaply. What differs, in words: the next apply repairs it.

        `whole`: everything at once, however long that takes, and not only what seems to have changed. Raises
        `ProgrammingError`.
        """

    async def withdraw(self) -> Withdrawal:
        """Take a step out of the kernel without cutting a flow, now that the programmer of another mode serves.

        Needs no `prepare`, and goes on where a former agent stopped. To be called again, seconds later, until it is done.
        Raises `ProgrammingError`.
        """

    async def cleanup(self) -> None:
        """Remove everything of ours from the kernel, and nothing else."""
