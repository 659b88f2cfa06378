"""Owns the packed generic-netlink messages of the kernel's IPVS: virtual and real servers to bytes, and back.

Everything is in host byte order but addresses and ports, which are in network order, as is the IPv4 netmask (for IPv6 the
netmask is a prefix length in host order). An IPv4 address is sent as 4 bytes and comes back as 16, of which the rest is 0.

Sources: include/uapi/linux/ip_vs.h, genetlink.h; net/netfilter/ipvs/ip_vs_ctl.c (ip_vs_genl_*).
"""

from __future__ import annotations

import socket
import struct
import sys
from typing import Final

from nodeproxy.kernel.address_text import address_text
from nodeproxy.kernel.ipvs_types import (
    AddRealServer,
    AddVirtualServer,
    DeleteRealServer,
    EditRealServer,
    EditVirtualServer,
    FirewallMark,
    Flag,
    Operation,
    RealServer,
    RealServerState,
    Statistics,
    Timeouts,
    VirtualServer,
    VirtualServerSettings,
)
from nodeproxy.kernel.netlink import attribute, attributes

FAMILY_NAME: Final = "IPVS"
CMD_NEW_SERVICE: Final = 1
CMD_SET_SERVICE: Final = 2
CMD_DEL_SERVICE: Final = 3
CMD_GET_SERVICE: Final = 4
CMD_NEW_DEST: Final = 5
CMD_SET_DEST: Final = 6
CMD_DEL_DEST: Final = 7
CMD_GET_DEST: Final = 8
CMD_SET_CONFIG: Final = 12
CMD_GET_CONFIG: Final = 13
CMD_FLUSH: Final = 17

_ATTR_SERVICE, _ATTR_DEST = 1, 2
ATTR_TIMEOUT_TCP: Final = 4
ATTR_TIMEOUT_TCP_FIN: Final = 5
ATTR_TIMEOUT_UDP: Final = 6
_SVC_AF, _SVC_PROTOCOL, _SVC_ADDR, _SVC_PORT, _SVC_FWMARK = 1, 2, 3, 4, 5
_SVC_SCHED_NAME, _SVC_FLAGS, _SVC_TIMEOUT, _SVC_NETMASK = 6, 7, 8, 9
_DEST_ADDR, _DEST_PORT, _DEST_FWD_METHOD, _DEST_WEIGHT, _DEST_U_THRESH, _DEST_L_THRESH = 1, 2, 3, 4, 5, 6
_DEST_ACTIVE, _DEST_INACTIVE, _DEST_PERSISTENT, _DEST_ADDR_FAMILY = 7, 8, 9, 11
_DEST_TUN_TYPE, _DEST_TUN_PORT, _DEST_TUN_FLAGS = 13, 14, 15
_STATS, _STATS64 = 10, 12  # of both a service and a destination
_STATS_CONNECTIONS, _STATS_OUT_BYTES = 1, 5  # and between them: packets in, packets out, bytes in

_VERSION: Final = 1
_GENL_HEADER: Final = struct.Struct("=BBH")  # command, version, reserved
GENL_HEADER_SIZE: Final = 4
_HEADER: Final = struct.Struct("=HH")
_F_PERSISTENT, _F_HASHED = 0x1, 0x2
_OWN_FLAGS: Final = _F_PERSISTENT | _F_HASHED  # told by other means, or set by the kernel itself
_MAX_SCHEDULER_BYTES: Final = 15  # IP_VS_SCHEDNAME_MAXLEN - 1
_ADDRESS_FAMILY: Final = {4: int(socket.AF_INET), 6: int(socket.AF_INET6)}
_FAMILY_OF: Final = {number: family for family, number in _ADDRESS_FAMILY.items()}
_PREFIX_LENGTH: Final = {4: 32, 6: 128}
_PROTOCOL_NUMBERS: Final = {"tcp": 6, "udp": 17, "sctp": 132}
_PROTOCOL_NAMES: Final = {number: name for name, number in _PROTOCOL_NUMBERS.items()}


