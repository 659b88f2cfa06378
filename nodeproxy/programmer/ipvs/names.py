"""Owns the names of IPVS mode that others see on a node: the interface, ipsets, and addresses that only this node uses.

The interface and four of the sets have kube-proxy's names, because they mean the same. IPv6 sets have `KUBE-6-` for `KUBE-`.
"""

from __future__ import annotations

import enum

from nodeproxy.forwarding.table import Family

DEVICE = "kube-ipvs0"
"""The dummy interface that carries the service addresses, so that packets to them are delivered to IPVS."""

STAND_IN_ADDRESS = {Family.IPV4: "169.254.64.46", Family.IPV6: "fd6e:7078:7973::1"}
"""Where the Cluster set is of a ServicePort whose cluster IP leads to the Local set (see `places`); on this node only."""


class SetName(enum.Enum):
    """An ipset, by its IPv4 name."""

    CLUSTER_IP = "KUBE-CLUSTER-IP"
    """Frontends that forward; masqueraded is what does not come from local pods."""
    MASQUERADED = "KUBE-MASQUERADED"
    """Frontends that forward; everything is masqueraded."""
    SOURCE_KEPT = "KUBE-SOURCE-KEPT"
    """Frontends that forward; nothing is masqueraded."""
    SHORT_CUT = "KUBE-SHORT-CUT"
    """Frontends of policy Local, where local pods and the node itself go to the Cluster set."""
    REDIRECTED = "KUBE-REDIRECTED"
    """Frontends that share another one's virtual server (session affinity is kept for a ServicePort, not for an address)."""
    DROPPED = "KUBE-DROPPED"
    """Frontends of policy Local, without an endpoint here."""
    REJECTED = "KUBE-REJECTED"
    """Frontends without any usable endpoint."""
    FIREWALLED = "KUBE-LOAD-BALANCER-FW"
    """Frontends that only some sources may reach."""
    ALLOWED_SOURCES = "KUBE-LOAD-BALANCER-SOURCE"
    """Who may reach those (hash:ip,port,net)."""
    LOOP_BACK = "KUBE-LOOP-BACK"
    """Local backends, each with itself as source (hash:ip,port,ip). Used only where the kernel has no BPF matches."""
    SERVICE_ADDRESSES = "KUBE-IPVS-IPS"
    """Addresses that the node has for the sake of Services alone (hash:ip)."""
    HEALTH_CHECK_PORTS = "KUBE-HEALTH-CHECK-NODE-PORT"
    """Health-check node ports (bitmap:port)."""

    def of(self, family: Family) -> str:
        """The name in one family."""
        return self.value if family is Family.IPV4 else self.value.replace("KUBE-", "KUBE-6-", 1)


SET_TYPES = {
    SetName.ALLOWED_SOURCES: "hash:ip,port,net",
    SetName.LOOP_BACK: "hash:ip,port,ip",
    SetName.SERVICE_ADDRESSES: "hash:ip",
    SetName.HEALTH_CHECK_PORTS: "bitmap:port",
}
"""Types of sets; those not named are hash:ip,port."""
