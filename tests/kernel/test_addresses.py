"""Listing and watching addresses, against the real kernel."""

import asyncio
import json

import pytest

from nodeproxy.kernel.addresses import AddressMonitor, LocalAddress, list_addresses, local_addresses
from tests.kernel.conftest import NetworkNamespace

pytestmark = pytest.mark.kernel


@pytest.fixture
def link(netns: NetworkNamespace) -> str:
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


def test_monitor_tells_what_came_and_went(netns: NetworkNamespace, link: str) -> None:
    async def work() -> list[tuple[bool, LocalAddress]]:
        found: list[tuple[bool, LocalAddress]] = []
        with AddressMonitor() as monitor:
            changes = monitor.changes()
            for command in (("add", "192.0.2.1/24"), ("add", "2001:db8::1/64"), ("del", "192.0.2.1/24")):
                process = await asyncio.create_subprocess_exec("ip", "address", command[0], command[1], "dev", link)
                await process.wait()
                async with asyncio.timeout(5):
                    burst = await anext(changes)
                found += [
                    (change.added, change.address) for change in burst if change.address.address.startswith(("192", "2001"))
                ]
        return found

    found = netns.run_async(work)
    wanted = [(True, "192.0.2.1"), (True, "2001:db8::1"), (False, "192.0.2.1")]
    assert [(added, address.address) for added, address in found][: len(wanted)] == wanted
    assert [address.prefix_length for _, address in found][:2] == [24, 64]


def test_monitor_waits_while_nothing_changes(netns: NetworkNamespace) -> None:
    async def work() -> None:
        with AddressMonitor() as monitor:
            await asyncio.wait_for(anext(monitor.changes()), 0.3)

    with pytest.raises(TimeoutError):
        netns.run_async(work)


def test_lost_changes_are_told(netns: NetworkNamespace, link: str) -> None:
    lines = "".join(f"address add 10.0.{i >> 8}.{i & 255}/32 dev {link}\n" for i in range(1, 3001))

    async def work() -> int:
        with AddressMonitor() as monitor:
            process = await asyncio.create_subprocess_exec("ip", "-batch", "-", stdin=asyncio.subprocess.PIPE)
            await process.communicate(lines.encode())
            return len(await asyncio.wait_for(anext(monitor.changes()), 5))

    assert netns.run_async(work) == 0  # 3,000 at once, unread, are more than the buffer holds: list anew
