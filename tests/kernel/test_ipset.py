"""ipsets over packed netlink, against the real kernel, the ipset program and pyroute2's encoder."""

import errno
import socket
import struct
import threading

import pytest

from nodeproxy.kernel import ipset_messages as packed
from nodeproxy.kernel.errors import ItemRefused
from nodeproxy.kernel.ipset import Entry, IPSets, SetSpec
from tests.kernel.conftest import NetworkNamespace

pytestmark = pytest.mark.kernel


@pytest.fixture
def sets(netns: NetworkNamespace) -> IPSets:
    return netns.run(IPSets)


def skip_without(netns: NetworkNamespace, set_type: str) -> None:
    """Skip where the kernel lacks a set type: the ipset program is the judge, not the code under test."""
    bounds = ("range", "0-1") if set_type.startswith("bitmap") else ()
    done = netns.command("ipset", "create", "probe", set_type, *bounds, check=False, errors=True)
    netns.command("ipset", "destroy", "probe", check=False)
    if "not supported" in done:
        pytest.skip(f"this kernel has no {set_type}")


def saved(netns: NetworkNamespace, name: str) -> list[str]:
    return sorted(netns.command("ipset", "save", name).splitlines())


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        (
            SetSpec("a", timeout=10800, hash_size=64, max_elements=1 << 20),
            "create a hash:ip family inet hashsize 64 maxelem 1048576 timeout 10800",
        ),
        (SetSpec("a", family=6, hash_size=128), "create a hash:ip family inet6 hashsize 128 maxelem 65536"),
        (SetSpec("a", "hash:ip,port"), "create a hash:ip,port family inet hashsize 1024 maxelem 65536"),
        (SetSpec("a", "hash:ip,port,ip", 6), "create a hash:ip,port,ip family inet6 hashsize 1024 maxelem 65536"),
        (SetSpec("a", "hash:ip,port,net"), "create a hash:ip,port,net family inet hashsize 1024 maxelem 65536"),
        (SetSpec("a", "hash:net", timeout=0), "create a hash:net family inet hashsize 1024 maxelem 65536 timeout 0"),
        (SetSpec("a", "hash:net,port"), "create a hash:net,port family inet hashsize 1024 maxelem 65536"),
        (SetSpec("a", "hash:net,net", 6), "create a hash:net,net family inet6 hashsize 1024 maxelem 65536"),
        (SetSpec("a", "hash:net,port,net"), "create a hash:net,port,net family inet hashsize 1024 maxelem 65536"),
        (SetSpec("a", "bitmap:port", port_range=(30000, 32767)), "create a bitmap:port range 30000-32767"),
        (SetSpec("x" * 31), f"create {'x' * 31} hash:ip family inet hashsize 1024 maxelem 65536"),
    ],
)
def test_created_set_is_what_the_ipset_program_sees(netns: NetworkNamespace, sets: IPSets, spec: SetSpec, line: str) -> None:
    skip_without(netns, spec.type)
    assert sets.create([spec]) == []
    created = netns.command("ipset", "save", spec.name).strip()
    words = created.split()
    kept = " ".join(word for i, word in enumerate(words) if not {"bucketsize", "initval"} & {word, words[i - 1]})
    assert kept == line
    listed = sets.contents(spec.name).spec
    assert (listed.name, listed.type, listed.timeout, listed.port_range) == (
        spec.name, spec.type, spec.timeout, spec.port_range,
    )  # fmt: skip
    assert spec.type == "bitmap:port" or listed.family == spec.family


@pytest.mark.parametrize(
    ("set_type", "family", "entries"),
    [
        ("hash:ip", 4, ["10.0.0.1", "192.0.2.255"]),
        ("hash:ip", 6, ["2001:db8::1", "fd00::"]),
        ("hash:ip,port", 4, ["10.0.0.1,tcp:80", "10.0.0.1,udp:80", "10.0.0.1,sctp:65535"]),
        ("hash:ip,port,ip", 4, ["10.0.0.1,tcp:80,10.0.0.1"]),
        ("hash:ip,port,ip", 6, ["fd00::1,udp:53,fd00::1"]),
        ("hash:ip,port,net", 4, ["10.0.0.1,tcp:80,10.0.0.0/8", "10.0.0.1,tcp:80,192.0.2.1"]),
        ("hash:net", 4, ["10.0.0.0/8", "192.0.2.1"]),
        ("hash:net,port", 6, ["fd00::/8,tcp:443"]),
        ("hash:net,net", 4, ["10.0.0.0/8,172.16.0.0/12"]),
        ("hash:net,port,net", 6, ["fd00::/64,tcp:1,fd01::/64"]),
        ("bitmap:port", 4, ["0", "30080"]),
    ],
)
def test_entries_read_back_by_us_and_by_the_ipset_program(
    netns: NetworkNamespace, sets: IPSets, set_type: str, family: int, entries: list[str]
) -> None:
    skip_without(netns, set_type)
    assert sets.create([SetSpec("s", set_type, family)]) == []
    assert sets.add("s", entries) == []
    assert sorted(entry.text for entry in sets.contents("s").entries) == sorted(entries)
    assert [line for line in saved(netns, "s") if line.startswith("add")] == sorted(f"add s {entry}" for entry in entries)
    assert sets.add("s", entries) == []  # again: no error
    assert sets.remove("s", entries) == []
    assert sets.remove("s", entries) == []
    assert sets.contents("s").entries == ()


