"""Owns the names of chains and sets, and the knowledge of which chains are ours to rewrite or remove.

Hashes are kube-proxy's (first 16 characters of base32 of sha256), so that a chain name found in a runbook or left behind by
kube-proxy means the same ServicePort here. Chain names hold at most 28 characters (XT_EXTENSION_MAXNAMELEN).
"""

from __future__ import annotations

import base64
import hashlib
import re

from nodeproxy.forwarding.table import Family, ServicePortKey

MAX_CHAIN_NAME = 28

SERVICES = "KUBE-SERVICES"
NODE_PORTS = "KUBE-NODEPORTS"
EXTERNAL_SERVICES = "KUBE-EXTERNAL-SERVICES"
POSTROUTING = "KUBE-POSTROUTING"
MARK_MASQ = "KUBE-MARK-MASQ"
FORWARD = "KUBE-FORWARD"
FIREWALL = "KUBE-FIREWALL"
PROXY_FIREWALL = "KUBE-PROXY-FIREWALL"

# Of IPVS mode; kube-proxy's names where the meaning is the same.
NODE_PORT_ACCEPT = "KUBE-NODE-PORT"
IPVS_FILTER = "KUBE-IPVS-FILTER"
SHORT_CUTS = "KUBE-SHORT-CUTS"
REDIRECTS = "KUBE-REDIRECTS"

# Dispatch trees: KUBE-SVC-10.96.0.0/16, KUBE-SVC-tcp-30000-30063. A kube-proxy that takes the node back empties and deletes
# every chain with the prefix of a Service's that it does not want. It would fail on those that a tree leads to, if it left
# the trees alone: so they have that prefix, too.
TREE = "KUBE-SVC-"
HEALTH_PORT_TREE = "KUBE-HEALTH-"

AFFINITY_SET = {Family.IPV4: "KUBE-AFFINITY-", Family.IPV6: "KUBE-AFFINITY6-"}

_PER_SERVICE = ("KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-SEP-", "KUBE-XLB-")
_SERVICE_CHAIN = re.compile("KUBE-SVC-[A-Z2-7]{16}")

# KUBE-MARK-MASQ and KUBE-POSTROUTING are in neither list: kubelet and CNI plugins may use them, so they are rewritten, never
# removed while the agent runs.
_FIXED = (
    *(SERVICES, NODE_PORTS, EXTERNAL_SERVICES, FORWARD, PROXY_FIREWALL, "KUBE-PROXY-CANARY"),
    *(NODE_PORT_ACCEPT, IPVS_FILTER, SHORT_CUTS, REDIRECTS),
    *("KUBE-IPVS-OUT-FILTER", "KUBE-SOURCE-RANGES-FIREWALL", "KUBE-LOAD-BALANCER"),  # of kube-proxy's IPVS mode
)


def hash16(text: str) -> str:
    """First 16 characters of the base32 of sha256 of `text`, as kube-proxy names chains."""
    return base64.b32encode(hashlib.sha256(text.encode()).digest()[:10]).decode()


def service_hash(key: ServicePortKey) -> str:
    """The hash in KUBE-SVC-, KUBE-SVL-, KUBE-EXT- and KUBE-FW- names."""
    return hash16(f"{key.name}{key.protocol}")


def endpoint_hash(key: ServicePortKey, endpoint: str) -> str:
    """The hash in KUBE-SEP- names; `endpoint` is `address:port`, IPv6 in brackets."""
    return hash16(f"{key.name}{key.protocol}{endpoint}")


def is_ours(chain: str) -> bool:
    """Whether a chain belongs to the service proxy alone, and may be removed when it is not wanted any more."""
    return chain.startswith(_PER_SERVICE) or chain.startswith(HEALTH_PORT_TREE) or chain in _FIXED


def is_tree(chain: str) -> bool:
    """Whether a chain is part of a dispatch tree, to judge by its name."""
    return chain.startswith(HEALTH_PORT_TREE) or (chain.startswith(TREE) and not _SERVICE_CHAIN.fullmatch(chain))
