"""Listing and watching addresses, against the real kernel."""

import asyncio
import errno
import json
import time
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nodeproxy.kernel import addresses
from nodeproxy.kernel.addresses import AddressNews, NodeAddresses, list_addresses, local_addresses
from nodeproxy.kernel.errors import RequestRefused
from nodeproxy.kernel.links import Links
from tests.kernel.conftest import NetworkNamespace

pytestmark = pytest.mark.kernel
SERVICES = "kube-ipvs0"


@pytest.fixture
def link(netns: NetworkNamespace) -> str:
    netns.command("sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0")  # duplicate detection would end some time, a change
    netns.command("ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth1")
    netns.command("ip", "link", "set", "veth0", "up")
    netns.command("ip", "link", "set", "veth1", "up")
    return "veth0"


def test_addresses_are_those_that_ip_lists(netns: NetworkNamespace, link: str) -> None:
    for address in ("192.0.2.1/24", "192.0.2.2/32", "2001:db8::1/64"):
        netns.command("ip", "address", "add", address, "dev", link)
    netns.command("ip", "address", "add", "198.51.100.1", "peer", "198.51.100.2/32", "dev", link)
    expected = {
        (info["local"], info["prefixlen"], link["ifindex"])
        for link in json.loads(netns.command("ip", "-json", "address"))
        for info in link["addr_info"]
    }
    found = netns.run(list_addresses)
    assert {(one.address, one.prefix_length, one.interface_index) for one in found} == expected
    assert {"127.0.0.1", "::1", "192.0.2.1", "192.0.2.2", "2001:db8::1", "198.51.100.1"} <= set(netns.run(local_addresses))
    assert all(one.link_local == one.address.startswith("fe80") for one in found)
    assert any(one.link_local for one in found)


def test_one_family_only(netns: NetworkNamespace, link: str) -> None:
    netns.command("ip", "address", "add", "192.0.2.1/24", "dev", link)
    assert netns.run(local_addresses, 4) == ["127.0.0.1", "192.0.2.1"]
    assert all(":" in address for address in netns.run(local_addresses, 6))
    assert all(one.family == 6 for one in netns.run(list_addresses, 6))


def test_interface_is_named(netns: NetworkNamespace, link: str) -> None:
    netns.command("ip", "address", "add", "192.0.2.1/24", "dev", link)

    def names() -> dict[str, str | None]:
        return {one.address: one.interface() for one in list_addresses(4)}

    assert netns.run(names) == {"127.0.0.1": "lo", "192.0.2.1": "veth0"}
    [address] = [one for one in netns.run(list_addresses, 4) if one.address == "192.0.2.1"]
    netns.command("ip", "link", "del", link)
    assert netns.run(address.interface) is None


def test_thousands_of_addresses(netns: NetworkNamespace, link: str) -> None:
    lines = "".join(f"address add 10.0.{i >> 8}.{i & 255}/32 dev {link}\n" for i in range(1, 3001))
    netns.command("ip", "-batch", "-", stdin=lines)
    assert len(netns.run(local_addresses, 4)) == 3001


def test_interfaces_are_left_out_by_name(netns: NetworkNamespace, link: str) -> None:
    netns.command("ip", "address", "add", "192.0.2.1/24", "dev", link)
    for address in ("192.0.2.1/32", "10.96.0.1/32"):
        netns.command("ip", "address", "add", address, "dev", "veth1")

    def found() -> list[str]:
        return local_addresses(4, excluding=("veth1", "absent"))

    assert netns.run(found) == ["127.0.0.1", "192.0.2.1"]  # one of them is on both


@pytest.fixture
def services(netns: NetworkNamespace, link: str) -> int:
    """Index of an interface that holds addresses which are not the node's; next to veth0, which has the node's."""
    netns.command("ip", "link", "add", SERVICES, "type", "veth", "peer", "name", "peer")
    return int(json.loads(netns.command("ip", "-json", "link", "show", SERVICES))[0]["ifindex"])


@pytest.fixture
def node(netns: NetworkNamespace, services: int) -> Iterator[NodeAddresses]:
    with netns.run(NodeAddresses, [SERVICES]) as node:
        node.poll()
        yield node


def known(node: NodeAddresses, expected: Iterable[str]) -> bool:
    """Whether the addresses on excluded interfaces are these: the kernel tells of IPv6 ones some milliseconds later."""
    for _ in range(100):
        if node.excluded == set(expected):
            return True
        time.sleep(0.05)
        assert not node.poll()
    return False


