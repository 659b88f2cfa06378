"""The dummy interface and its addresses, against the real kernel."""

import errno
import json
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nodeproxy.kernel.errors import FeatureMissing, PermissionMissing, RequestRefused
from nodeproxy.kernel.links import Links, NotADummy
from tests.kernel.conftest import NetworkNamespace
from tests.kernel.unprivileged import python_without_privilege

pytestmark = pytest.mark.kernel
DEVICE = "kube-ipvs0"


@pytest.fixture
def links(netns: NetworkNamespace) -> Links:
    return netns.run(Links)


@pytest.fixture
def dummy(netns: NetworkNamespace, links: Links) -> int:
    """Index of the dummy interface, made by us; the ip program is the judge of whether the kernel has dummies."""
    done = netns.command("ip", "link", "add", "probe", "type", "dummy", check=False, errors=True)
    netns.command("ip", "link", "del", "probe", check=False)
    if "Unknown device type" in done or "not supported" in done:
        pytest.skip("this kernel has no dummy interfaces")
    return links.ensure_dummy(DEVICE)


@pytest.fixture
def index(netns: NetworkNamespace, links: Links) -> int:
    """Index of an interface to hold addresses, of a kind that every kernel has."""
    netns.command("ip", "link", "add", DEVICE, "type", "veth", "peer", "name", "peer")
    found = links.link_index(DEVICE)
    assert found is not None
    return found


def shown(netns: NetworkNamespace, device: str = DEVICE) -> dict[str, object]:
    link: dict[str, object] = json.loads(netns.command("ip", "-json", "-details", "link", "show", device))[0]
    return link


def held(netns: NetworkNamespace) -> set[tuple[str, int]]:
    listed = json.loads(netns.command("ip", "-json", "address", "show", "dev", DEVICE))
    return {(info["local"], info["prefixlen"]) for link in listed for info in link.get("addr_info", ())}


def test_dummy_is_made_once_down_and_without_arp(netns: NetworkNamespace, links: Links, dummy: int) -> None:
    link = shown(netns)
    assert link["ifindex"] == dummy
    assert link["linkinfo"]["info_kind"] == "dummy"  # type: ignore[index]
    assert set(link["flags"]) == {"BROADCAST", "NOARP"}  # type: ignore[call-overload]
    links.add_addresses(dummy, ["10.96.0.1"])
    assert links.ensure_dummy(DEVICE) == dummy
    assert links.link_index(DEVICE) == dummy
    assert links.addresses_of(dummy) == {"10.96.0.1"}
    assert links.delete_link(DEVICE)
    assert not links.delete_link(DEVICE)
    assert links.link_index(DEVICE) is None


def test_kernel_without_dummies_is_told(netns: NetworkNamespace, links: Links) -> None:
    try:
        links.ensure_dummy(DEVICE)
    except FeatureMissing as error:
        assert "module dummy" in str(error)
        assert "Unknown device type" in netns.command("ip", "link", "add", "x", "type", "dummy", check=False, errors=True)


def test_interface_of_another_kind_is_left_alone(netns: NetworkNamespace, links: Links, index: int) -> None:
    with pytest.raises(NotADummy, match=f"{DEVICE} is there, but of kind veth"):
        links.ensure_dummy(DEVICE)
    assert shown(netns)["ifindex"] == index
    with pytest.raises(NotADummy, match="of kind device"):
        links.ensure_dummy("lo")
    with pytest.raises(RequestRefused) as refused:
        links.delete_link("lo")
    assert refused.value.errno == errno.EOPNOTSUPP


@pytest.mark.parametrize("name", ["", "x" * 16, "nul\0x"])
def test_what_cannot_be_a_name_raises(links: Links, name: str) -> None:
    for call in (links.ensure_dummy, links.delete_link, links.link_index):
        with pytest.raises(ValueError, match="not the name"):
            call(name)


def test_addresses_are_those_that_ip_lists(netns: NetworkNamespace, links: Links, index: int) -> None:
    netns.command("ip", "address", "add", "192.0.2.1/24", "dev", "lo")
    wanted = ["10.96.0.1", "10.96.0.2", "255.255.255.254", "fd00::1", "2001:db8::ffff"]
    assert links.add_addresses(index, wanted) == []
    assert held(netns) == {(text, 128 if ":" in text else 32) for text in wanted}
    assert links.addresses_of(index) == set(wanted)
    assert links.remove_addresses(index, ["10.96.0.2", "fd00::1"]) == []
    assert links.addresses_of(index) == {"10.96.0.1", "255.255.255.254", "2001:db8::ffff"}
    flags = json.loads(netns.command("ip", "-json", "-6", "address", "show", "dev", DEVICE))[0]["addr_info"][0]
    assert not flags.get("tentative")


