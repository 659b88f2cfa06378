"""Owns reading addresses, CIDRs and `host:port` as they stand in a configuration."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from nodeproxy.forwarding.table import Family


def is_address(text: str) -> bool:
    """Whether the text is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def parse_networks(cidrs: Sequence[str]) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """Networks of those CIDRs that can be read, host bits cleared."""
    networks = []
    for cidr in cidrs:
        try:
            networks.append(ipaddress.ip_network(cidr, strict=False))
        except ValueError:
            continue
    return networks


def by_family(cidrs: Sequence[str]) -> dict[Family, tuple[str, ...]]:
    """Canonical CIDRs by family."""
    result: dict[Family, tuple[str, ...]] = {}
    for network in parse_networks(cidrs):
        family = Family(network.version)
        result[family] = (*result.get(family, ()), str(network))
    return result


def parse_host_port(text: str) -> tuple[str, int] | None:
    """Split `host:port`; IPv6 in brackets. None where it is neither."""
    host, separator, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not port.isdecimal() or not 0 < int(port) < 65536 or not is_address(host or "0.0.0.0"):
        return None
    return host or "0.0.0.0", int(port)


def with_port(text: str, port: int) -> str:
    """The text with a port where it is a bare IP address, else as it is; kube-proxy takes both forms."""
    if not is_address(text):
        return text
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"
