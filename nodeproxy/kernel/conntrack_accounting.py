"""Owns reading how much went through connections that were sent on to another destination: packets and bytes of each.

Made for hundreds of thousands of entries, of which some matter: an entry is read by struct along the layout of the last one
of its kind, and passed over as soon as its destination is none of those asked for. The kernel counts only what belongs to
connections that began while the sysctl net.netfilter.nf_conntrack_acct was 1; older ones have no counters. Blocking.

Sources: include/uapi/linux/netfilter/nfnetlink_conntrack.h, nf_conntrack_common.h; net/netfilter/nf_conntrack_netlink.c.
"""

import socket
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from nodeproxy.kernel.conntrack import why_refused
from nodeproxy.kernel.errors import RequestRefused
from nodeproxy.kernel.netlink import NETLINK_NETFILTER, NLA_F_NESTED, NLM_F_DUMP, NetlinkSocket, attribute, attributes

T = TypeVar("T")

Destinations = Mapping[bytes, Mapping[int, T]]
"""What is asked for: packed address -> `destination_number` -> what the caller knows the destination by."""

Account = tuple[T, int, bytes]
"""One connection: what its destination is known by; a number that stays the same as long as the connection lives, and that
others do not have (64 bits, another one in the next process); its counters for `unpack_counters`, equal bytes if equal."""

_GET: Final = 1 << 8 | 1  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET
_TUPLE_ORIG, _TUPLE_REPLY, _STATUS, _COUNTERS_ORIG, _COUNTERS_REPLY, _ID = 1, 2, 3, 9, 10, 12
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_PROTO_NUM, _PROTO_SOURCE_PORT, _PROTO_DESTINATION_PORT = 1, 2, 3
_COUNTERS_PACKETS, _COUNTERS_BYTES = 1, 2
_IPS_DST_NAT: Final = 1 << 5

_HEADER: Final = struct.Struct("=HH")
_COUNTERS: Final = struct.Struct(">8sQ4sQ")  # one direction: the nest and its two numbers
_NO_COUNTERS: Final = b""
_SOURCE_KIND: Final[dict[int, int]] = {socket.AF_INET: 1, socket.AF_INET6: 3}  # CTA_IP_V*_SRC; _DST is the next
_ADDRESS_BYTES: Final[dict[int, int]] = {socket.AF_INET: 4, socket.AF_INET6: 16}
_IPVS_HEADER_LINES: Final = 3


class Counters(NamedTuple):
    """Packets and bytes, IP headers included; `in` is from the client, `out` to it. Zeros where the kernel did not count."""

    in_packets: int
    in_bytes: int
    out_packets: int
    out_bytes: int


def destination_number(protocol: int, port: int) -> int:
    """Protocol and port as one number."""
    return protocol << 16 | port


def unpack_counters(packed: bytes) -> Counters:
    """The counters of an `Account`."""
    if not packed:
        return Counters(0, 0, 0, 0)
    _, in_packets, _, in_bytes = _COUNTERS.unpack_from(packed, 0)
    _, out_packets, _, out_bytes = _COUNTERS.unpack_from(packed, _COUNTERS.size)
    return Counters(in_packets, in_bytes, out_packets, out_bytes)


def accounts(destinations: Destinations[T]) -> Iterator[list[Account[T]]]:
    """All connections to the destinations that somebody else answers for (by DNAT, or by IPVS with net.ipv4.vs.conntrack),
    as the destination of the first packet was. A list for each datagram of the kernel, often empty.

    Newer kernels pass over all others by themselves, unless IPVS is used: its connections are not marked as sent on. Entries
    that come or go during the dump may be missing, or be in it twice. Raises FeatureMissing without conntrack,
    PermissionMissing, AnswerLost, RequestRefused.
    """
    body = bytes(4)  # nfgenmsg: any family
    if not _ipvs_has_servers():
        body += attribute(_STATUS, struct.pack(">I", _IPS_DST_NAT))
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        try:
            yield from _decode(netlink.dump_in_place(_GET, body, NLM_F_DUMP, "read conntrack counters"), destinations)
        except RequestRefused as error:
            raise why_refused(error) from error