def test_timeouts_of_entries(netns: NetworkNamespace, sets: IPSets) -> None:
    sets.create([SetSpec("s", timeout=1000), SetSpec("plain")])
    sets.add("s", ["10.0.0.1", Entry("10.0.0.2", 50), Entry("10.0.0.3", 0)])
    left = {entry.text: entry.timeout for entry in sets.contents("s").entries}
    assert left["10.0.0.3"] == 0
    assert 995 <= (left["10.0.0.1"] or 0) <= 1000
    assert 45 <= (left["10.0.0.2"] or 0) <= 50
    sets.add("s", [Entry("10.0.0.2", 500)])
    assert {entry.text: entry.timeout for entry in sets.contents("s").entries}["10.0.0.2"] in range(495, 501)
    sets.add("plain", ["10.0.0.1"])
    assert sets.contents("plain").entries == (Entry("10.0.0.1", None),)
    [refused] = sets.add("plain", [Entry("10.0.0.2", 5)])
    assert refused.message == "the set has no timeouts"


def test_existing_identical_set_is_kept_and_a_different_one_refused(sets: IPSets) -> None:
    spec = SetSpec("s", timeout=100, hash_size=64)
    assert sets.create([spec]) == []
    sets.add("s", ["10.0.0.1"])
    assert sets.create([spec]) == []
    assert [entry.text for entry in sets.contents("s").entries] == ["10.0.0.1"]
    for other in (
        SetSpec("s", timeout=101),
        SetSpec("s"),
        SetSpec("s", timeout=100, max_elements=9),
        SetSpec("s", "hash:net"),
    ):
        [refused] = sets.create([other])
        assert (refused.item, refused.errno) == ("s", errno.EEXIST)
        assert "another type or other settings" in str(refused)


def test_kernel_does_not_compare_the_family_of_an_existing_set(sets: IPSets) -> None:
    """Documented at `create`: a caller must not use one name for both families."""
    sets.create([SetSpec("s")])
    assert sets.create([SetSpec("s", family=6)]) == []
    assert sets.contents("s").spec.family == 4


def test_refused_items_are_named_and_all_others_done(sets: IPSets) -> None:
    sets.create([SetSpec("s"), SetSpec("small", max_elements=2)])
    wanted = ["10.0.0.1", "fd00::1", "10.0.0.2", "not an address", "10.0.0.3,tcp:99999", "10.0.0.4"]
    refused = sets.add("s", wanted)
    assert {error.item: error.errno for error in refused} == {
        "fd00::1": 4097,
        "not an address": errno.EINVAL,
        "10.0.0.3,tcp:99999": errno.EINVAL,
    }
    assert "IP family" in refused[-1].message
    assert {entry.text for entry in sets.contents("s").entries} == {"10.0.0.1", "10.0.0.2", "10.0.0.4"}
    [full] = sets.add("small", ["10.0.0.1", "10.0.0.2", "10.0.0.3"])
    assert (full.item, full.message) == ("10.0.0.3", "the set is full")
    assert [error.errno for error in sets.add("absent", ["10.0.0.1"])] == [errno.ENOENT]

    refused = sets.create([SetSpec("t1"), SetSpec("x" * 32), SetSpec("nul\0x"), SetSpec("t2", "hash:mac"), SetSpec("t3")])
    assert {error.item for error in refused} == {"x" * 32, "nul\0x", "t2"}
    assert sets.list_names("t") == ["t1", "t3"]


