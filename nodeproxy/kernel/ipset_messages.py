"""Owns the packed netlink messages of the kernel's ipset subsystem: sets and entries to bytes, and back.

Addresses, ports and numbers go in network order, marked NLA_F_NET_BYTEORDER as the kernel demands; netlink and attribute
headers are in host order. Entries are written as the ipset program writes them: `10.0.0.1`, `10.0.0.0/8`,
`10.0.0.1,tcp:80,10.0.0.2`, `10.0.0.0/8,fd00::/8`, `8080` (bitmap:port).

Sources: include/uapi/linux/netfilter/ipset/ip_set.h, ip_set_hash.h; net/netfilter/ipset/ip_set_hash_*.c for revisions.
"""

import re
import socket
import struct
from dataclasses import dataclass, replace
from typing import Final

from nodeproxy.kernel.address_text import address_text
from nodeproxy.kernel.netlink import NLA_F_NESTED, NLA_F_NET_BYTEORDER, attribute, attributes

NFNL_SUBSYS_IPSET: Final = 6
CMD_PROTOCOL: Final = 1
CMD_CREATE: Final = 2
CMD_DESTROY: Final = 3
CMD_FLUSH: Final = 4
CMD_RENAME: Final = 5
CMD_SWAP: Final = 6
CMD_LIST: Final = 7
CMD_ADD: Final = 9
CMD_DEL: Final = 10
CMD_TYPE: Final = 13

ATTR_PROTOCOL: Final = 1
ATTR_SETNAME: Final = 2
ATTR_TYPENAME: Final = 3  # also the second name of rename and swap
ATTR_REVISION: Final = 4
ATTR_FAMILY: Final = 5
ATTR_FLAGS: Final = 6
ATTR_DATA: Final = 7
ATTR_ADT: Final = 8
ATTR_PROTOCOL_MIN: Final = 10  # also the lowest revision of a type
FLAG_LIST_SETNAME: Final = 1 << 1
FLAG_LIST_HEADER: Final = 1 << 2

_IP, _CIDR, _PORT, _PORT_TO, _TIMEOUT, _PROTO = 1, 3, 4, 5, 6, 7
_HASHSIZE, _MAXELEM, _ELEMENTS, _REFERENCES, _MEMSIZE = 18, 19, 24, 25, 26
_IP2, _CIDR2 = 20, 21
_ENTRY_FLAGS: Final = 8
_BITMASK, _NETMASK = 12, 20  # of a set, not of an entry
_FLAG_NOMATCH: Final = 1 << 2
_IPV4, _IPV6 = 1, 2

_NET: Final = NLA_F_NET_BYTEORDER
_GENMSG: Final = struct.pack("=BBH", socket.AF_INET, 0, 0)  # nfgenmsg; the kernel takes the family from the set
_ADDRESS_FAMILY: Final = {4: socket.AF_INET, 6: socket.AF_INET6}
_PROTOCOL_NUMBERS: Final = {"tcp": 6, "udp": 17, "sctp": 132, "udplite": 136}
_PROTOCOL_NAMES: Final = {number: name for name, number in _PROTOCOL_NUMBERS.items()}
_PROTOCOL_AND_PORT: Final = re.compile(r"(tcp|udp|sctp|udplite):(\d{1,5})")
_MAX_NAME: Final = 31  # bytes, IPSET_MAXNAMELEN - 1

KNOWN_REVISIONS: Final = {
    "hash:ip": 4,
    "hash:ip,port": 5,
    "hash:ip,port,ip": 5,
    "hash:ip,port,net": 7,
    "hash:net": 6,
    "hash:net,port": 7,
    "hash:net,net": 2,
    "hash:net,port,net": 2,
    "bitmap:port": 3,
}
"""Highest revision of each type that this encoder was written for: the ones of Linux 4.18. The kernel accepts older ones
than its own, and later revisions only add options that are not used here."""

ERROR_TEXTS: Final = {
    17: "a set of that name exists with another type or other settings",
    4097: "does not fit the set's type or IP family",
    4098: "the kernel does not have this set type or revision",
    4099: "no more sets can be created",
    4100: "the set is in use by a rule or another set",
    4101: "a set of the new name exists",
    4102: "the sets differ in type",
    4103: "the entry is not in the set, or is there already",
    4104: "invalid prefix length",
    4105: "invalid netmask",
    4106: "the set is of the other IP family",
    4107: "the set has no timeouts",
    4108: "the set is referenced",
    4109: "an IPv4 address is expected",
    4110: "an IPv6 address is expected",
    4352: "the set is full",
    4353: "the null element cannot be stored",
    4354: "invalid protocol",
    4355: "the protocol is missing",
    4356: "ranges are not supported",
    4357: "invalid range",
}
"""Kernel error numbers of ipset (enum ipset_errno and the hash types' own) in words; other numbers are plain errno."""


