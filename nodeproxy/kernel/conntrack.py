"""Owns reading and deleting connection tracking entries, a hundred thousand at a time.

Entries are read by struct along the layout in which every kernel writes them, and attribute by attribute where one differs.
Ports and addresses are in network order on the wire; here ports are numbers and addresses text. All calls block:
run them in a thread where that matters.

Sources: include/uapi/linux/netfilter/nfnetlink_conntrack.h; net/netfilter/nf_internals.h (CTA_FILTER flags, Linux 5.8).
"""

import errno
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from nodeproxy.kernel.errors import FeatureMissing, ItemRefused, RequestRefused
from nodeproxy.kernel.netlink import (
    NETLINK_NETFILTER,
    NLA_F_NESTED,
    NLM_F_DUMP,
    NetlinkSocket,
    attribute,
    attributes,
)

TCP: Final = 6
UDP: Final = 17
SCTP: Final = 132

_SUBSYSTEM: Final = 1  # NFNL_SUBSYS_CTNETLINK
_GET: Final = _SUBSYSTEM << 8 | 1
_DELETE: Final = _SUBSYSTEM << 8 | 2
_GET_STATS: Final = _SUBSYSTEM << 8 | 5

_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY, _CTA_ZONE, _CTA_FILTER = 1, 2, 18, 25
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO = 1, 2
_CTA_PROTO_NUM, _CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT = 1, 2, 3
_CTA_FILTER_ORIG_FLAGS: Final = 1
_CTA_STATS_GLOBAL_ENTRIES: Final = 1
_FILTER_DESTINATION, _FILTER_PROTOCOL, _FILTER_DESTINATION_PORT = 1 << 1, 1 << 3, 1 << 5

_FAMILIES: Final = {4: (socket.AF_INET, 1, 2, 4), 6: (socket.AF_INET6, 3, 4, 16)}
"""IP family -> (address family, CTA_IP_*_SRC, CTA_IP_*_DST, bytes of an address)."""


class Flow(NamedTuple):
    """One entry. The first five fields are as the first packet came, the reply fields as answers come, so `reply_source` is
    who really answers (the endpoint after DNAT). `zone` is 0 unless a rule puts the flow into another."""

    protocol: int
    source: str
    source_port: int
    destination: str
    destination_port: int
    reply_source: str
    reply_source_port: int
    reply_destination: str
    reply_destination_port: int
    zone: int = 0


def dump(family: int, protocol: int, destination: str | None = None, destination_port: int | None = None) -> Iterator[Flow]:
    """All entries of an IP family (4, 6) and a protocol that has ports (TCP, UDP, SCTP), to this destination if given.

    The kernel filters from Linux 5.8 on; before, everything is read and filtered here. Entries that come or go during the
    dump may or may not be in it. Raises FeatureMissing without conntrack, PermissionMissing, AnswerLost, RequestRefused.
    """
    address_family, _, destination_kind, _ = _FAMILIES[family]
    head = struct.pack("=BBH", address_family, 0, 0)  # nfgenmsg
    flags = _FILTER_PROTOCOL
    parts = [attribute(_CTA_PROTO_NUM, bytes((protocol,)))]
    addresses = b""
    if destination is not None:
        flags |= _FILTER_DESTINATION
        packed = socket.inet_pton(address_family, destination)
        destination = socket.inet_ntop(address_family, packed)  # as the kernel's answer will read
        addresses = attribute(_CTA_TUPLE_IP | NLA_F_NESTED, attribute(destination_kind, packed))
    if destination_port is not None:
        flags |= _FILTER_DESTINATION_PORT
        parts.append(attribute(_CTA_PROTO_DST_PORT, destination_port.to_bytes(2, "big")))
    wanted = addresses + attribute(_CTA_TUPLE_PROTO | NLA_F_NESTED, b"".join(parts))
    asked = attribute(_CTA_TUPLE_ORIG | NLA_F_NESTED, wanted) + attribute(
        _CTA_FILTER | NLA_F_NESTED, attribute(_CTA_FILTER_ORIG_FLAGS, struct.pack("=I", flags))
    )
    for flow in _read(family, head, asked):
        if (
            flow.protocol == protocol
            and (destination is None or flow.destination == destination)
            and (destination_port is None or flow.destination_port == destination_port)
        ):
            yield flow