def _ipvs_has_servers() -> bool:
    """Whether this thread's network namespace has virtual servers. Asked of /proc, which does not load the module."""
    try:
        with Path("/proc/thread-self/net/ip_vs").open("rb") as servers:
            return servers.read(4096).count(b"\n") > _IPVS_HEADER_LINES
    except OSError:
        return False


def _nest(size: int, kind: int) -> bytes:
    return _HEADER.pack(size, kind | NLA_F_NESTED)


_NUMBER_IS_ONE_BYTE: Final = _HEADER.pack(5, _PROTO_NUM)
_PORT_IS_TWO_BYTES: Final = _HEADER.pack(6, _PROTO_SOURCE_PORT)
_ID_HEADER: Final = _HEADER.pack(8, _ID)
_PACKETS_HEADER, _BYTES_HEADER = _HEADER.pack(12, _COUNTERS_PACKETS), _HEADER.pack(12, _COUNTERS_BYTES)
_ORIG_COUNTERS_HEADER: Final = _nest(_COUNTERS.size, _COUNTERS_ORIG) + _PACKETS_HEADER
_REPLY_COUNTERS_HEADER: Final = _nest(_COUNTERS.size, _COUNTERS_REPLY) + _PACKETS_HEADER


class _Layout(NamedTuple):
    """Where things are in messages of one family and length. `whole` has the fields that `_decode` names."""

    whole: struct.Struct
    orig: bytes
    reply: bytes
    counted: bool


def _decode(messages: Iterator[tuple[bytes, int, int]], destinations: Destinations[T]) -> Iterator[list[Account[T]]]:
    """Unpack each message by the layout of messages as long as it, else look for each attribute."""
    layouts: dict[int, _Layout | None] = {}
    found: list[Account[T]] = []
    datagram: bytes | None = None
    nothing: Mapping[int, T] = {}
    for data, start, end in messages:
        if data is not datagram:
            if datagram is not None:
                yield found
                found = []
            datagram = data
        kind = end - start << 8 | data[start]  # length and family
        try:
            layout = layouts[kind]
        except KeyError:
            layout = layouts[kind] = _learn(data, start, end)
        if layout is not None:
            (
                orig, source, destination, number_header, protocol, port_header, source_port, port,
                reply, answering, answering_port, identity_header, identity, counters,
            ) = layout.whole.unpack_from(data, start)  # fmt: skip
            if (
                orig == layout.orig
                and reply == layout.reply
                and number_header == _NUMBER_IS_ONE_BYTE
                and port_header == _PORT_IS_TWO_BYTES
                and identity_header == _ID_HEADER
                and (not layout.counted or counters.startswith(_ORIG_COUNTERS_HEADER))
            ):
                known = destinations.get(destination, nothing).get(protocol << 16 | port)
                if known is not None and (answering_port != port or answering != destination):
                    found.append((known, hash((identity, source, source_port, destination, port)), counters))
                continue
        slow = _decode_slowly(data, start, end, destinations)
        if slow is not None:
            found.append(slow)
    yield found


