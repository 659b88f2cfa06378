"""Owns the reading of IP addresses and CIDRs: one canonical text for each, or nothing.

Canonical is what `ipaddress` prints. Refused, although some parsers take them: IPv4 with leading zeros (read as octal by
some), IPv6 with a zone id (means something on one link only) and IPv4-mapped IPv6 (belongs to both families).
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import NamedTuple

from nodeproxy.cluster.names import Family

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_MAPPED_PREFIX = bytes(10) + b"\xff\xff"
_SPECIAL_IPV4 = ("127.", "169.254.", "224.0.0.", "0.0.0.0")
_PREFIX_LENGTHS = {Family.IPV4: 32, Family.IPV6: 128}


class Address(NamedTuple):
    """An IP address in canonical text, with its family."""

    family: Family
    text: str


class Cidr(NamedTuple):
    """An address range in canonical text (host bits cleared), with its family."""

    family: Family
    text: str


def canonical_ipv4(text: str) -> str | None:
    """`text` itself where it is an IPv4 address; it has only one spelling."""
    try:
        inet_pton(AF_INET, text)  # takes four decimal numbers without leading zeros, and nothing else
    except (OSError, ValueError):  # ValueError: a NUL, or no UTF-8
        return None
    return text


def canonical_ipv6(text: str) -> str | None:
    """The canonical spelling where `text` is an IPv6 address."""
    try:
        packed = inet_pton(AF_INET6, text)
    except (OSError, ValueError):
        return None
    if packed.startswith(_MAPPED_PREFIX):
        return None
    printed = inet_ntop(AF_INET6, packed)
    # The C library prints ::1.2.3.4 where `ipaddress` prints ::102:304.
    return str(ipaddress.IPv6Address(packed)) if "." in printed else printed


def parse_address(text: str) -> Address | None:
    """The address that `text` spells, or None."""
    if ":" in text:
        canonical = canonical_ipv6(text)
        return None if canonical is None else Address(Family.IPV6, canonical)
    canonical = canonical_ipv4(text)
    return None if canonical is None else Address(Family.IPV4, canonical)


def parse_cidr(text: str) -> Cidr | None:
    """The range that `text` spells, with host bits cleared, or None. White space around it is trimmed.

    The API server's validation of loadBalancerSourceRanges lets such white space through, so objects with it exist.
    """
    address_text, slash, length = text.strip().partition("/")
    address = parse_address(address_text)
    if address is None or not slash or not (length.isascii() and length.isdigit() and len(length) <= 3):
        return None
    if int(length) > _PREFIX_LENGTHS[address.family]:
        return None
    return Cidr(address.family, str(ipaddress.ip_network((address.text, int(length)), strict=False)))


def is_local_only(address: Address) -> bool:
    """Whether nobody else could be meant by this address: unspecified or loopback."""
    return address.text in {"0.0.0.0", "::", "::1"} or (address.family is Family.IPV4 and address.text.startswith("127."))


def is_special(family: Family, canonical: str) -> bool:
    """Whether the API server refuses this as an endpoint or external IP.

    Unspecified, loopback, link-local, and multicast of the link or the interface.
    """
    if family is Family.IPV4:
        return canonical.startswith(_SPECIAL_IPV4)
    if canonical in {"::", "::1"}:
        return True
    packed = inet_pton(AF_INET6, canonical)
    link_local = packed[0] == 0xFE and packed[1] & 0xC0 == 0x80
    return link_local or (packed[0] == 0xFF and packed[1] & 0x0F in {1, 2})


@lru_cache(maxsize=4096)
def network(canonical: str) -> Network:
    """The range as an object, to ask what it contains."""
    return ipaddress.ip_network(canonical)


def contains(cidr: Cidr, address: Address) -> bool:
    """Whether the range holds the address. Never across families."""
    return cidr.family is address.family and ipaddress.ip_address(address.text) in network(cidr.text)