def delete(flows: Iterable[Flow]) -> int:
    """Delete entries; returns how many were there. One that is gone already is no error.

    Raises the first ItemRefused (its `item` is the flow) after all others were deleted; PermissionMissing, AnswerLost.
    """
    wanted = list(flows)
    if not wanted:
        return 0
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        refused = netlink.batch([(_DELETE, 0, delete_body(flow)) for flow in wanted], "delete conntrack entries")
    for index, (number, text) in sorted(refused.items()):
        if number != errno.ENOENT:
            raise ItemRefused("delete conntrack entry", wanted[index], number, text)
    return len(wanted) - len(refused)


def count() -> int:
    """How many entries the network namespace of this thread has. Raises FeatureMissing, PermissionMissing."""
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        try:
            answers = [*netlink.dump(_GET_STATS, bytes((0, 0, 0, 0)), 0, "count conntrack entries")]
        except RequestRefused as error:
            raise _missing(error) from error
    for answer in answers:
        for kind, start, end in attributes(answer, 4, len(answer)):
            if kind == _CTA_STATS_GLOBAL_ENTRIES:
                return int.from_bytes(answer[start:end], "big")
    raise RequestRefused("count conntrack entries", errno.EPROTO, "no number in the answer")


def delete_body(flow: Flow) -> bytes:
    """The message that deletes one entry: its original tuple, and the zone if it is not the default one."""
    family, source_kind, destination_kind, _ = _FAMILIES[6 if ":" in flow.source else 4]
    addresses = attribute(source_kind, socket.inet_pton(family, flow.source)) + attribute(
        destination_kind, socket.inet_pton(family, flow.destination)
    )
    ports = (
        attribute(_CTA_PROTO_NUM, bytes((flow.protocol,)))
        + attribute(_CTA_PROTO_SRC_PORT, flow.source_port.to_bytes(2, "big"))
        + attribute(_CTA_PROTO_DST_PORT, flow.destination_port.to_bytes(2, "big"))
    )
    body = attribute(
        _CTA_TUPLE_ORIG | NLA_F_NESTED,
        attribute(_CTA_TUPLE_IP | NLA_F_NESTED, addresses) + attribute(_CTA_TUPLE_PROTO | NLA_F_NESTED, ports),
    )
    zone = attribute(_CTA_ZONE, flow.zone.to_bytes(2, "big")) if flow.zone else b""
    return struct.pack("=BBH", family, 0, 0) + body + zone


def _read(family: int, head: bytes, asked: bytes) -> Iterator[Flow]:
    """Decoded entries, filtered by the kernel if it can."""
    for body in (head + asked, head):
        started = False
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            try:
                for flow in _decode(netlink.dump_in_place(_GET, body, NLM_F_DUMP, "read conntrack entries"), family):
                    started = True
                    yield flow
            except RequestRefused as error:
                if started or body == head:
                    raise _missing(error) from error
                continue  # a kernel that knows of filters, but not of this one
        return


def _missing(error: RequestRefused) -> RequestRefused | FeatureMissing:
    """nfnetlink answers EINVAL or EOPNOTSUPP for a subsystem that is not there."""
    if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
        return FeatureMissing("conntrack over netlink", f"the module nf_conntrack_netlink is not there ({error})")
    return error


def _tuple_layout(address_bytes: int) -> str:
    """A tuple nest as the kernel writes it: addresses, then protocol number and two ports, with all attribute headers."""
    address = f"2H{address_bytes}s"
    return f"2H 2H {address} {address} 2H 2HB3x 2HH2x 2HH2x"


