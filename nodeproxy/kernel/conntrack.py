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

from nodeproxy.kernel.address_text import address_text
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


class _Wanted(NamedTuple):
    """What a dump is after; None: any. `destination` is packed, in network order."""

    protocol: int
    destination: bytes | None
    destination_port: int | None


def dump(family: int, protocol: int, destination: str | None = None, destination_port: int | None = None) -> Iterator[Flow]:
    """All entries of an IP family (4, 6) and a protocol that has ports (TCP, UDP, SCTP), to this destination if given.

    The kernel filters from Linux 5.8 on (IPv6 addresses apart); before, everything is read and filtered here. Entries that
    come or go during the dump may or may not be in it. Raises FeatureMissing without conntrack, PermissionMissing,
    AnswerLost, RequestRefused.
    """
    address_family, _, destination_kind, _ = _FAMILIES[family]
    packed = None if destination is None else socket.inet_pton(address_family, destination)
    flags = _FILTER_PROTOCOL
    ports = attribute(_CTA_PROTO_NUM, bytes((protocol,)))
    addresses = b""
    # Of IPv6 the kernel (6.18 too) passes all but the address asked for: its comparison is inverted.
    if packed is not None and family == 4:
        flags |= _FILTER_DESTINATION
        addresses = attribute(_CTA_TUPLE_IP | NLA_F_NESTED, attribute(destination_kind, packed))
    if destination_port is not None:
        flags |= _FILTER_DESTINATION_PORT
        ports += attribute(_CTA_PROTO_DST_PORT, destination_port.to_bytes(2, "big"))
    asked = attribute(_CTA_TUPLE_ORIG | NLA_F_NESTED, addresses + attribute(_CTA_TUPLE_PROTO | NLA_F_NESTED, ports))
    asked += attribute(_CTA_FILTER | NLA_F_NESTED, attribute(_CTA_FILTER_ORIG_FLAGS, struct.pack("=I", flags)))
    return _read(family, asked, _Wanted(protocol, packed, destination_port))


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
            raise why_refused(error) from error
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


def _read(family: int, asked: bytes, wanted: _Wanted) -> Iterator[Flow]:
    """Decoded entries, filtered by the kernel if it can."""
    head = struct.pack("=BBH", _FAMILIES[family][0], 0, 0)  # nfgenmsg
    for body in (head + asked, head):
        started = False
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            try:
                messages = netlink.dump_in_place(_GET, body, NLM_F_DUMP, "read conntrack entries")
                for flow in _decode(messages, family, wanted):
                    started = True
                    yield flow
            except RequestRefused as error:
                if started or body == head:
                    raise why_refused(error) from error
                continue  # a kernel that knows of filters, but not of this one
        return


def why_refused(error: RequestRefused) -> RequestRefused | FeatureMissing:
    """The error to raise for a refused request: nfnetlink answers EINVAL or EOPNOTSUPP for a subsystem that is not there."""
    if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
        return FeatureMissing("conntrack over netlink", f"the module nf_conntrack_netlink is not there ({error})")
    return error


def _both_tuples(address_bytes: int) -> struct.Struct:
    """The two tuples as the kernel writes them, at the head of each entry. In network order, as their ports are.

    The original's nest header, the addresses, the headers that tell where the protocol number and the ports are, these; of
    the reply the nest header, addresses and ports. The rest is headers that follow from these.
    """
    addresses = f"8x{address_bytes}s4x{address_bytes}s4x"
    return struct.Struct(f">4s{addresses}4sB3x4sH2x4xH2x4s{addresses}8x4xH2x4xH2x")


def _decode(messages: Iterator[tuple[bytes, int, int]], family: int, wanted: _Wanted) -> Iterator[Flow]:
    """Unpack both tuples of each message at once where they have the usual layout, else look for each attribute."""
    _, _, _, address_bytes = _FAMILIES[family]
    both = _both_tuples(address_bytes)
    size = both.size
    unpack = both.unpack_from
    orig, reply = (struct.pack("=HH", size // 2, kind | NLA_F_NESTED) for kind in (_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY))
    number_is_one_byte, port_is_two_bytes = struct.pack("=HH", 5, _CTA_PROTO_NUM), struct.pack("=HH", 6, _CTA_PROTO_SRC_PORT)
    zone_attribute = struct.Struct("=4sH").unpack_from  # next after the tuples, unless it is the default zone
    zone_header = struct.pack("=HH", 6, _CTA_ZONE)
    texts = _AddressTexts()
    new = tuple.__new__
    for data, start, end in messages:
        at = start + 4  # nfgenmsg
        if end - at < size:
            yield from _decode_slowly(data, at, end, family, wanted)
            continue
        (
            orig_header, source, destination, number_header, protocol, port_header, source_port, destination_port,
            reply_header, reply_source, reply_destination, reply_source_port, reply_destination_port,
        ) = unpack(data, at)  # fmt: skip
        if (
            orig_header != orig
            or reply_header != reply
            or number_header != number_is_one_byte
            or port_header != port_is_two_bytes
        ):
            yield from _decode_slowly(data, at, end, family, wanted)
            continue
        if (
            protocol != wanted.protocol
            or (wanted.destination is not None and destination != wanted.destination)
            or (wanted.destination_port is not None and destination_port != wanted.destination_port)
        ):
            continue
        zone = 0
        if end - at - size >= 8:
            header, number = zone_attribute(data, at + size)
            if header == zone_header:
                zone = socket.ntohs(number)
        yield new(
            Flow,
            (
                protocol, texts[source], source_port, texts[destination], destination_port,
                texts[reply_source], reply_source_port, texts[reply_destination], reply_destination_port, zone,
            ),
        )  # fmt: skip


class _AddressTexts(dict[bytes, str]):
    """Texts of packed addresses, kept while there are few: most flows share their ends with others."""

    def __missing__(self, packed: bytes) -> str:
        if len(self) > 65536:
            self.clear()
        text = self[packed] = address_text(packed)
        return text


def _decode_slowly(data: bytes, start: int, end: int, family: int, wanted: _Wanted) -> Iterator[Flow]:
    """Decode attribute by attribute; nothing for an entry without ports (ICMP and the like)."""
    _, source_kind, destination_kind, _ = _FAMILIES[family]
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
            ends += [address_text(address), int.from_bytes(port, "big")]
    original = tuples[_CTA_TUPLE_ORIG]
    protocol = original[_CTA_TUPLE_PROTO, _CTA_PROTO_NUM][0]
    if (
        protocol == wanted.protocol
        and wanted.destination in (None, original[_CTA_TUPLE_IP, destination_kind])
        and wanted.destination_port in (None, ends[3])
    ):
        yield Flow._make((protocol, *ends, zone))
