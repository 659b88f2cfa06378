"""Addresses and CIDRs: one canonical text for each, the one that `ipaddress` prints, and nothing else gets through."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeproxy.cluster.addresses import Address, Cidr, is_special, parse_address, parse_cidr
from nodeproxy.cluster.names import Family

V4, V6 = Family.IPV4, Family.IPV6


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("10.0.0.1", Address(V4, "10.0.0.1")),
        ("255.255.255.255", Address(V4, "255.255.255.255")),
        ("2001:DB8:0:0::1", Address(V6, "2001:db8::1")),
        ("fd00:0000:0000:0001::", Address(V6, "fd00:0:0:1::")),
        ("::1.2.3.4", Address(V6, "::102:304")),
        ("64:ff9b::1.2.3.4", Address(V6, "64:ff9b::102:304")),
        ("1:2:3:4:5:6:7:0", Address(V6, "1:2:3:4:5:6:7:0")),
    ],
)
def test_canonical(text: str, canonical: Address) -> None:
    assert parse_address(text) == canonical


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "10.0.0", "10.0.0.1.2", "10.0.0.256", "10.0.0.-1", "10.0.0.1 ", " 10.0.0.1", "10.0.0.1\n", "10.0.0.1/32"),
        *("010.0.0.1", "10.0.0.01", "0x0a.0.0.1", "167772161", "10.1", "10.0.0.\u0661", "10.0.0.1\0", "\ud800.0.0.1"),
        *(
            "::ffff:10.0.0.1",
            "::FFFF:a00:1",
            "fe80::1%eth0",
            "fe80::1%1",
            "[::1]",
            "::1::",
            "1:2:3:4:5:6:7",
            "12345::",
            "::g",
        ),
        *("::1\n", ":", "::\0", "fd00::1;", "example.com", "None"),
    ],
)
def test_refused(text: str) -> None:
    assert parse_address(text) is None


@given(st.ip_addresses(v=4) | st.ip_addresses(v=6))
def test_every_address_is_printed_as_ipaddress_prints_it(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        assert parse_address(str(address)) is None
        return
    expected = Address(Family(address.version), str(address))
    assert parse_address(str(address)) == expected
    assert parse_address(address.exploded) == expected
    assert parse_address(address.exploded.upper()) == expected


@given(st.text(alphabet="0123456789abcdef:.%/ \n'\"x", max_size=20))
def test_what_gets_through_is_an_address(text: str) -> None:
    parsed = parse_address(text)
    if parsed is not None:
        address = ipaddress.ip_address(text)
        assert (parsed.text, int(parsed.family)) == (str(address), address.version)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("203.0.113.77/24", Cidr(V4, "203.0.113.0/24")),
        (" 10.0.0.0/8\t\n", Cidr(V4, "10.0.0.0/8")),
        ("0.0.0.0/0", Cidr(V4, "0.0.0.0/0")),
        ("2001:DB8::1/64", Cidr(V6, "2001:db8::/64")),
        ("::1/128", Cidr(V6, "::1/128")),
    ],
)
def test_cidrs(text: str, canonical: Cidr) -> None:
    assert parse_cidr(text) == canonical


@pytest.mark.parametrize(
    "text",
    [
        *("10.0.0.0", "10.0.0.0/", "/8", "10.0.0.0/33", "fd00::/129", "10.0.0.0/-1", "10.0.0.0/255.0.0.0", "10.0.0.0/8/8"),
        *(
            "10.0.0.0 /8",
            "10.0.0.0/ 8",
            "10.0.0.0/\u0668",
            "::ffff:10.0.0.0/104",
            "fe80::%eth0/64",
            "010.0.0.0/8",
            "all",
            "",
        ),
    ],
)
def test_cidrs_refused(text: str) -> None:
    assert parse_cidr(text) is None


SPECIAL = [
    ipaddress.ip_network(cidr)
    for cidr in ("0.0.0.0/32", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/24", "::/128", "::1/128", "fe80::/10")
]


@given(
    st.ip_addresses(v=4) | st.ip_addresses(v=6) | st.sampled_from(SPECIAL).flatmap(lambda net: st.ip_addresses(network=net))
)
def test_special_addresses(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    multicast_of_link = address.version == 6 and address.packed[0] == 0xFF and address.packed[1] % 16 in {1, 2}
    expected = any(address in net for net in SPECIAL) or multicast_of_link
    assert is_special(Family(address.version), str(address)) == expected


@pytest.mark.parametrize("text", ["127.1.2.3", "169.254.9.9", "224.0.0.251", "ff02::fb", "ff11::1", "febf::1"])
def test_special(text: str) -> None:
    address = parse_address(text)
    assert address is not None
    assert is_special(*address)


@pytest.mark.parametrize("text", ["126.255.255.255", "224.0.1.1", "1.127.0.1", "ff05::1", "fec0::1", "fd00::1", "0.0.0.1"])
def test_not_special(text: str) -> None:
    address = parse_address(text)
    assert address is not None
    assert not is_special(*address)