class Encoder:
    """Packs the operations of one batch; what repeats (a virtual server with many real ones, settings) is packed once."""

    def __init__(self) -> None:
        self._identities: dict[VirtualServer | FirewallMark, bytes] = {}
        self._settings: dict[tuple[int, VirtualServerSettings], bytes] = {}
        self._heads: dict[int, dict[VirtualServer | FirewallMark, bytes]] = {
            command: {} for command in (CMD_NEW_DEST, CMD_SET_DEST, CMD_DEL_DEST)
        }

    def body(self, operation: Operation) -> bytes:
        """The message without its netlink header. Raises ValueError for a value that cannot be encoded."""
        try:
            if isinstance(operation, AddRealServer):
                return self._full_real(CMD_NEW_DEST, operation.server, operation.real, operation.weight)
            if isinstance(operation, DeleteRealServer):
                return self._delete_real(operation.server, operation.real)
            if isinstance(operation, EditRealServer):
                return self._full_real(CMD_SET_DEST, operation.server, operation.real, operation.weight)
            if isinstance(operation, AddVirtualServer):
                return self._full_virtual(CMD_NEW_SERVICE, operation.server, operation.settings)
            if isinstance(operation, EditVirtualServer):
                return self._full_virtual(CMD_SET_SERVICE, operation.server, operation.settings)
            return request(CMD_DEL_SERVICE) + attribute(_ATTR_SERVICE, self._identity(operation.server))
        except (OSError, OverflowError, KeyError, ValueError) as error:
            raise ValueError(f"cannot be encoded: {operation} ({error})") from error

    def _full_real(self, command: int, server: VirtualServer | FirewallMark, real: RealServer, weight: int) -> bytes:
        shape = _REAL_SHAPES[server.family]
        return b"".join(
            (
                self._heads[command].get(server) or self._head(command, server),
                shape.before_address,
                socket.inet_pton(shape.address_family, real.address),
                _PORT_HEADER,
                real.port.to_bytes(2, "big"),
                _AFTER_PORT,
                weight.to_bytes(4, sys.byteorder),
                shape.tail,
            )
        )

    def _delete_real(self, server: VirtualServer | FirewallMark, real: RealServer) -> bytes:
        shape = _REAL_SHAPES[server.family]
        return b"".join(
            (
                self._heads[CMD_DEL_DEST].get(server) or self._head(CMD_DEL_DEST, server),
                shape.before_address_alone,
                socket.inet_pton(shape.address_family, real.address),
                _PORT_HEADER,
                real.port.to_bytes(2, "big"),
                shape.family,
            )
        )

    def _head(self, command: int, server: VirtualServer | FirewallMark) -> bytes:
        """All that comes before the real server in one of its messages."""
        head = request(command) + attribute(_ATTR_SERVICE, self._identity(server))
        self._heads[command][server] = head
        return head

    def _identity(self, server: VirtualServer | FirewallMark) -> bytes:
        found = self._identities.get(server)
        if found is None:
            found = self._identities[server] = _identity(server)
        return found

    def _full_virtual(self, command: int, server: VirtualServer | FirewallMark, settings: VirtualServerSettings) -> bytes:
        packed = self._settings.get((server.family, settings))
        if packed is None:
            packed = self._settings[server.family, settings] = _settings(server.family, settings)
        return request(command) + attribute(_ATTR_SERVICE, self._identity(server) + packed)


class _RealShape:
    """The constant parts of a real server's attributes in one family."""

    def __init__(self, family: int) -> None:
        self.address_family = _ADDRESS_FAMILY[family]
        size = _PREFIX_LENGTH[family] // 8
        address_header = _HEADER.pack(4 + size, _DEST_ADDR)
        numbers = b"".join(_u32(kind, 0) for kind in (_DEST_U_THRESH, _DEST_L_THRESH))
        self.family = bytes(2) + _u16(_DEST_ADDR_FAMILY, self.address_family)  # after the port, which it pads
        self.tail = numbers + _u16(_DEST_ADDR_FAMILY, self.address_family)
        alone = 4 + len(address_header) + size + len(_PORT_HEADER) + 2 + len(self.family)
        self.before_address_alone = _HEADER.pack(alone, _ATTR_DEST) + address_header
        whole = 4 + len(address_header) + size + len(_PORT_HEADER) + 2 + len(_AFTER_PORT) + 4 + len(self.tail)
        self.before_address = _HEADER.pack(whole, _ATTR_DEST) + address_header