@dataclass(frozen=True, slots=True)
class SetSpec:
    """A set as it is to be created. `family` is 4 or 6; for bitmap:port it does not matter.

    `timeout` is the default life of entries in seconds, None for a set without timeouts (0: entries stay, but may be given
    one each). `hash_size` is in buckets, rounded up by the kernel to a power of two, which it grows as needed.
    `max_elements` is a limit, not an allocation. `port_range` (first, last) is for bitmap:port only.
    """

    name: str
    type: str = "hash:ip"
    family: int = 4
    timeout: int | None = None
    hash_size: int | None = None
    max_elements: int | None = None
    port_range: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry in the ipset program's notation. `timeout` in seconds: when added, its life (None: the set's default); when
    listed, what is left (None: the set has no timeouts). `nomatch`, of listed ones: an exception, no member."""

    text: str
    timeout: int | None = None
    nomatch: bool = False


@dataclass(frozen=True, slots=True)
class SetContents:
    """A set as the kernel lists it. `references` counts the rules and sets that use it; `memory_bytes` is its size.

    `masked`: the kernel compares addresses only under a netmask or bitmask of the set.
    """

    spec: SetSpec
    references: int
    memory_bytes: int
    entries: tuple[Entry, ...]
    masked: bool = False


@dataclass(frozen=True, slots=True)
class SetSize:
    """How full a hash set is: `hash_size` in buckets, `elements` in entries (timed-out ones may still be counted)."""

    name: str
    hash_size: int
    elements: int


def message_type(command: int) -> int:
    """The nlmsg_type of an ipset command."""
    return NFNL_SUBSYS_IPSET << 8 | command


def request(protocol: int, *attributes_: bytes) -> bytes:
    """The body of any ipset message: nfgenmsg, protocol version, attributes."""
    return b"".join((_GENMSG, attribute(ATTR_PROTOCOL, bytes((protocol,))), *attributes_))


def name_attribute(kind: int, name: str) -> bytes:
    """A set or type name. Raises ValueError where the kernel would cut it or refuse the whole message."""
    raw = name.encode()
    if not 0 < len(raw) <= _MAX_NAME or b"\0" in raw:
        raise ValueError(f"not a set name: {name!r} (1 to {_MAX_NAME} bytes, no NUL)")
    return attribute(kind, raw + b"\0")


def create_body(protocol: int, spec: SetSpec, revision: int) -> bytes:
    """The message that creates a set. Raises ValueError for a name or number that cannot be encoded."""
    data = b""
    for kind, value in ((_HASHSIZE, spec.hash_size), (_MAXELEM, spec.max_elements), (_TIMEOUT, spec.timeout)):
        if value is not None:
            data += _be32(kind, value)
    family = _ADDRESS_FAMILY[spec.family]
    if spec.type == "bitmap:port":
        family = socket.AF_UNSPEC
        first, last = spec.port_range or (0, 65535)
        data += _be16(_PORT, first) + _be16(_PORT_TO, last)
    return request(
        protocol,
        name_attribute(ATTR_SETNAME, spec.name),
        name_attribute(ATTR_TYPENAME, spec.type),
        attribute(ATTR_REVISION, bytes((revision,))),
        attribute(ATTR_FAMILY, bytes((family,))),
        attribute(ATTR_DATA | NLA_F_NESTED, data),
    )


def entry_data(entry: str | Entry) -> bytes:
    """The IPSET_ATTR_DATA attribute of one entry. Raises ValueError if it is not in the notation above."""
    text, timeout = (entry, None) if isinstance(entry, str) else (entry.text, entry.timeout)
    data = b""
    addresses = 0
    for part in text.split(","):
        if part.isascii() and part.isdigit():
            data += _be16(_PORT, int(part))
        elif match := _PROTOCOL_AND_PORT.fullmatch(part):
            data += _be16(_PORT, int(match[2])) + attribute(_PROTO | _NET, bytes((_PROTOCOL_NUMBERS[match[1]],)))
        elif addresses < 2:
            data += _address(part, *((_IP, _CIDR), (_IP2, _CIDR2))[addresses])
            addresses += 1
        else:
            raise ValueError(f"not an ipset entry: {text!r}")
    if timeout is not None:
        data += _be32(_TIMEOUT, timeout)
    return attribute(ATTR_DATA | NLA_F_NESTED, data)


def _address(text: str, kind: int, prefix_kind: int) -> bytes:
    address, slash, prefix = text.partition("/")
    try:
        if ":" in address:
            packed = attribute(_IPV6 | _NET, socket.inet_pton(socket.AF_INET6, address))
        else:
            packed = attribute(_IPV4 | _NET, socket.inet_pton(socket.AF_INET, address))
    except (OSError, ValueError) as error:
        raise ValueError(f"not an address, protocol:port or port: {text!r}") from error
    packed = attribute(kind | NLA_F_NESTED, packed)
    if not slash:
        return packed
    if not (prefix.isascii() and prefix.isdigit() and int(prefix) <= 128):
        raise ValueError(f"not a prefix length: {text!r}")
    return packed + attribute(prefix_kind | _NET, bytes((int(prefix),)))


def _be32(kind: int, value: int) -> bytes:
    if not 0 <= value <= 0xFFFFFFFF:
        raise ValueError(f"does not fit 32 bits: {value}")
    return struct.pack("=HH", 8, kind | _NET) + value.to_bytes(4, "big")


def _be16(kind: int, value: int) -> bytes:
    if not 0 <= value <= 0xFFFF:
        raise ValueError(f"not a port: {value}")
    return attribute(kind | _NET, value.to_bytes(2, "big"))


def values_of(data: bytes, start: int, end: int) -> dict[int, bytes]:
    """The attributes in data[start:end] by kind."""
    return {kind: data[first:last] for kind, first, last in attributes(data, start, end)}


def decode_name(value: bytes) -> str:
    """A name attribute's text."""
    return value.rstrip(b"\0").decode(errors="replace")