def texts(node: NodeAddresses) -> set[str]:
    return {one.address for one in node.current if not one.link_local}


def test_node_addresses_are_those_of_other_interfaces(netns: NetworkNamespace, link: str, services: int) -> None:
    netns.command("ip", "address", "add", "192.0.2.1/24", "dev", link)
    for address in ("10.96.0.1/32", "fd00::1/128"):
        netns.command("ip", "address", "add", address, "dev", SERVICES, "nodad")
    with netns.run(NodeAddresses, [SERVICES, "absent"]) as node:
        assert texts(node) == {"127.0.0.1", "::1", "192.0.2.1"}
        assert node.excluded == {"10.96.0.1", "fd00::1"}
        assert {one for one in node.current if one.address == "192.0.2.1"} == {
            one for one in netns.run(list_addresses) if one.address == "192.0.2.1"
        }
    with netns.run(NodeAddresses) as node:
        assert texts(node) == {"127.0.0.1", "::1", "192.0.2.1", "10.96.0.1", "fd00::1"}
        assert node.excluded == frozenset()


def test_news_are_about_the_node_and_about_what_vanished_from_excluded_interfaces(
    netns: NetworkNamespace, link: str, node: NodeAddresses
) -> None:
    def news(*commands: str) -> AddressNews:
        for command in commands:
            netns.command("ip", *command.split())
        return node.poll()

    assert not node.poll()
    assert news(f"address add 192.0.2.1/24 dev {link}") == AddressNews(node_changed=True)
    assert "192.0.2.1" in texts(node)
    assert not news(f"address add 10.96.0.1/32 dev {SERVICES}", f"address add fd00::1/128 dev {SERVICES} nodad")
    assert known(node, {"10.96.0.1", "fd00::1"})
    assert news(f"address del 10.96.0.1/32 dev {SERVICES}") == AddressNews(removed=frozenset({"10.96.0.1"}))
    assert not news(f"address add 10.96.0.1/32 dev {SERVICES}")
    back = (f"address del 10.96.0.1/32 dev {SERVICES}", f"address add 10.96.0.1/32 dev {SERVICES}")
    assert not news(*back)  # gone, and there again
    assert not news(f"address add 10.96.0.2/32 dev {SERVICES}", f"address del 10.96.0.2/32 dev {SERVICES}").node_changed
    assert news(f"address del 192.0.2.1/24 dev {link}") == AddressNews(node_changed=True)
    assert not news(f"link set {link} mtu 1400")  # tells of the interface, but not of an address
    assert "192.0.2.1" not in texts(node)


def test_deleted_interface_took_its_addresses_along(netns: NetworkNamespace, link: str, node: NodeAddresses) -> None:
    netns.command("ip", "address", "add", "192.0.2.1/24", "dev", link)
    for address in ("10.96.0.1/32", "10.96.0.2/32", "fd00::1/128"):
        netns.command("ip", "address", "add", address, "dev", SERVICES, "nodad")
    node.poll()
    assert known(node, {"10.96.0.1", "10.96.0.2", "fd00::1"})
    netns.command("ip", "link", "del", SERVICES)
    assert node.poll() == AddressNews(removed=frozenset({"10.96.0.1", "10.96.0.2", "fd00::1"}))
    netns.command("ip", "link", "del", link)
    assert node.poll().node_changed
    assert texts(node) == {"127.0.0.1", "::1"}
    # An interface of that name made anew is left out, too.
    netns.command("ip", "link", "add", SERVICES, "type", "veth", "peer", "name", "peer")
    netns.command("ip", "address", "add", "10.96.0.1/32", "dev", SERVICES)
    assert not node.poll()
    assert node.excluded == {"10.96.0.1"}


def test_interface_taken_from_a_bridge_is_not_deleted(netns: NetworkNamespace, link: str, node: NodeAddresses) -> None:
    """The bridge tells that by RTM_DELLINK, too."""
    netns.command("ip", "link", "add", "br0", "type", "bridge")
    netns.command("ip", "address", "add", "192.0.2.1/24", "dev", link)
    netns.command("ip", "link", "set", link, "master", "br0")
    node.poll()
    netns.command("ip", "link", "set", link, "nomaster")
    assert not node.poll()
    assert "192.0.2.1" in texts(node)