def test_what_is_so_already_is_told_only_when_asked(links: Links, index: int) -> None:
    both = ["10.96.0.1", "fd00::1"]
    links.add_addresses(index, both)
    assert links.add_addresses(index, both) == []
    told = links.add_addresses(index, [*both, "10.96.0.2"], tell_existing=True)
    assert [(error.item, error.errno) for error in told] == [(text, errno.EEXIST) for text in both]
    absent = ["10.96.0.9", "fd00::9"]
    assert links.remove_addresses(index, absent) == []
    told = links.remove_addresses(index, [*both, *absent], tell_absent=True)
    assert [(error.item, error.errno) for error in told] == [(text, errno.EADDRNOTAVAIL) for text in absent]
    assert links.addresses_of(index) == {"10.96.0.2"}


def test_refused_addresses_are_named_and_all_others_added(links: Links, index: int) -> None:
    refused = links.add_addresses(index, ["10.96.0.1", "ff02::1", "", "10.96.0.1/24", "::", "fe80::1%lo", "10.96.0.2"])
    assert {error.item: error.errno for error in refused} == {
        "": errno.EINVAL,
        "10.96.0.1/24": errno.EINVAL,
        "fe80::1%lo": errno.EINVAL,
        "ff02::1": errno.EADDRNOTAVAIL,
        "::": errno.EADDRNOTAVAIL,
    }
    assert links.addresses_of(index) == {"10.96.0.1", "10.96.0.2"}


def test_absent_interface_holds_nothing_and_takes_nothing(links: Links) -> None:
    both = ["10.96.0.1", "fd00::1"]
    assert links.addresses_of(12345) == set()
    assert [error.errno for error in links.add_addresses(12345, both)] == [errno.ENODEV] * 2
    assert [error.errno for error in links.remove_addresses(12345, both)] == [errno.ENODEV] * 2


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.sets(st.sampled_from([f"10.96.0.{i}" for i in range(6)] + [f"fd00::{i}" for i in range(1, 5)])),
        ),
        max_size=8,
    )
)
def test_any_order_of_batches_ends_as_it_should(
    netns: NetworkNamespace, links: Links, index: int, steps: list[tuple[bool, set[str]]]
) -> None:
    expected = links.addresses_of(index)
    for adding, some in steps:
        assert (links.add_addresses if adding else links.remove_addresses)(index, some) == []
        expected = expected | some if adding else expected - some
        assert links.addresses_of(index) == expected
    assert {text for text, _ in held(netns)} == expected


def test_thousands_of_addresses(links: Links, index: int) -> None:
    many = [f"10.96.{i >> 8}.{i & 255}" for i in range(1, 3001)] + [f"fd00::{i:x}" for i in range(1, 1001)]
    assert links.add_addresses(index, many) == []
    assert links.addresses_of(index) == set(many)
    assert links.remove_addresses(index, many[:-1]) == []
    assert links.addresses_of(index) == {many[-1]}


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "10.96.0.1"), (socket.AF_INET6, "fd00::1")])
def test_addresses_of_the_down_dummy_are_local(
    netns: NetworkNamespace, links: Links, dummy: int, family: int, address: str
) -> None:
    links.add_addresses(dummy, [address])
    assert "UP" not in shown(netns)["flags"]  # type: ignore[operator]
    route = json.loads(netns.command("ip", "-json", "route", "get", address))[0]
    assert (route.get("type"), route["dev"]) == ("local", "lo")

    def converse() -> bytes:
        with (
            socket.create_server((address, 0), family=family) as server,
            socket.create_connection(server.getsockname()[:2], timeout=5) as client,
        ):
            client.sendall(b"hello")
            return server.accept()[0].recv(5)

    assert netns.run(converse) == b"hello"


def test_questions_need_no_privilege_but_changes_do(netns: NetworkNamespace, index: int) -> None:
    code = f"""
from nodeproxy.kernel.links import Links
links = Links()
print(links.link_index({DEVICE!r}), links.addresses_of({index}))
links.add_addresses({index}, ["10.96.0.1"])
"""
    output = python_without_privilege(netns, code)
    assert f"{index} set()" in output
    assert f"{PermissionMissing.__name__}: not permitted to add addresses to interface {index}" in output