def decode_listing(message: bytes) -> SetContents:
    """One message of a listing; a large set comes in several, of which only the first has the settings."""
    top = values_of(message, 4, len(message))
    header = values_of(top.get(ATTR_DATA, b""), 0, len(top.get(ATTR_DATA, b"")))
    spec = SetSpec(
        name=decode_name(top[ATTR_SETNAME]),
        type=decode_name(top.get(ATTR_TYPENAME, b"")),
        family=6 if top.get(ATTR_FAMILY) == bytes((socket.AF_INET6,)) else 4,
        timeout=_number(header.get(_TIMEOUT)),
        hash_size=_number(header.get(_HASHSIZE)),
        max_elements=_number(header.get(_MAXELEM)),
    )
    first, last = _number(header.get(_PORT)), _number(header.get(_PORT_TO))
    if first is not None and last is not None:
        spec = replace(spec, port_range=(first, last))
    adt = top.get(ATTR_ADT, b"")
    entries = tuple(_decode_entry(adt, start, end) for _, start, end in attributes(adt, 0, len(adt)))
    return SetContents(
        spec,
        _number(header.get(_REFERENCES)) or 0,
        _number(header.get(_MEMSIZE)) or 0,
        entries,
        masked=_NETMASK in header or _BITMASK in header,
    )


def decode_size(message: bytes) -> SetSize:
    """One message of a listing of headers."""
    top = values_of(message, 4, len(message))
    header = values_of(top.get(ATTR_DATA, b""), 0, len(top.get(ATTR_DATA, b"")))
    return SetSize(decode_name(top[ATTR_SETNAME]), _number(header.get(_HASHSIZE)) or 0, _number(header.get(_ELEMENTS)) or 0)


def _decode_entry(data: bytes, start: int, end: int) -> Entry:
    values = values_of(data, start, end)
    parts = []
    if _IP in values:
        parts.append(_decode_address(values[_IP], values.get(_CIDR)))
    if _PORT in values:
        port = int.from_bytes(values[_PORT], "big")
        number = values[_PROTO][0] if _PROTO in values else None
        parts.append(str(port) if number is None else f"{_PROTOCOL_NAMES.get(number, number)}:{port}")
    if _IP2 in values:
        parts.append(_decode_address(values[_IP2], values.get(_CIDR2)))
    nomatch = bool((_number(values.get(_ENTRY_FLAGS)) or 0) & _FLAG_NOMATCH)
    return Entry(",".join(parts), _number(values.get(_TIMEOUT)), nomatch)


def _decode_address(nested: bytes, prefix: bytes | None) -> str:
    family = socket.AF_INET if len(nested) == 8 else socket.AF_INET6
    text = address_text(nested[4:])
    whole = 32 if family == socket.AF_INET else 128
    return text if prefix is None or prefix[0] == whole else f"{text}/{prefix[0]}"


def _number(value: bytes | None) -> int | None:
    return None if value is None else int.from_bytes(value, "big")