def _decode(messages: Iterator[tuple[bytes, int, int]], family: int) -> Iterator[Flow]:
    """Unpack both tuples of each message at once where they have the usual layout, else look for each attribute."""
    address_family, _, _, address_bytes = _FAMILIES[family]
    # "=": no alignment, which would be the same; ports come in network order and are swapped below
    both = struct.Struct("=" + _tuple_layout(address_bytes) * 2)
    size = both.size
    half = size // 2
    unpack = both.unpack_from
    zone_attribute = struct.Struct("=3H").unpack_from  # next after the tuples, unless it is the default zone
    texts: dict[bytes, str] = {}
    ntohs = socket.ntohs
    inet_ntop = socket.inet_ntop
    new = tuple.__new__
    for data, start, end in messages:
        at = start + 4  # nfgenmsg
        if end - at < size:
            yield from _decode_slowly(data, at, end, family)
            continue
        (
            orig_length, orig_kind, _, _, _, _, source, _, _, destination, _, _, number_length, _, protocol,
            port_length, _, source_port, _, _, destination_port,
            reply_length, reply_kind, _, _, _, _, reply_source, _, _, reply_destination, _, _, _, _, _,
            _, _, reply_source_port, _, _, reply_destination_port,
        ) = unpack(data, at)  # fmt: skip
        if (
            orig_length != half
            or reply_length != half
            or (orig_kind | reply_kind) & 0x3FFF != _CTA_TUPLE_ORIG | _CTA_TUPLE_REPLY
            or number_length != 5
            or port_length != 6
        ):
            yield from _decode_slowly(data, at, end, family)
            continue
        zone = 0
        after = at + size
        if end - after >= 8:
            _, kind, number = zone_attribute(data, after)
            if kind == _CTA_ZONE:
                zone = ntohs(number)
        try:
            names = texts[source], texts[destination], texts[reply_source], texts[reply_destination]
        except KeyError:
            for raw in (source, destination, reply_source, reply_destination):
                texts[raw] = inet_ntop(address_family, raw)
            names = texts[source], texts[destination], texts[reply_source], texts[reply_destination]
            if len(texts) > 65536:  # clients without number: forget, rather than grow
                texts.clear()
        yield new(
            Flow,
            (
                protocol,
                names[0],
                ntohs(source_port),
                names[1],
                ntohs(destination_port),
                names[2],
                ntohs(reply_source_port),
                names[3],
                ntohs(reply_destination_port),
                zone,
            ),
        )


def _decode_slowly(data: bytes, start: int, end: int, family: int) -> Iterator[Flow]:
    """Decode attribute by attribute; nothing for an entry without ports (ICMP and the like)."""
    address_family, source_kind, destination_kind, _ = _FAMILIES[family]
    tuples: dict[int, dict[tuple[int, int], bytes]] = {}
    zone = 0
    for kind, first, last in attributes(data, start, end):
        if kind in (_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY):
            tuples[kind] = {
                (nest, inner): data[value:stop]
                for nest, nest_first, nest_last in attributes(data, first, last)
                if nest in (_CTA_TUPLE_IP, _CTA_TUPLE_PROTO)
                for inner, value, stop in attributes(data, nest_first, nest_last)
            }
        elif kind == _CTA_ZONE:
            zone = int.from_bytes(data[first:last], "big")
    ends: list[str | int] = []
    for kind in (_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY):
        for address_kind, port_kind in ((source_kind, _CTA_PROTO_SRC_PORT), (destination_kind, _CTA_PROTO_DST_PORT)):
            address = tuples.get(kind, {}).get((_CTA_TUPLE_IP, address_kind))
            port = tuples.get(kind, {}).get((_CTA_TUPLE_PROTO, port_kind))
            if address is None or port is None:
                return
            ends += [socket.inet_ntop(address_family, address), int.from_bytes(port, "big")]
    protocol = tuples[_CTA_TUPLE_ORIG][_CTA_TUPLE_PROTO, _CTA_PROTO_NUM][0]
    yield Flow._make((protocol, *ends, zone))
