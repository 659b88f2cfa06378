"""SRC and DST as people write them: every form, several frontends, and errors that name the argument."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeproxy.cluster.names import Family, IPProtocol
from nodeproxy.trace.ends import Several, Target, TraceError, read_sender, read_targets
from tests.trace.cluster import endpoint, service, slice_of, view

TWO_PORTS = [
    {"name": "dns", "port": 53, "protocol": "UDP"},
    {"name": "dns-tcp", "port": 53, "protocol": "TCP", "nodePort": 30053},
    {"name": "metrics", "port": 9153, "protocol": "TCP"},
]
STATE = view(
    service(clusterIPs=["10.96.0.1", "fd00:96::1"]),
    service("dns", clusterIP="10.96.0.10", type="NodePort", ports=TWO_PORTS),
    service("headless", clusterIP="None"),
    slice_of(endpoint("10.1.0.1")),
    slice_of(endpoint("fd00::1"), name="web-6", family="IPv6"),
)


def found(text: str, protocol: IPProtocol | None = None, family: Family | None = None) -> list[str]:
    targets = read_targets(text, protocol, STATE, family)
    assert not isinstance(targets, Several)
    return [shown(target) for target in targets]


def shown(target: Target) -> str:
    return f"{target.address.text} {target.port}/{target.protocol}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.96.0.1:80", ["10.96.0.1 80/tcp"]),
        ("[fd00:96::1]:80", ["fd00:96::1 80/tcp"]),
        ("[FD00:96:0::1]:80", ["fd00:96::1 80/tcp"]),
        ("192.0.2.1:99", ["192.0.2.1 99/tcp"]),
        ("shop/web:80", ["10.96.0.1 80/tcp", "fd00:96::1 80/tcp"]),
        ("shop/web:http", ["10.96.0.1 80/tcp", "fd00:96::1 80/tcp"]),
        ("web.shop:80", ["10.96.0.1 80/tcp", "fd00:96::1 80/tcp"]),
        ("web.shop.svc.cluster.local:http", ["10.96.0.1 80/tcp", "fd00:96::1 80/tcp"]),
        ("shop/web", ["10.96.0.1 80/tcp", "fd00:96::1 80/tcp"]),
        ("shop/dns:metrics", ["10.96.0.10 9153/tcp"]),
        ("shop/dns:dns", ["10.96.0.10 53/udp"]),
        ("node:30053", ["192.168.0.2 30053/tcp"]),
        ("node:1", ["192.168.0.2 1/tcp"]),
    ],
)
def test_destinations(text: str, expected: list[str]) -> None:
    assert found(text) == expected


def test_protocol_and_family_narrow() -> None:
    assert found("shop/dns:53") == ["10.96.0.10 53/tcp", "10.96.0.10 53/udp"]
    assert found("shop/dns:53", IPProtocol.UDP) == ["10.96.0.10 53/udp"]
    assert found("shop/web:80", None, Family.IPV6) == ["fd00:96::1 80/tcp"]
    assert found("10.96.0.10:53") == ["10.96.0.10 53/tcp"]


def test_without_a_port_the_frontends_are_listed() -> None:
    several = read_targets("10.96.0.10", None, STATE, None)
    assert isinstance(several, Several)
    assert [(one.at, one.protocol) for one in several.frontends] == [
        ("10.96.0.10:53", "udp"),
        ("10.96.0.10:53", "tcp"),
        ("10.96.0.10:9153", "tcp"),
    ]
    for text in ("shop/dns", "node"):
        several = read_targets(text, None, STATE, None)
        assert isinstance(several, Several)
        assert any("30053" in one.at for one in several.frontends)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "names no address and no Service"),
        (":80", "names no address and no Service"),
        ("fd00::1:2:80:x", r"write an IPv6 address with a port as \[IPV6\]:PORT"),
        ("[fd00::1:80", r"is not \[IPV6\]:PORT"),
        ("[10.0.0.1]:80", r"is not \[IPV6\]:PORT"),
        ("10.96.0.1:0", "port '0' is not a number in 1-65535"),
        ("10.96.0.1:65536", "port '65536' is not a number"),
        ("10.96.0.1:http", "port 'http' is not a number"),
        ("10.96.0.1:\N{ARABIC-INDIC DIGIT ONE}", "is not a number"),
        ("10.96.0.256:80", "there is no Service|neither an address nor the name"),
        ("010.96.0.1:80", "neither an address nor the name|there is no Service"),
        ("192.0.2.1", "192.0.2.1 has no frontend; with a port it can be traced all the same"),
        ("shop/wep:80", "there is no Service shop/wep .*; there is shop/web"),
        ("shop/web:81", r"Service shop/web has no port '81'; it has 80/tcp \(http\)"),
        ("shop/headless:80", "Service shop/headless has no frontends: it is headless"),
        ("shop/Web:80", "neither an address nor the name of a Service"),
        ("a/b/c:80", "neither an address nor the name of a Service"),
        ("node:x", "port 'x' is not a number"),
        ("\x1b[31mred:80", r"'\\x1b\[31mred'"),
    ],
)
def test_bad_destinations(text: str, reason: str) -> None:
    with pytest.raises(TraceError, match=reason):
        read_targets(text, None, STATE, None)


@pytest.mark.parametrize(
    "text", ["", "x", "10.0.0", "10.0.0.1:80", "fe80::1%eth0", "::ffff:1.2.3.4", "0.0.0.0", "::", "a/b"]
)
def test_bad_sources(text: str) -> None:
    with pytest.raises(TraceError, match=r"^SRC: "):
        read_sender(text)


def test_families_must_agree() -> None:
    with pytest.raises(TraceError, match=r"SRC is IPv6, and DST 10\.96\.0\.1 is IPv4"):
        read_targets("10.96.0.1:80", None, STATE, Family.IPV6)
    with pytest.raises(TraceError, match="Service shop/dns has no address of SRC's family, IPv6"):
        read_targets("shop/dns:53", None, STATE, Family.IPV6)


@given(st.text(max_size=40) | st.text("0123456789abcdef.:[]/-%nodehtp", max_size=30))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    for read in (read_sender, lambda one: read_targets(one, None, STATE, None)):
        try:
            read(text)
        except TraceError as error:
            assert "\n" not in str(error)
            assert str(error).isprintable()
