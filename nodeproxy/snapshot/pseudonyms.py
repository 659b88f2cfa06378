"""Owns replacing names and addresses by others under a secret: the same by the same, and addresses so that prefixes keep.

Two addresses that share their first n bits, and no more, share as many afterwards (as Crypto-PAn, Xu, Fan, Ammar and Moon,
ICNP 2002, has it), so that a CIDR has an image which holds the images of what it held. What means something by itself stays
where it is, and nothing else gets there: unspecified, loopback, link-local, multicast and broadcast addresses.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
from collections.abc import Iterator
from functools import lru_cache
from typing import Final, NamedTuple

_NAME_CHARACTERS: Final = 12  # 60 bits: among a million names no two become one
_CACHED_PREFIXES: Final = 1 << 17


class _Prefix(NamedTuple):
    """The first `length` bits of an address, as bytes of the whole address."""

    packed: bytes
    length: int


def _prefixes(*texts: str) -> tuple[_Prefix, ...]:
    networks = map(ipaddress.ip_network, texts)
    return tuple(_Prefix(network.network_address.packed, network.prefixlen) for network in networks)


_STAY: Final = {
    4: _prefixes("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "255.255.255.255/32"),
    6: _prefixes("::/127", "fe80::/10", "ff00::/8"),
}
_AMONG_THEMSELVES: Final = {4: (), 6: _prefixes("::ffff:0:0/96")}  # IPv4-mapped: refused wherever they stand


class Names:
    """Pseudonyms of names. `kind` (`ns`, `svc`, `node`, ...) is how they begin; equal names of two kinds differ."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def of(self, kind: str, name: str) -> str:
        """A DNS label."""
        digest = hashlib.blake2b(f"{kind}/{name}".encode(errors="surrogatepass"), key=self._secret).digest()
        return f"{kind}-{base64.b32encode(digest).decode().lower()[:_NAME_CHARACTERS]}"


class Addresses:
    """Pseudonyms of addresses and CIDRs. It remembers what it was asked."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._images: dict[str, str] = {}
        self._flips = lru_cache(_CACHED_PREFIXES)(self._flips_below)

    def address(self, text: str) -> str:
        """The image of an address. Raises ValueError where it is none."""
        if text not in self._images:
            address = ipaddress.ip_address(text)
            self._images[text] = str(ipaddress.ip_address(self._image(address.version, address.packed)))
        return self._images[text]

    def network(self, text: str) -> str:
        """The image of a CIDR; host bits are cleared. Raises ValueError where it is none."""
        if text not in self._images:
            network = ipaddress.ip_network(text.strip(), strict=False)
            image = ipaddress.ip_address(self._image(network.version, network.network_address.packed))
            self._images[text] = str(ipaddress.ip_network((image, network.prefixlen), strict=False))
        return self._images[text]

    def revealed(self, *, longer_than: int = 0) -> list[str]:
        """What is an image and was also asked for, although its image is free: another secret does better.

        Networks of prefixes not `longer_than` so many bits are passed over.
        """
        return [image for image in set(self._images.values()) & self._images.keys() if _is_free(image, longer_than)]

    def _image(self, version: int, packed: bytes) -> bytes:
        return bytes(byte ^ _flipped(byte, self._flips(version, packed[:position])) for position, byte in enumerate(packed))

    def _flips_below(self, version: int, prefix: bytes) -> bytes:
        """For each bit string of less than 8 bits that may follow `prefix`, at `1 << its length | it`: flip the next bit?"""
        digest = hashlib.blake2b(bytes([version]) + prefix, key=self._secret, digest_size=32).digest()
        flips = bytearray(digest[node >> 3] >> (node & 7) & 1 for node in range(256))
        for node in _fixed_nodes(version, prefix):
            flips[node] = 0
        return bytes(flips)


def _flipped(byte: int, flips: bytes) -> int:
    """Which bits of a byte to flip."""
    mask, node = 0, 1
    for bit in range(7, -1, -1):
        mask |= flips[node] << bit
        node = node << 1 | byte >> bit & 1
    return mask


def _fixed_nodes(version: int, prefix: bytes) -> Iterator[int]:
    """Where no bit may be flipped: on the way to what stays, and all over it."""
    for packed, length in (*_STAY[version], *_AMONG_THEMSELVES[version]):
        start = 8 * len(prefix)
        if prefix != packed[: len(prefix)] and (length > start or not _starts_with(prefix, packed, length)):
            continue
        if length <= start:
            if (packed, length) in _STAY[version]:
                yield from range(1, 256)
            continue
        node = 1
        for bit in range(min(8, length - start)):
            yield node
            node = node << 1 | packed[len(prefix)] >> (7 - bit) & 1
        if length - start < 8 and (packed, length) in _STAY[version]:
            first, last = node, node
            while first < 256:
                yield from range(first, last + 1)
                first, last = first << 1, last << 1 | 1


def _starts_with(prefix: bytes, packed: bytes, length: int) -> bool:
    whole, rest = divmod(length, 8)
    if prefix[:whole] != packed[:whole]:
        return False
    return not rest or (prefix[whole] ^ packed[whole]) >> (8 - rest) == 0


def _is_free(text: str, longer_than: int) -> bool:
    """Whether an address or CIDR could have another image than itself."""
    network = ipaddress.ip_network(text, strict=False)
    if "/" in text and network.prefixlen <= longer_than:
        return False
    packed = network.network_address.packed
    for position in range(0, network.prefixlen, 8):
        prefix = packed[: position // 8]
        fixed, node = set(_fixed_nodes(network.version, prefix)), 1
        for bit in range(min(8, network.prefixlen - position)):
            if node not in fixed:
                return True
            node = node << 1 | packed[position // 8] >> (7 - bit) & 1
    return False
