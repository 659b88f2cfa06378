"""Owns which of Kubernetes' end-to-end tests run: the groups, and what of them is left out, each with the reason."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

GROUPS: Final = ("Services", "Networking", "DNS", "Conntrack", "EndpointSlice")
"""Of `[sig-network]`: what the issue asks for. None of these may fail."""

DUAL_STACK: Final = "[Feature:IPv6DualStack]"
"""The group that runs where the cluster has both families of addresses."""

FURTHER: Final = (
    "API Server",
    "Connectivity Pod Lifecycle",
    "EndpointSliceMirroring",
    "Endpoints",
    "EndpointsController",
    "HostPort",
    "KubeProxy",
    "NoSNAT",
    "Service CIDRs",
    "Service endpoints latency",
    "Topology Hints",
    "Traffic Distribution",
)
"""Groups that a service proxy has a part in, too; they run with `--all`."""


@dataclass(frozen=True)
class Exclusion:
    """Tests whose name the pattern is found in do not run, for this reason."""

    pattern: str
    reason: str


EXCLUSIONS: Final = (
    Exclusion(r"\bSCTP\b|\bsctp\b", "needs the kernel's SCTP, which pods here do not have"),
    Exclusion(r"\[Feature:LoadBalancer\]", "needs a cloud that gives load balancers"),
    Exclusion(r"\[Disruptive\]", "restarts or breaks parts of nodes over ssh, which nodes of kind do not offer"),
    Exclusion(r"\[Feature:Networking-(IPv4|IPv6|DNS)\]", "needs the internet"),
    Exclusion(r"should forward PTR records lookup to upstream", "needs the internet: it asks for the name of 8.8.8.8"),
    Exclusion(r"\[Feature:Networking-Performance\]", "measures throughput between nodes; nothing of a service proxy"),
    Exclusion(r"\[Feature:PerformanceDNS\]", "makes ten thousand Services to load the DNS server"),
    Exclusion(r"\[Feature:KubeProxyNFAcct\]", "needs the kernel's nfacct"),
)
"""The first that matches gives the reason."""

SERIAL: Final = Exclusion(r"\[Serial\]", "changes the whole cluster, so it runs alone: left out with --no-serial")


def pattern(groups: Iterable[str], focus: str = "") -> str:
    """A regular expression for ginkgo: finds the tests of these groups, and of them those whose name has `focus` in it."""
    # Not anchored: ginkgo puts the suite's name before that of the test.
    names = "|".join(group.replace("[", r"\[").replace("]", r"\]") for group in groups)
    return rf"\[sig-network\] ({names}) {f'.*({focus})' if focus else ''}"


def group_of(name: str, groups: Iterable[str]) -> str | None:
    """The group that a test belongs to; None where it is none of these."""
    return next((group for group in groups if name.startswith(f"[sig-network] {group} ")), None)


def reason(name: str, exclusions: Iterable[Exclusion]) -> str | None:
    """Why a test does not run; None where it does."""
    return next((each.reason for each in exclusions if re.search(each.pattern, name)), None)
