"""Owns the words that everything from the cluster inwards shares: IP family, protocol, the name of a Service, and a problem.

They are here, below `nodeproxy.forwarding`, because validation already speaks of them; `nodeproxy.forwarding.table` hands
them on as part of its vocabulary.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from msgspec import Struct


class Family(enum.IntEnum):
    """IP family; the value is the IP version."""

    IPV4 = 4
    IPV6 = 6

    @property
    def address_bits(self) -> int:
        """Length of an address, and of the prefix that names just one."""
        return 32 if self is Family.IPV4 else 128


class IPProtocol(enum.StrEnum):
    """Transport protocol of a ServicePort, as iptables names it. (Upper case in the API.)"""

    TCP = "tcp"
    UDP = "udp"
    SCTP = "sctp"


class ServiceName(NamedTuple):
    """Namespace and name of a Service."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Problem(Struct, frozen=True, gc=False):
    """Part of an object that cannot be programmed: which Service, which field, and why. The rest goes on working.

    Values quoted in `reason` are escaped to printable ASCII, so that it can be logged as it is.
    """

    service: ServiceName
    field: str
    reason: str

    def __str__(self) -> str:
        return f"Service {self.service}: {self.field}: {self.reason}"
