"""Listing and deleting tables of nf_tables, against the real kernel."""

from __future__ import annotations

import subprocess

import pytest

from nodeproxy.kernel.errors import ItemRefused
from nodeproxy.kernel.nft_tables import NftTables
from tests.kernel.conftest import NetworkNamespace
from tests.kernel.unprivileged import python_without_privilege

pytestmark = pytest.mark.kernel

# As kube-proxy's: a base chain, a chain that a verdict map leads to, a set with entries, and rules that use them all.
_FULL = """
add table {family} {name}
add chain {family} {name} services
add chain {family} {name} prerouting {{ type nat hook prerouting priority -100; }}
add chain {family} {name} one
add map {family} {name} ports {{ type inet_service : verdict; }}
add element {family} {name} ports {{ 80 : goto one }}
add set {family} {name} numbers {{ type inet_service; }}
add element {family} {name} numbers {{ 1, 2, 3 }}
add rule {family} {name} prerouting jump services
add rule {family} {name} services tcp dport vmap @ports
add rule {family} {name} one tcp dport @numbers accept
"""


def make(netns: NetworkNamespace, family: str, name: str) -> None:
    netns.command("nft", "-f", "-", stdin=_FULL.format(family=family, name=name))


def test_tables_are_listed_by_family(netns: NetworkNamespace) -> None:
    make(netns, "ip", "kube-proxy")
    make(netns, "ip6", "six")
    netns.command("nft", "add", "table", "ip", "a")
    netns.command("nft", "add", "table", "inet", "both")

    def listed() -> list[list[str]]:
        with NftTables() as tables:
            return [tables.list_names(4), tables.list_names(6)]

    assert netns.run(listed) == [["a", "kube-proxy"], ["six"]]


def test_a_table_is_deleted_with_all_that_is_in_it_and_no_other(netns: NetworkNamespace) -> None:
    for family, name in (("ip", "kube-proxy"), ("ip", "mine"), ("ip6", "kube-proxy")):
        make(netns, family, name)
    before = netns.command("nft", "list", "table", "ip", "mine")

    def delete() -> list[bool]:
        with NftTables() as tables:
            return [tables.delete(4, "kube-proxy"), tables.delete(4, "kube-proxy"), tables.delete(6, "kube-proxy")]

    assert netns.run(delete) == [True, False, True]
    assert netns.command("nft", "list", "tables").split("\n") == ["table ip mine", ""]
    assert netns.command("nft", "list", "table", "ip", "mine") == before


def test_a_table_that_a_process_owns_is_refused_by_name(netns: NetworkNamespace) -> None:
    command = ["ip", "netns", "exec", netns.name, "nft", "-i"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdin and owner.stdout
        owner.stdin.write("add table ip held { flags owner; }\nlist tables\n")
        owner.stdin.flush()
        while "table ip held" not in owner.stdout.readline():
            pass

        def delete() -> str:
            with NftTables() as tables, pytest.raises(ItemRefused) as refused:
                tables.delete(4, "held")
            return str(refused.value)

        assert netns.run(delete).startswith("delete nft table held: ")
        owner.terminate()


def test_many_deletions_with_one_object(netns: NetworkNamespace) -> None:
    def work() -> list[bool]:
        done = []
        with NftTables() as tables:
            for _ in range(5):
                subprocess.run(["nft", "add", "table", "ip", "again"], check=True)
                done += [tables.delete(4, "again"), tables.delete(4, "again")]
            assert tables.list_names(4) == []
        return done

    assert netns.run(work) == [True, False] * 5


@pytest.mark.parametrize("call", ["list_names(4)", "delete(4, 'kept')"])
def test_without_privilege_it_says_what_is_needed(netns: NetworkNamespace, call: str) -> None:
    netns.command("nft", "add", "table", "ip", "kept")
    code = f"from nodeproxy.kernel.nft_tables import NftTables; print(NftTables().{call})"
    said = python_without_privilege(netns, code)
    assert "PermissionMissing" in said
    assert "CAP_NET_ADMIN" in said
    assert netns.command("nft", "list", "tables") == "table ip kept\n"


def test_the_thread_of_the_object_decides_on_the_namespace(netns: NetworkNamespace) -> None:
    """Not that of the call: the sockets stay where they were made."""
    netns.command("nft", "add", "table", "ip", "there")
    tables = netns.run(NftTables)
    with tables:
        assert tables.list_names(4) == ["there"]
        assert tables.delete(4, "there")
    assert netns.command("nft", "list", "tables") == ""
