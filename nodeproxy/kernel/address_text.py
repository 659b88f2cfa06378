"""Owns the one way in which the drivers write IP addresses: as `ipaddress` does, so that equal addresses are equal text.

The C library writes ::1.2.3.4 where `ipaddress` writes ::102:304.
"""

import ipaddress
import socket


def address_text(packed: bytes) -> str:
    """An address of 4 or 16 bytes, network order, as text."""
    if len(packed) == 4:
        return socket.inet_ntop(socket.AF_INET, packed)
    text = socket.inet_ntop(socket.AF_INET6, packed)
    return str(ipaddress.IPv6Address(packed)) if "." in text else text