def _u16(kind: int, value: int) -> bytes:
    return struct.pack("=HHH2x", 6, kind, value)


def _u32(kind: int, value: int) -> bytes:
    return struct.pack("=HHI", 8, kind, value)


_PORT_HEADER: Final = _HEADER.pack(6, _DEST_PORT)
_AFTER_PORT: Final = bytes(2) + _u32(_DEST_FWD_METHOD, 0) + _HEADER.pack(8, _DEST_WEIGHT)  # method 0: masquerade
_REAL_SHAPES: Final = {family: _RealShape(family) for family in (4, 6)}


def _identity(server: VirtualServer | FirewallMark) -> bytes:
    """The attributes that say which virtual server."""
    number = _ADDRESS_FAMILY[server.family]
    if isinstance(server, FirewallMark):
        if not 0 < server.mark <= 0xFFFFFFFF:
            raise OverflowError(server.mark)  # the kernel takes 0 for no mark at all
        return _u16(_SVC_AF, number) + _u32(_SVC_FWMARK, server.mark)
    protocol = _PROTOCOL_NUMBERS.get(server.protocol) or int(server.protocol)
    if not 0 <= protocol <= 0xFFFF:
        raise OverflowError(protocol)
    return b"".join(
        (
            _u16(_SVC_AF, number),
            _u16(_SVC_PROTOCOL, protocol),
            attribute(_SVC_ADDR, socket.inet_pton(number, server.address)),
            attribute(_SVC_PORT, server.port.to_bytes(2, "big")),
        )
    )


def _settings(family: int, settings: VirtualServerSettings) -> bytes:
    name = settings.scheduler.encode()
    if not 0 < len(name) <= _MAX_SCHEDULER_BYTES or b"\0" in name:
        raise ValueError(f"not the name of a scheduler: {settings.scheduler!r} (1 to {_MAX_SCHEDULER_BYTES} bytes)")
    flags = int(settings.flags) & ~_OWN_FLAGS
    seconds = 0
    if settings.persistence_seconds is not None:
        flags |= _F_PERSISTENT
        seconds = settings.persistence_seconds
    whole = _PREFIX_LENGTH[family]
    prefix = whole if settings.persistence_prefix is None else settings.persistence_prefix
    if not (0 <= prefix <= whole and 0 <= seconds <= 0xFFFFFFFF and 0 <= flags <= 0xFFFFFFFF):
        raise ValueError(f"out of range: {settings}")
    netmask = (0xFFFFFFFF << (32 - prefix) & 0xFFFFFFFF).to_bytes(4, "big") if family == 4 else struct.pack("=I", prefix)
    return b"".join(
        (
            attribute(_SVC_SCHED_NAME, name + b"\0"),
            attribute(_SVC_FLAGS, struct.pack("=II", flags, 0xFFFFFFFF)),
            _u32(_SVC_TIMEOUT, seconds),
            attribute(_SVC_NETMASK, netmask),
        )
    )


def request(command: int) -> bytes:
    """The generic netlink header of a command."""
    return _GENL_HEADER.pack(command, _VERSION, 0)


def real_servers_request(server: VirtualServer | FirewallMark) -> bytes:
    """The dump request for the real servers of a virtual server. Raises ValueError."""
    try:
        return request(CMD_GET_DEST) + attribute(_ATTR_SERVICE, _identity(server))
    except (OSError, OverflowError, KeyError) as error:
        raise ValueError(f"cannot be encoded: {server}") from error


def timeouts_request(tcp: int, tcp_fin: int, udp: int) -> bytes:
    """The message that sets timeouts; 0 leaves one as it is. Raises ValueError for what does not fit 32 bits."""
    if not all(0 <= seconds <= 0xFFFFFFFF for seconds in (tcp, tcp_fin, udp)):
        raise ValueError(f"timeouts out of range: {tcp} {tcp_fin} {udp}")
    kinds = ((ATTR_TIMEOUT_TCP, tcp), (ATTR_TIMEOUT_TCP_FIN, tcp_fin), (ATTR_TIMEOUT_UDP, udp))
    return request(CMD_SET_CONFIG) + b"".join(_u32(kind, seconds) for kind, seconds in kinds)


