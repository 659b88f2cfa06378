"""Pseudonyms: equal for equal, prefixes kept, and what means something by itself stays alone where it is."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeproxy.cluster.addresses import is_local_only, is_special, parse_address
from nodeproxy.cluster.findings import is_label
from nodeproxy.snapshot.pseudonyms import Addresses, Names

SECRETS = st.binary(min_size=16, max_size=32)
ADDRESSES = st.one_of(
    st.ip_addresses(v=4), st.ip_addresses(v=6), st.ip_addresses(network="10.0.0.0/8"), st.ip_addresses(network="fd00::/8")
)


def common_bits(one: str, other: str) -> int:
    first, second = ipaddress.ip_address(one), ipaddress.ip_address(other)
    return first.max_prefixlen - (int(first) ^ int(second)).bit_length()


@given(
    SECRETS, st.lists(st.ip_addresses(v=4), min_size=2, max_size=6) | st.lists(st.ip_addresses(v=6), min_size=2, max_size=6)
)
def test_as_many_first_bits_are_shared_as_before(secret: bytes, addresses: list[object]) -> None:
    images = Addresses(secret)
    first = str(addresses[0])
    for other in map(str, addresses[1:]):
        assert common_bits(images.address(first), images.address(other)) == common_bits(first, other)


@given(SECRETS, ADDRESSES, st.integers(0, 128))
def test_the_image_of_a_cidr_holds_the_images_of_what_it_held(secret: bytes, address: object, length: int) -> None:
    images = Addresses(secret)
    text = str(address)
    network = ipaddress.ip_network((text, min(length, 128 if ":" in text else 32)), strict=False)
    image = ipaddress.ip_network(images.network(str(network)))
    assert image.prefixlen == network.prefixlen
    assert ipaddress.ip_address(images.address(text)) in image


@given(SECRETS, ADDRESSES)
def test_what_is_special_stays_and_nothing_else_becomes_so(secret: bytes, address: object) -> None:
    text = str(address)
    image = Addresses(secret).address(text)
    before, after = parse_address(text), parse_address(image)
    assert (before is None) == (after is None)  # IPv4-mapped IPv6 is no usable address
    if before is None or after is None:
        return
    assert is_special(*before) == is_special(*after)
    assert is_local_only(before) == is_local_only(after)
    if is_special(*before) or is_local_only(before):
        assert text == image


@pytest.mark.parametrize(
    "text", ["0.0.0.0", "127.0.0.1", "127.8.9.1", "169.254.20.10", "224.0.0.1", "255.255.255.255", "::", "::1", "fe80::1"]
)
def test_these_stay(text: str) -> None:
    assert Addresses(b"secret").address(text) == text


@pytest.mark.parametrize("text", ["0.0.0.0/0", "::/0", "127.0.0.0/8", "128.0.0.0/1", "fe80::/10"])
def test_these_ranges_stay(text: str) -> None:
    assert Addresses(b"secret").network(text) == text


def test_most_others_move_and_another_secret_moves_them_elsewhere() -> None:
    texts = [f"10.{number}.0.1" for number in range(200)] + [f"fd00::{number:x}" for number in range(1, 200)]
    one, other = Addresses(b"one"), Addresses(b"other")
    assert [one.address(text) for text in texts] == [Addresses(b"one").address(text) for text in texts]
    assert len({one.address(text) for text in texts}) == len(texts)
    assert sum(one.address(text) == other.address(text) for text in texts) < 50


def test_an_image_that_is_another_original_is_told() -> None:
    images = Addresses(b"secret")
    image = images.address("10.0.0.1")
    assert images.revealed() == []
    images.address(image)
    assert images.revealed() == [image]


def test_what_cannot_move_is_not_told() -> None:
    images = Addresses(b"secret")
    for text in ("127.0.0.1", "0.0.0.0"):
        images.address(text)
    for text in ("0.0.0.0/0", "8.0.0.0/5"):
        images.network(text)
    assert images.revealed() == []


@given(SECRETS, st.text(min_size=1))
def test_a_pseudonym_of_a_name_is_a_short_label_that_shows_nothing(secret: bytes, name: str) -> None:
    names = Names(secret)
    made = names.of("svc", name)
    assert is_label(made)
    assert len(names.of("p", name)) <= 15  # a port's name may have no more
    assert made == Names(secret).of("svc", name)
    assert made.removeprefix("svc-") != names.of("ns", name).removeprefix("ns-")