def test_more_refusals_than_one_datagram_holds_are_all_mapped(sets: IPSets) -> None:
    sets.create([SetSpec("s")])
    entries = ["fd00::1" if i % 3 else f"10.0.{i >> 8}.{i & 255}" for i in range(20_000)]
    refused = sets.add("s", entries)
    assert len(refused) == sum(":" in entry for entry in entries)
    assert all(error.item == "fd00::1" for error in refused)
    assert len(sets.contents("s").entries) == 20_000 - len(refused)


def test_set_in_use_cannot_be_destroyed(netns: NetworkNamespace, sets: IPSets) -> None:
    sets.create([SetSpec("used"), SetSpec("free")])
    netns.command("iptables-nft", "-A", "OUTPUT", "-m", "set", "--match-set", "used", "dst", "-j", "ACCEPT")
    assert sets.contents("used").references == 1
    [refused] = sets.destroy(["used", "free", "absent"])
    assert (refused.item, refused.errno) == ("used", errno.EBUSY)
    assert "in use" in str(refused)
    assert sets.list_names() == ["used"]


def test_flush_rename_and_swap(sets: IPSets) -> None:
    sets.create([SetSpec("a"), SetSpec("b"), SetSpec("n", "hash:net")])
    sets.add("a", ["10.0.0.1"])
    sets.swap("a", "b")
    assert [entry.text for entry in sets.contents("b").entries] == ["10.0.0.1"]
    sets.rename("b", "c")
    assert sets.list_names() == ["a", "c", "n"]
    assert [error.item for error in sets.flush(["c", "absent"])] == ["absent"]
    assert sets.contents("c").entries == ()
    for call, text in (
        (lambda: sets.rename("a", "c"), "a set of the new name exists"),
        (lambda: sets.swap("a", "n"), "differ in type"),
        (lambda: sets.contents("absent"), "ENOENT"),
    ):
        with pytest.raises(ItemRefused, match=text):
            call()


def test_large_set_is_listed_whole(sets: IPSets) -> None:
    sets.create([SetSpec("s", max_elements=1 << 20)])
    entries = {f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}" for i in range(30_000)}
    sets.add("s", entries)
    assert {entry.text for entry in sets.contents("s").entries} == entries


def test_exceptions_and_masks_of_others_sets_are_told(netns: NetworkNamespace, sets: IPSets) -> None:
    """Entries that are no members, and sets that compare addresses under a mask: a reader must not take them plainly."""
    skip_without(netns, "hash:net")
    netns.command("ipset", "create", "nets", "hash:net", "counters")
    netns.command("ipset", "add", "nets", "203.0.0.0/8")
    netns.command("ipset", "add", "nets", "203.0.113.2", "nomatch")
    netns.command("ipset", "create", "masked", "hash:ip", "netmask", "24")
    listed = sets.contents("nets")
    assert {entry.text: entry.nomatch for entry in listed.entries} == {"203.0.0.0/8": False, "203.0.113.2": True}
    assert not listed.masked
    assert sets.contents("masked").masked


def test_a_bitmask_of_others_sets_is_told(netns: NetworkNamespace, sets: IPSets) -> None:
    refused = netns.command("ipset", "create", "masked", "hash:ip", "bitmask", "255.255.0.255", check=False, errors=True)
    if refused:
        pytest.skip(f"this kernel or ipset has no bitmask: {refused}")
    assert sets.contents("masked").masked


