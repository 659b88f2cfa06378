"""Packed IPVS messages: byte for byte what pyroute2 encodes, and read back as they were."""

import socket
import struct
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeproxy.kernel import ipvs_messages as packed
from nodeproxy.kernel.ipvs import (
    AddRealServer,
    AddVirtualServer,
    DeleteRealServer,
    DeleteVirtualServer,
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

PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
COMMANDS = {
    AddVirtualServer: 1,
    EditVirtualServer: 2,
    DeleteVirtualServer: 3,
    AddRealServer: 5,
    EditRealServer: 6,
    DeleteRealServer: 7,
}

ports = st.integers(0, 0xFFFF)
texts = {family: st.ip_addresses(v=family).map(str) for family in (4, 6)}
prefixes = {4: st.integers(0, 31), 6: st.integers(1, 127)}
flags = st.integers(0, 0xFFFFFFFF).map(lambda number: Flag(number & ~3))


@st.composite
def virtual_servers(draw: st.DrawFn, family: int) -> VirtualServer:
    return VirtualServer(family, draw(st.sampled_from(sorted(PROTOCOLS))), draw(texts[family]), draw(ports))


@st.composite
def all_settings(draw: st.DrawFn, family: int) -> VirtualServerSettings:
    return VirtualServerSettings(
        draw(st.sampled_from(["rr", "wlc", "sh", "mh", "x" * 15])),
        draw(st.none() | st.integers(0, 0xFFFFFFFF)),
        draw(flags),
        draw(st.none() | prefixes[family]),
    )


@st.composite
def operations(draw: st.DrawFn) -> Operation:
    family = draw(st.sampled_from([4, 6]))
    marks = st.integers(1, 0xFFFFFFFF).map(lambda mark: FirewallMark(family, mark))
    server = draw(virtual_servers(family) | marks)
    real = RealServer(draw(texts[family]), draw(ports))
    kind = draw(st.sampled_from(sorted(COMMANDS, key=COMMANDS.__getitem__)))
    if kind in (AddVirtualServer, EditVirtualServer):
        return kind(server, draw(all_settings(family)))
    if kind is DeleteVirtualServer:
        return kind(server)
    if kind is DeleteRealServer:
        return kind(server, real)
    return kind(server, real, draw(st.integers(0, 0xFFFFFFFF)))


def reference_identity(server: VirtualServer | FirewallMark) -> list[tuple[str, Any]]:
    family = ("IPVS_SVC_ATTR_AF", FAMILIES[server.family])
    if isinstance(server, FirewallMark):
        return [family, ("IPVS_SVC_ATTR_FWMARK", server.mark)]
    return [
        family,
        ("IPVS_SVC_ATTR_PROTOCOL", PROTOCOLS[server.protocol]),
        ("IPVS_SVC_ATTR_ADDR", server.address),
        ("IPVS_SVC_ATTR_PORT", server.port),
    ]


def reference_settings(family: int, settings: VirtualServerSettings) -> list[tuple[str, Any]]:
    """pyroute2 takes the IPv6 prefix length for an IPv4 netmask, too: written as the address of the same four bytes."""
    prefix = settings.persistence_prefix if settings.persistence_prefix is not None else {4: 32, 6: 128}[family]
    mask = (~0 << (32 - prefix) & 0xFFFFFFFF).to_bytes(4, "big") if family == 4 else prefix.to_bytes(4, sys.byteorder)
    persistent = settings.persistence_seconds is not None
    return [
        ("IPVS_SVC_ATTR_SCHED_NAME", settings.scheduler),
        ("IPVS_SVC_ATTR_FLAGS", {"flags": int(settings.flags) | persistent, "mask": 0xFFFFFFFF}),
        ("IPVS_SVC_ATTR_TIMEOUT", settings.persistence_seconds or 0),
        ("IPVS_SVC_ATTR_NETMASK", socket.inet_ntop(socket.AF_INET, mask)),
    ]


def reference_message(command: int, attributes: list[tuple[str, Any]]) -> bytes:
    """What pyroute2's encoder makes of a message, without the netlink header."""
    from pyroute2.netlink.generic.ipvs import ipvsmsg

    message = ipvsmsg()
    message["cmd"], message["version"] = command, 1
    message["attrs"] = attributes
    message.encode()
    return bytes(message.data)[16:]


def reference(operation: Operation) -> bytes:
    family = operation.server.family
    service = reference_identity(operation.server)
    if isinstance(operation, AddVirtualServer | EditVirtualServer):
        service += reference_settings(family, operation.settings)
    attributes: list[tuple[str, Any]] = [("IPVS_CMD_ATTR_SERVICE", {"attrs": service})]
    if isinstance(operation, AddRealServer | EditRealServer | DeleteRealServer):
        where = [("IPVS_DEST_ATTR_ADDR", operation.real.address), ("IPVS_DEST_ATTR_PORT", operation.real.port)]
        how = [] if isinstance(operation, DeleteRealServer) else [
            ("IPVS_DEST_ATTR_FWD_METHOD", 0), ("IPVS_DEST_ATTR_WEIGHT", operation.weight),
            ("IPVS_DEST_ATTR_U_THRESH", 0), ("IPVS_DEST_ATTR_L_THRESH", 0),
        ]  # fmt: skip
        dest = [*where, *how, ("IPVS_DEST_ATTR_ADDR_FAMILY", FAMILIES[family])]
        attributes.append(("IPVS_CMD_ATTR_DEST", {"attrs": dest}))
    return reference_message(COMMANDS[type(operation)], attributes)


@given(st.lists(operations(), min_size=1, max_size=8))
def test_operations_are_byte_for_byte_what_pyroute2_encodes(batch: list[Operation]) -> None:
    encoder = packed.Encoder()  # which keeps what it packed before
    assert [encoder.body(operation).hex() for operation in batch] == [reference(operation).hex() for operation in batch]


SERVER = VirtualServer(4, "tcp", "10.0.0.1", 80)
REAL = RealServer("10.1.0.1", 8080)
RR = VirtualServerSettings()


@pytest.mark.parametrize(
    "operation",
    [
        DeleteVirtualServer(VirtualServer(4, "tcp", "10.0.0.256", 80)),
        DeleteVirtualServer(VirtualServer(4, "tcp", "fd00::1", 80)),
        DeleteVirtualServer(VirtualServer(6, "tcp", "10.0.0.1", 80)),
        DeleteVirtualServer(VirtualServer(6, "tcp", "fe80::1%eth0", 80)),
        DeleteVirtualServer(VirtualServer(4, "tcp", "10.0.0.1\0", 80)),
        DeleteVirtualServer(VirtualServer(5, "tcp", "10.0.0.1", 80)),
        DeleteVirtualServer(VirtualServer(4, "icmp", "10.0.0.1", 80)),
        DeleteVirtualServer(VirtualServer(4, "65536", "10.0.0.1", 80)),
        DeleteVirtualServer(VirtualServer(4, "tcp", "10.0.0.1", 65536)),
        DeleteVirtualServer(VirtualServer(4, "tcp", "10.0.0.1", -1)),
        DeleteVirtualServer(FirewallMark(4, 0)),
        DeleteVirtualServer(FirewallMark(4, 1 << 32)),
        AddVirtualServer(SERVER, VirtualServerSettings("")),
        AddVirtualServer(SERVER, VirtualServerSettings("x" * 16)),
        AddVirtualServer(SERVER, VirtualServerSettings("r\0r")),
        AddVirtualServer(SERVER, VirtualServerSettings(persistence_seconds=-1)),
        AddVirtualServer(SERVER, VirtualServerSettings(persistence_seconds=1 << 32)),
        AddVirtualServer(SERVER, VirtualServerSettings(persistence_prefix=33)),
        AddRealServer(SERVER, RealServer("fd00::1", 80)),
        AddRealServer(SERVER, RealServer("", 80)),
        AddRealServer(SERVER, RealServer("10.1.0.1", 1 << 16)),
        AddRealServer(SERVER, REAL, -1),
        EditRealServer(SERVER, REAL, 1 << 32),
        DeleteRealServer(SERVER, RealServer("10.1.0.1/32", 80)),
    ],
)
def test_what_cannot_be_encoded_raises(operation: Operation) -> None:
    with pytest.raises(ValueError, match="cannot be encoded"):
        packed.Encoder().body(operation)


def test_protocols_without_a_name_are_numbers() -> None:
    named = packed.Encoder().body(DeleteVirtualServer(SERVER))
    assert packed.Encoder().body(DeleteVirtualServer(VirtualServer(4, "6", "10.0.0.1", 80))) == named


def test_timeouts_are_byte_for_byte_what_the_kernel_reads() -> None:
    assert (
        packed.timeouts_request(900, 0, 300).hex(" ", 4) == "0c010000 08000400 84030000 08000500 00000000 08000600 2c010000"
    )
    assert packed.decode_timeouts(packed.timeouts_request(900, 120, 300)) == Timeouts(900, 120, 300)
    assert packed.decode_timeouts(packed.request(packed.CMD_SET_CONFIG)) == Timeouts(0, 0, 0)
    with pytest.raises(ValueError, match="out of range"):
        packed.timeouts_request(-1, 0, 0)


def statistics_attributes(numbers: Statistics) -> list[tuple[str, Any]]:
    counters = ("CONNS", "INPKTS", "OUTPKTS", "INBYTES", "OUTBYTES")
    values = (numbers.connections, numbers.in_packets, numbers.out_packets, numbers.in_bytes, numbers.out_bytes)
    rates = [(f"IPVS_STATS_ATTR_{name}", 0) for name in ("CPS", "INPPS", "OUTPPS", "INBPS", "OUTBPS")]
    return [*((f"IPVS_STATS_ATTR_{name}", value) for name, value in zip(counters, values, strict=True)), *rates]


def listed_service(
    server: VirtualServer, settings: VirtualServerSettings, numbers: Statistics, *, wide: bool = True, padded: bool = True
) -> bytes:
    """As the kernel lists a virtual server: the address always 16 bytes, hashed, all counters (before 4.1 32-bit only)."""
    low = {"attrs": statistics_attributes(Statistics(*(value & 0xFFFFFFFF for value in values_of(numbers))))}
    attributes = [*reference_identity(server), *reference_settings(server.family, settings)]
    attributes[5][1]["flags"] |= 2  # type: ignore[index]
    attributes.append(("IPVS_SVC_ATTR_STATS", low))
    if wide:
        attributes.append(("IPVS_SVC_ATTR_STATS64", {"attrs": statistics_attributes(numbers)}))
    message = reference_message(1, [("IPVS_CMD_ATTR_SERVICE", {"attrs": attributes})])
    if server.family == 6 or not padded:
        return message
    return with_16_bytes(message, 24)


def with_16_bytes(message: bytes, where: int) -> bytes:
    """The kernel lists an IPv4 address as 16 bytes: `where` its attribute begins, inside the message's first one."""
    whole, outer = struct.unpack_from("=HH", message, 4)
    _, kind = struct.unpack_from("=HH", message, where)
    address = message[where + 4 : where + 8] + bytes(12)
    return b"".join(
        (
            message[:4],
            struct.pack("=HH", whole + 12, outer),
            message[8:where],
            struct.pack("=HH", 20, kind),
            address,
            message[where + 8 :],
        )
    )


def values_of(numbers: Statistics) -> tuple[int, ...]:
    return (numbers.connections, numbers.in_packets, numbers.out_packets, numbers.in_bytes, numbers.out_bytes)


wide_numbers = st.integers(0, 0xFFFFFFFFFFFFFFFF)
all_statistics = st.builds(Statistics, wide_numbers, wide_numbers, wide_numbers, wide_numbers, wide_numbers)


@given(st.data(), st.sampled_from([4, 6]), all_statistics, st.booleans())
def test_listed_virtual_servers_are_read_back(data: st.DataObject, family: int, numbers: Statistics, padded: bool) -> None:
    server, settings = data.draw(virtual_servers(family)), data.draw(all_settings(family))
    message = listed_service(server, settings, numbers, padded=padded)
    around = b"before" + message + b"after"
    decoder = packed.Decoder()
    for _ in range(2):  # the second time with the settings that it kept
        assert decoder.virtual_server(around, 6, 6 + len(message)) == (server, settings)
    assert packed.decode_statistics(around, 6, 6 + len(message)) == numbers


def test_counters_of_old_kernels_are_read() -> None:
    numbers = Statistics(1, 2, 3, 4, 5)
    message = listed_service(SERVER, RR, numbers, wide=False)
    assert packed.decode_statistics(message, 0, len(message)) == numbers
    assert packed.Decoder().virtual_server(message, 0, len(message)) == (SERVER, RR)


def test_virtual_servers_by_mark_are_no_addresses() -> None:
    attributes = [*reference_identity(FirewallMark(4, 7)), *reference_settings(4, RR)]
    message = reference_message(1, [("IPVS_CMD_ATTR_SERVICE", {"attrs": attributes})])
    assert packed.Decoder().virtual_server(message, 0, len(message)) is None
    assert packed.decode_statistics(message, 0, len(message)) == Statistics()


@pytest.mark.parametrize("tunnels", [True, False])
@given(
    family=st.sampled_from([4, 6]),
    data=st.data(),
    numbers=st.tuples(*[st.integers(0, 0xFFFFFFFF)] * 4),
    method=st.integers(0, 3),
)
def test_listed_real_servers_are_read_back(
    tunnels: bool, family: int, data: st.DataObject, numbers: tuple[int, int, int, int], method: int
) -> None:
    """As the kernel lists them, from 5.3 on with attributes of tunnels."""
    real = RealServer(data.draw(texts[family]), data.draw(ports))
    weight, active, inactive, persistent = numbers
    tunnel = [("IPVS_DEST_ATTR_TUN_TYPE", 0), ("IPVS_DEST_ATTR_TUN_PORT", 0), ("IPVS_DEST_ATTR_TUN_FLAGS", 0)]
    attributes = [
        ("IPVS_DEST_ATTR_ADDR", real.address),
        ("IPVS_DEST_ATTR_PORT", real.port),
        ("IPVS_DEST_ATTR_FWD_METHOD", method),
        ("IPVS_DEST_ATTR_WEIGHT", weight),
        *(tunnel if tunnels else []),
        ("IPVS_DEST_ATTR_U_THRESH", 0),
        ("IPVS_DEST_ATTR_L_THRESH", 0),
        ("IPVS_DEST_ATTR_ACTIVE_CONNS", active),
        ("IPVS_DEST_ATTR_INACT_CONNS", inactive),
        ("IPVS_DEST_ATTR_PERSIST_CONNS", persistent),
        ("IPVS_DEST_ATTR_ADDR_FAMILY", FAMILIES[family]),
    ]
    message = reference_message(5, [("IPVS_CMD_ATTR_DEST", {"attrs": attributes})])
    if family == 4:
        message = with_16_bytes(message, 8)
    expected = RealServerState(real, weight, active, inactive, persistent, method == 0)
    assert packed.Decoder.real_server(message, 0, len(message)) == expected


def test_identities_are_cheap_keys_and_read_well() -> None:
    assert len({SERVER, VirtualServer(4, "tcp", "10.0.0.1", 80), VirtualServer(4, "udp", "10.0.0.1", 80)}) == 2
    assert str(SERVER) == "tcp 10.0.0.1:80"
    assert str(VirtualServer(6, "udp", "fd00::1", 53)) == "udp [fd00::1]:53"
    assert (str(REAL), str(FirewallMark(6, 7))) == ("10.1.0.1:8080", "IPv6 firewall mark 7")
