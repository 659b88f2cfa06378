"""Owns hosts with many addresses: one namespace that stands for any number of pods, or of clients outside.

A namespace and a link for each of thousands of pods would cost minutes. Here all of them share one, and yet each is on its
own as seen from the network: what such a host sends leaves by its link, even to another address that it has, so that a
connection from one of its pods to another passes the node. Answers come from the address that was asked.

Servers for it are made with `EchoServers.add_any`: one for each port, which tells the address that was reached.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Final

from nodeproxy.sandbox.namespace import Namespace
from nodeproxy.sandbox.topology import BRIDGE, CLIENT_GATEWAY, Sandbox, bits

POD_HOST_LINK: Final = ("100.64.1.2", "fdff:6464:1::2")
CLIENT_HOST_LINK: Final = ("100.64.2.2", "fdff:6464:2::2")

_ALONE: Final = {
    **{f"net.ipv4.{proto}_early_demux": 0 for proto in ("ip", "tcp", "udp")},
    "net.ipv4.conf.all.accept_local": 1,
    "net.ipv4.ip_nonlocal_bind": 1,
    "net.ipv6.ip_nonlocal_bind": 1,
}


def prefixes(addresses: Iterable[str]) -> list[str]:
    """The fewest CIDRs that hold these addresses (or CIDRs) and no other ones."""
    networks = [ipaddress.ip_network(text) for text in addresses]
    four = ipaddress.collapse_addresses(one for one in networks if isinstance(one, ipaddress.IPv4Network))
    six = ipaddress.collapse_addresses(one for one in networks if isinstance(one, ipaddress.IPv6Network))
    return [*map(str, four), *map(str, six)]


def add_pod_host(box: Sandbox, addresses: Iterable[str]) -> Namespace:
    """One host on the node's bridge that is all of these pods (addresses or CIDRs); one for each sandbox."""
    held = prefixes(addresses)
    (host,) = box.add_pods([POD_HOST_LINK])
    box.node.ip([f"route add {prefix} via {_link(prefix, POD_HOST_LINK)} dev br0 onlink" for prefix in held])
    _many(host, held, BRIDGE)
    return host


def add_client_host(box: Sandbox, addresses: Iterable[str]) -> Namespace:
    """One host outside that is all of these clients (addresses or CIDRs); one for each sandbox."""
    held = prefixes(addresses)
    (host,) = box.add_clients([CLIENT_HOST_LINK])
    device = f"cl{box.links}"
    box.outside.ip([f"route add {prefix} via {_link(prefix, CLIENT_HOST_LINK)} dev {device} onlink" for prefix in held])
    _many(host, held, CLIENT_GATEWAY)
    return host


def _link(prefix: str, links: tuple[str, str]) -> str:
    return links[1] if ":" in prefix else links[0]


def _many(host: Namespace, held: Iterable[str], gateways: tuple[str, str]) -> None:
    """All addresses are local to what comes in by the link, and to nothing that the host sends itself."""
    host.sysctl(_ALONE)
    host.ip([f"route add local {prefix} dev lo table local" for prefix in held])
    for gateway in gateways:
        family = 6 if bits(gateway) == 128 else 4
        rules = [
            f"route add {'::/0' if family == 6 else '0.0.0.0/0'} via {gateway} dev eth0 onlink table 101",
            "rule add iif eth0 lookup local pref 1",
            "rule add lookup 101 pref 2",
            "rule del pref 0",
        ]
        host.ip(rules, family=family)
