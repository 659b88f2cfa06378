"""Owns reading the kernel's rules after a sync: how many, whether every Service is there, and which come first and last."""

from __future__ import annotations

import re
import time
from collections.abc import Collection

from hack.bench.results import RuleCount
from nodeproxy.sandbox.agent import Variant
from nodeproxy.sandbox.namespace import Namespace, unique_stem

_TOOL = {"ipv4": "iptables", "ipv6": "ip6tables"}
_TO_SERVICE = re.compile(r"^-A \S+ .*-d (\S+)/32 .*-j KUBE-(?:SVC|SVL)-\S+$")
_TIMEOUT = 600.0


class NotProgrammed(Exception):
    """The agent says that it is done, but the kernel lacks a Service."""


def saved(where: Namespace, variant: Variant, family: str = "ipv4") -> str:
    """The output of iptables-save in a namespace."""
    return where.command([f"{_TOOL[family]}-{variant}-save"], timeout=_TIMEOUT).stdout


def count(text: str) -> RuleCount:
    """Rules and chains in the output of iptables-save."""
    lines = text.splitlines()
    return RuleCount(rules=sum(line.startswith("-A ") for line in lines), chains=sum(line.startswith(":") for line in lines))


def check_all_there(text: str, addresses: Collection[str]) -> None:
    """Raise NotProgrammed unless each of these cluster IPs is a destination in a rule."""
    present = set(re.findall(r" -d ([0-9.]+)/32 ", text))
    missing = [address for address in addresses if address not in present]
    if missing:
        raise NotProgrammed(f"{len(missing)} of {len(addresses)} Services are not in the kernel, {missing[0]} for one")


def destinations(text: str) -> set[str]:
    """The addresses of all endpoints that a rule leads to."""
    return set(re.findall(r" --to-destination ([0-9.]+):", text))


def in_order(text: str, addresses: Collection[str]) -> list[str]:
    """Those of the cluster IPs that a rule leads to a Service's chain, in the order of the rules."""
    wanted = set(addresses)
    matches = (_TO_SERVICE.match(line) for line in text.splitlines())
    return list(dict.fromkeys(match[1] for match in matches if match and match[1] in wanted))


def restore_seconds(text: str, variant: Variant) -> float:
    """How long iptables-restore takes for these rules in an empty namespace: what no agent can beat with the same rules."""
    with Namespace(f"{unique_stem()}-floor") as empty:
        started = time.monotonic()
        empty.command([f"iptables-{variant}-restore", "--noflush"], input=text, timeout=_TIMEOUT)
        return time.monotonic() - started