def decode_timeouts(data: bytes) -> Timeouts:
    """The answer to CMD_GET_CONFIG. A kernel without TCP or UDP in its IPVS does not tell that timeout: 0."""
    values = _values(data, GENL_HEADER_SIZE, len(data))
    tcp, tcp_fin, udp = (_number(values.get(kind)) for kind in (ATTR_TIMEOUT_TCP, ATTR_TIMEOUT_TCP_FIN, ATTR_TIMEOUT_UDP))
    return Timeouts(tcp, tcp_fin, udp)


class Decoder:
    """Reads the messages of dumps; texts and settings that repeat are made once."""

    def __init__(self) -> None:
        self._settings: dict[tuple[int, bytes], VirtualServerSettings | None] = {}

    def virtual_server(self, data: bytes, start: int, end: int) -> tuple[VirtualServer, VirtualServerSettings] | None:
        """The virtual server in data[start:end] (from the generic netlink header on); None for one by firewall mark."""
        if end - start >= _SERVICE.size:
            af_header, af, proto_header, protocol, addr_header, packed, port_header, port, scheduler_size = (
                _SERVICE.unpack_from(data, start)
            )
            if (af_header, proto_header, addr_header, port_header) == _SERVICE_HEADERS:
                at = start + _SERVICE.size - 2  # from the scheduler's header to the netmask
                raw = data[at : at + (scheduler_size + 3 & ~3) + 28]
                key = (af, raw)
                settings = self._settings.get(key)
                if settings is None and key not in self._settings:
                    settings = self._settings[key] = _decode_settings(_values(raw, 0, len(raw)), af)
                if settings is not None:
                    family = _FAMILY_OF[af]
                    address = address_text(packed if family == 6 else packed[:4])
                    name = _PROTOCOL_NAMES.get(protocol) or str(protocol)
                    return VirtualServer(family, name, address, int.from_bytes(port, "big")), settings
        return _decode_service_slowly(data, start, end)

    @staticmethod
    def real_server(data: bytes, start: int, end: int) -> RealServerState:
        """The real server in data[start:end] (from the generic netlink header on)."""
        if end - start >= _DEST.size:
            (
                addr_header, packed, port_header, port, method_header, method, weight_header, weight, active_header, active,
                inactive, persistent, family_header, af,
            ) = _DEST.unpack_from(data, start)  # fmt: skip
            if (addr_header, port_header, method_header, weight_header, active_header, family_header) == _DEST_HEADERS:
                address = address_text(packed if af == socket.AF_INET6 else packed[:4])
                real = RealServer(address, int.from_bytes(port, "big"))
                return RealServerState(real, weight, active, inactive, persistent, method == 0)
        return _decode_dest_slowly(data, start, end)


# As every kernel since 5.3 writes them: headers to be checked, and values.
_SERVICE: Final = struct.Struct("=8x4sH2x4sH2x4s16s4s2s2xH")
_SERVICE_HEADERS: Final = (
    _HEADER.pack(6, _SVC_AF), _HEADER.pack(6, _SVC_PROTOCOL), _HEADER.pack(20, _SVC_ADDR), _HEADER.pack(6, _SVC_PORT),
)  # fmt: skip
_DEST: Final = struct.Struct("=8x4s16s4s2s2x4sI4sI24x16x4sI4xI4xI4sH2x")
_DEST_HEADERS: Final = (
    _HEADER.pack(20, _DEST_ADDR), _HEADER.pack(6, _DEST_PORT), _HEADER.pack(8, _DEST_FWD_METHOD),
    _HEADER.pack(8, _DEST_WEIGHT), _HEADER.pack(8, _DEST_ACTIVE), _HEADER.pack(6, _DEST_ADDR_FAMILY),
)  # fmt: skip