def test_threads_take_turns(sets: IPSets) -> None:
    sets.create([SetSpec(f"s{i}") for i in range(4)])
    wanted = [f"10.0.{i >> 8}.{i & 255}" for i in range(3000)]
    failures: list[object] = []

    def fill(name: str) -> None:
        failures.extend(sets.add(name, wanted))
        if len(sets.contents(name).entries) != len(wanted):
            failures.append(name)

    threads = [threading.Thread(target=fill, args=(f"s{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_thousands_of_sets(netns: NetworkNamespace, sets: IPSets) -> None:
    specs = [SetSpec(f"KUBE-{i}", timeout=60, hash_size=64) for i in range(3000)]
    assert sets.create([*specs, SetSpec("other")]) == []
    assert sets.list_names("KUBE-") == sorted(spec.name for spec in specs)
    assert len(netns.command("ipset", "list", "-n").split()) == 3001
    assert sets.destroy(spec.name for spec in specs) == []
    assert sets.list_names() == ["other"]


def reference_bytes(command: int, attributes: list[object]) -> bytes:
    """What pyroute2's encoder makes of a message, without the netlink header."""
    from pyroute2.netlink.nfnetlink.ipset import ipset_msg

    message = ipset_msg()
    message["header"]["type"] = packed.message_type(command)
    message["nfgen_family"] = socket.AF_INET
    message["attrs"] = attributes
    message.encode()
    return bytes(message.data)[16:]


def test_creation_is_byte_for_byte_what_pyroute2_encodes() -> None:
    for spec in (
        SetSpec("KUBE-AFF-1", timeout=10800, hash_size=64, max_elements=1 << 20),
        SetSpec("six", family=6, hash_size=1024),
        SetSpec("n", "hash:net,net", timeout=0),
    ):
        data = [
            [name, value]
            for name, value in (
                ("IPSET_ATTR_HASHSIZE", spec.hash_size),
                ("IPSET_ATTR_MAXELEM", spec.max_elements),
                ("IPSET_ATTR_TIMEOUT", spec.timeout),
            )
            if value is not None
        ]
        expected = reference_bytes(
            packed.CMD_CREATE,
            [
                ["IPSET_ATTR_PROTOCOL", 7],
                ["IPSET_ATTR_SETNAME", spec.name],
                ["IPSET_ATTR_TYPENAME", spec.type],
                ["IPSET_ATTR_REVISION", 4],
                ["IPSET_ATTR_FAMILY", socket.AF_INET6 if spec.family == 6 else socket.AF_INET],
                ["IPSET_ATTR_DATA", {"attrs": data}],
            ],
        )
        assert packed.create_body(7, spec, 4).hex() == expected.hex()


def test_entries_are_byte_for_byte_what_pyroute2_encodes() -> None:
    def v4(text: str) -> dict[str, object]:
        return {"attrs": [["IPSET_ATTR_IPADDR_IPV4", text]]}

    def v6(text: str) -> dict[str, object]:
        return {"attrs": [["IPSET_ATTR_IPADDR_IPV6", text]]}

    cases: list[tuple[Entry, list[object]]] = [
        (Entry("10.1.2.3", 600), [["IPSET_ATTR_IP", v4("10.1.2.3")], ["IPSET_ATTR_TIMEOUT", 600]]),
        (Entry("fd00::1"), [["IPSET_ATTR_IP", v6("fd00::1")]]),
        (
            Entry("10.0.0.1,tcp:80,10.0.0.2"),
            [
                ["IPSET_ATTR_IP", v4("10.0.0.1")],
                ["IPSET_ATTR_PORT", 80],
                ["IPSET_ATTR_PROTO", 6],
                ["IPSET_ATTR_IP2", v4("10.0.0.2")],
            ],
        ),
        (
            Entry("10.0.0.0/8,fd00::/64"),
            [
                ["IPSET_ATTR_IP", v4("10.0.0.0")],
                ["IPSET_ATTR_CIDR", 8],
                ["IPSET_ATTR_IP2", v6("fd00::")],
                ["IPSET_ATTR_CIDR2", 64],
            ],
        ),
        (Entry("8080"), [["IPSET_ATTR_PORT", 8080]]),
    ]
    for entry, attributes in cases:
        expected = reference_bytes(
            packed.CMD_ADD,
            [["IPSET_ATTR_PROTOCOL", 7], ["IPSET_ATTR_SETNAME", "s"], ["IPSET_ATTR_DATA", {"attrs": attributes}]],
        )
        mine = packed.request(7, packed.name_attribute(packed.ATTR_SETNAME, "s"), packed.entry_data(entry))
        assert mine.hex() == expected.hex()


def test_numbers_are_in_network_order() -> None:
    data = packed.entry_data(Entry("1.2.3.4,udp:258", 0x01020304))
    assert struct.pack(">H", 258) in data
    assert bytes((1, 2, 3, 4)) in data
    assert data.endswith(bytes.fromhex("0800 0640 01020304"))  # length 8, TIMEOUT | NLA_F_NET_BYTEORDER, value


@pytest.mark.parametrize(
    "text", ["", "10.0.0.1/x", "10.0.0.1/129", "10.0.0.1\n", "tcp:70000", "1,2.3.4.5,6.7.8.9,8.8.8.8", "-1"]
)
def test_what_is_not_an_entry_raises(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        packed.entry_data(text)


def test_revision_is_the_older_of_kernel_and_encoder(netns: NetworkNamespace, sets: IPSets) -> None:
    assert sets.create([SetSpec("s")]) == []
    newest = max(
        int(line.split()[1]) for line in netns.command("ipset", "help").splitlines() if line.split()[:1] == ["hash:ip"]
    )
    used = netns.command("ipset", "list", "s", "-t")
    assert f"Revision: {min(newest, packed.KNOWN_REVISIONS['hash:ip'])}\n" in used