def test_renamed_interface_is_judged_by_its_new_name(netns: NetworkNamespace, services: int) -> None:
    netns.command("ip", "link", "set", SERVICES, "name", "other")
    netns.command("ip", "address", "add", "10.96.0.1/32", "dev", "other")
    with netns.run(NodeAddresses, [SERVICES]) as node:
        assert "10.96.0.1" in texts(node)
        netns.command("ip", "link", "set", "other", "name", SERVICES)
        assert node.poll() == AddressNews(node_changed=True)
        assert ("10.96.0.1" in texts(node), node.excluded) == (False, {"10.96.0.1"})
        netns.command("ip", "link", "set", SERVICES, "name", "other")
        assert node.poll() == AddressNews(node_changed=True, removed=frozenset({"10.96.0.1"}))
        assert ("10.96.0.1" in texts(node), node.excluded) == (True, frozenset())


def test_lost_notifications_are_made_up_for_by_listing(
    netns: NetworkNamespace, link: str, services: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "_BUFFER_BYTES", 4096)
    kept, gone = ([f"10.{net}.{i >> 8}.{i & 255}" for i in range(1, 1001)] for net in (96, 97))
    with netns.run(Links) as links:
        assert links.add_addresses(services, [*kept, *gone]) == []
        with netns.run(NodeAddresses, [SERVICES]) as node:
            assert node.excluded == {*kept, *gone}
            netns.command("ip", "address", "add", "192.0.2.1/24", "dev", link)
            assert links.remove_addresses(services, gone) == []
            news = node.poll()
            assert (news.node_changed, news.removed) == (True, frozenset(gone))
            assert node.excluded == frozenset(kept)
            assert "192.0.2.1" in texts(node)
            assert not node.poll()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["add", "remove", "poll"]),
            st.booleans(),
            st.lists(st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::1", "fd00::2"]), max_size=4),
        ),
        max_size=30,
    )
)
def test_following_comes_to_what_a_listing_shows(
    netns: NetworkNamespace, services: int, node: NodeAddresses, steps: list[tuple[str, bool, list[str]]]
) -> None:
    before = set(node.excluded)
    reported: set[str] = set()
    with netns.run(Links) as links:
        plain = links.link_index("veth0")
        assert plain is not None
        for what, on_services, some in steps:
            if what == "add":
                assert links.add_addresses(services if on_services else plain, some) == []
            elif what == "remove":
                assert links.remove_addresses(services if on_services else plain, some) == []
            else:
                reported |= node.poll().removed
        for _ in range(100):  # the kernel tells of IPv6 addresses some milliseconds later
            reported |= node.poll().removed
            everything = netns.run(list_addresses)
            elsewhere = {one for one in everything if one.interface_index != services}
            if node.current == elsewhere and node.excluded == links.addresses_of(services):
                break
            time.sleep(0.05)
        assert node.excluded == links.addresses_of(services)
    assert node.current == elsewhere
    assert before - node.excluded <= reported


def test_changes_wait_while_nothing_happens_that_matters(netns: NetworkNamespace, services: int) -> None:

    async def work() -> AddressNews:
        with NodeAddresses([SERVICES]) as node, Links() as links:
            changes = node.changes()
            waiting = asyncio.ensure_future(anext(changes))
            links.add_addresses(services, [f"10.96.{i >> 8}.{i & 255}" for i in range(1, 1001)])
            await asyncio.sleep(0.3)
            assert not waiting.done()
            assert len(node.excluded) == 1000  # noticed all the same
            links.remove_addresses(services, ["10.96.0.7"])
            news = await asyncio.wait_for(waiting, 5)
            await changes.aclose()
            return news

    assert netns.run_async(work) == AddressNews(removed=frozenset({"10.96.0.7"}))


def test_failed_listing_is_made_up_for_next_time(
    netns: NetworkNamespace, link: str, node: NodeAddresses, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RequestRefused("list addresses", errno.ENOMEM)

    netns.command("ip", "address", "add", "192.0.2.1/24", "dev", link)
    node._stale = True
    with monkeypatch.context() as patch:
        patch.setattr(addresses, "_list_addresses", fail)
        with pytest.raises(RequestRefused):
            node.poll()
    assert node.poll() == AddressNews(node_changed=True)
    assert "192.0.2.1" in texts(node)