def _learn(data: bytes, start: int, end: int) -> _Layout | None:
    """The layout of a message; None where it is none that a struct can follow (ICMP, padded counters)."""
    size = _ADDRESS_BYTES.get(data[start])
    if size is None:
        return None
    addresses = f"8x{size}s4x{size}s4x"
    tuples = struct.Struct(f">4x4s{addresses}4sB3x4sH2x4xH2x4s8x{size}s4x{size}x12x4xH2x8x")
    places = {kind: (first, last) for kind, first, last in attributes(data, start + 4, end)}
    if end - start < tuples.size or _ID not in places:
        return None
    fields = tuples.unpack_from(data, start)
    if fields[3] != _NUMBER_IS_ONE_BYTE or fields[5] != _PORT_IS_TWO_BYTES:
        return None
    at = places[_ID][0] - 4 - start
    text = tuples.format + f"{at - tuples.size}x4s4s"
    counted = _COUNTERS_ORIG in places
    if counted:
        first, last = places[_COUNTERS_ORIG][0] - 4 - start, places[_COUNTERS_REPLY][1] - start
        if last - first != 2 * _COUNTERS.size or first < at + 8:
            return None
        text += f"{first - at - 8}x{last - first}s"
    else:
        text += "0s"
    whole_tuple = (tuples.size - 4) // 2
    return _Layout(struct.Struct(text), _nest(whole_tuple, _TUPLE_ORIG), _nest(whole_tuple, _TUPLE_REPLY), counted)


def _decode_slowly(data: bytes, start: int, end: int, destinations: Destinations[T]) -> Account[T] | None:
    """Decode attribute by attribute; None for an entry that is not asked for, or has no ports (ICMP and the like)."""
    source_kind = _SOURCE_KIND.get(data[start])
    tuples: dict[int, dict[tuple[int, int], bytes]] = {}
    counters: dict[tuple[int, int], bytes] = {}
    identity = b""
    for kind, first, last in attributes(data, start + 4, end):
        if kind in (_TUPLE_ORIG, _TUPLE_REPLY):
            tuples[kind] = {
                (nest, inner): data[value:stop]
                for nest, nest_first, nest_last in attributes(data, first, last)
                if nest in (_TUPLE_IP, _TUPLE_PROTO)
                for inner, value, stop in attributes(data, nest_first, nest_last)
            }
        elif kind in (_COUNTERS_ORIG, _COUNTERS_REPLY):
            counters |= {(kind, inner): data[value:stop] for inner, value, stop in attributes(data, first, last)}
        elif kind == _ID:
            identity = data[first:last]
    if source_kind is None or _TUPLE_ORIG not in tuples or _TUPLE_REPLY not in tuples:
        return None
    source, destination = (tuples[_TUPLE_ORIG].get((_TUPLE_IP, kind)) for kind in (source_kind, source_kind + 1))
    source_port, port = (
        tuples[_TUPLE_ORIG].get((_TUPLE_PROTO, kind)) for kind in (_PROTO_SOURCE_PORT, _PROTO_DESTINATION_PORT)
    )
    protocol = tuples[_TUPLE_ORIG].get((_TUPLE_PROTO, _PROTO_NUM))
    if destination is None or source is None or port is None or source_port is None or protocol is None:
        return None
    known = destinations.get(destination, {}).get(protocol[0] << 16 | int.from_bytes(port, "big"))
    reply = tuples[_TUPLE_REPLY]
    if known is None or (
        reply.get((_TUPLE_IP, source_kind)) == destination and reply.get((_TUPLE_PROTO, _PROTO_SOURCE_PORT)) == port
    ):
        return None
    key = (identity, source, int.from_bytes(source_port, "big"), destination, int.from_bytes(port, "big"))
    return known, hash(key), _as_usual(counters)


def _as_usual(counters: Mapping[tuple[int, int], bytes]) -> bytes:
    """Counters in the bytes that the usual layout has for them."""
    if not counters:
        return _NO_COUNTERS
    packed = b""
    for kind, header in ((_COUNTERS_ORIG, _ORIG_COUNTERS_HEADER), (_COUNTERS_REPLY, _REPLY_COUNTERS_HEADER)):
        packets, octets = (
            int.from_bytes(counters.get((kind, inner), b""), "big") for inner in (_COUNTERS_PACKETS, _COUNTERS_BYTES)
        )
        packed += _COUNTERS.pack(header, packets, _BYTES_HEADER, octets)
    return packed