def _decode_service_slowly(data: bytes, start: int, end: int) -> tuple[VirtualServer, VirtualServerSettings] | None:
    values = _nested(data, start, end, _ATTR_SERVICE)
    af = _number(values.get(_SVC_AF))
    family = _FAMILY_OF.get(af)
    settings = _decode_settings(values, af)
    if family is None or _SVC_ADDR not in values or settings is None:
        return None
    protocol = _number(values.get(_SVC_PROTOCOL))
    address = address_text(values[_SVC_ADDR][: _PREFIX_LENGTH[family] // 8])
    port = int.from_bytes(values.get(_SVC_PORT, b""), "big")
    return VirtualServer(family, _PROTOCOL_NAMES.get(protocol) or str(protocol), address, port), settings


def _decode_settings(values: dict[int, bytes], af: int) -> VirtualServerSettings | None:
    """None if some attribute is not there."""
    family = _FAMILY_OF.get(af)
    if family is None or not {_SVC_SCHED_NAME, _SVC_FLAGS, _SVC_TIMEOUT, _SVC_NETMASK} <= values.keys():
        return None
    flags = _number(values[_SVC_FLAGS][:4])
    netmask = values[_SVC_NETMASK]
    prefix = int.from_bytes(netmask, "big").bit_count() if family == 4 else _number(netmask)
    return VirtualServerSettings(
        scheduler=values[_SVC_SCHED_NAME].rstrip(b"\0").decode(errors="replace"),
        persistence_seconds=_number(values[_SVC_TIMEOUT]) if flags & _F_PERSISTENT else None,
        flags=Flag(flags & ~_OWN_FLAGS),
        persistence_prefix=None if prefix == _PREFIX_LENGTH[family] else prefix,
    )


def _decode_dest_slowly(data: bytes, start: int, end: int) -> RealServerState:
    """As kernels before 5.3 write them (without tunnels), and before 3.18 (without the family: that of the virtual server,
    which is told from the address: only an IPv4 one leaves 12 bytes empty)."""
    values = _nested(data, start, end, _ATTR_DEST)
    packed = values.get(_DEST_ADDR, b"").ljust(16, b"\0")
    af = _number(values.get(_DEST_ADDR_FAMILY)) or (socket.AF_INET6 if any(packed[4:]) else socket.AF_INET)
    address = address_text(packed if af == socket.AF_INET6 else packed[:4])
    real = RealServer(address, int.from_bytes(values.get(_DEST_PORT, b""), "big"))
    kinds = (_DEST_WEIGHT, _DEST_ACTIVE, _DEST_INACTIVE, _DEST_PERSISTENT, _DEST_FWD_METHOD)
    weight, active, inactive, persistent, method = (_number(values.get(kind)) for kind in kinds)
    return RealServerState(real, weight, active, inactive, persistent, method == 0)


def decode_statistics(data: bytes, start: int, end: int) -> Statistics:
    """The counters of a listed virtual or real server: the 64-bit ones where the kernel (from 4.1 on) has them."""
    values = {kind: (first, last) for _, outer, stop in attributes(data, start + GENL_HEADER_SIZE, end)
              for kind, first, last in attributes(data, outer, stop)}  # fmt: skip
    where = values.get(_STATS64) or values.get(_STATS)
    if where is None:
        return Statistics()
    counters = _values(data, *where)
    return Statistics(*(_number(counters.get(kind)) for kind in range(_STATS_CONNECTIONS, _STATS_OUT_BYTES + 1)))


def _nested(data: bytes, start: int, end: int, wanted: int) -> dict[int, bytes]:
    """The attributes inside the one of kind `wanted` of a message."""
    for kind, first, last in attributes(data, start + GENL_HEADER_SIZE, end):
        if kind == wanted:
            return _values(data, first, last)
    return {}


def _values(data: bytes, start: int, end: int) -> dict[int, bytes]:
    return {kind: data[first:last] for kind, first, last in attributes(data, start, end)}


def _number(value: bytes | None) -> int:
    """A number in host byte order; 0 if it is not there."""
    return int.from_bytes(value, sys.byteorder) if value else 0
