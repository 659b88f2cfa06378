"""Changing legacy tables without iptables: what comes out is what iptables makes of the same change, byte for byte."""

import asyncio
import os
import random
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from nodeproxy.kernel.errors import PatchImpossible
from nodeproxy.kernel.legacy.encoder import EncodedRule, RuleEncoder
from nodeproxy.kernel.legacy.patch import ChainChanges, LegacyPatcher
from nodeproxy.kernel.legacy.socket import ENTRIES_HEAD, LegacySocket, TableInfo
from nodeproxy.kernel.xtables import Variant, XTables
from tests.kernel.conftest import NetworkNamespace
from tests.kernel.unprivileged import python_without_privilege

pytestmark = pytest.mark.kernel
FAMILIES = pytest.mark.parametrize("family", [4, 6])

Chains = dict[str, list[str]]

# Others' chains sort before ours, between them, and (in other scenes) behind them.
FOREIGN = """\
:CNI-HOSTPORT-DNAT - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
-A PREROUTING -j CNI-HOSTPORT-DNAT
-A OUTPUT -j KUBE-SERVICES
-A CNI-HOSTPORT-DNAT -p tcp -m tcp --dport 1001 -j RETURN
-A CNI-HOSTPORT-DNAT
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
"""


@pytest.fixture
def twin() -> Iterator[NetworkNamespace]:
    """A second namespace, in which iptables does everything."""
    name = f"nodeproxy-kernel-{os.getpid()}-twin"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        yield NetworkNamespace(name)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


class Wanted:
    """Random chains, of the forms that a service proxy writes; every change keeps jumps valid."""

    def __init__(self, family: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.family = family
        self.names = [f"KUBE-{kind}-{number:016}" for kind in ("EXT", "SVC", "SVL") for number in range(20)]
        self.chains: Chains = {"KUBE-SERVICES": []}
        for name in self.names[10:50]:
            self.chains[name] = self.rules()
        self.chains["KUBE-SERVICES"] = self.leaves()

    def address(self) -> str:
        low = self.random.randrange(1, 250)
        return f"10.0.7.{low}" if self.family == 4 else f"fd00:7::{low:x}"

    def rules(self) -> list[str]:
        backends = [self.address() for _ in range(self.random.randrange(5))]
        host = "32" if self.family == 4 else "128"
        protocol = self.random.choice(["tcp", "udp", "sctp"])
        destination = f"-d {self.address()}/{host} -p {protocol} -m {protocol} --dport {self.random.randrange(1, 65536)}"
        found = [
            f"! -s {'10.0.0.0/8' if self.family == 4 else 'fd00::/8'} {destination} -j KUBE-MARK-MASQ",
            f"{self.random.choice(['-i', '! -i'])} {self.random.choice(['br0', 'veth+'])} -j KUBE-MARK-MASQ",
            "-m addrtype --src-type LOCAL -j KUBE-MARK-MASQ",
            f"-p {protocol} -m {protocol} --dport 30000:30063 -j RETURN",
        ]
        found = self.random.sample(found, self.random.randrange(len(found) + 1))
        for position, backend in enumerate(backends):
            left = len(backends) - position
            share = (
                ""
                if left == 1
                else (f"-m statistic --mode random --probability {round(0x80000000 / left) / 0x80000000:.11f} ")
            )
            to = f"{backend}:8080" if self.family == 4 else f"[{backend}]:8080"
            found.append(f"-p {protocol} {share}-j DNAT --to-destination {to}")
        return found

    def leaves(self) -> list[str]:
        host = "32" if self.family == 4 else "128"
        return [
            f'-d {self.address()}/{host} -p tcp -m comment --comment "ns/{name[-3:]}:http" -m tcp --dport 80 -j {name}'
            for name in sorted(self.chains)
            if name != "KUBE-SERVICES" and self.random.random() < 0.8
        ]

    def change(self) -> tuple[Chains, set[str]]:
        """Some chains with new rules, some of them new; and some that go."""
        changed: Chains = {}
        count = self.random.choice([1, 1, 1, 2, 4, 15])
        removed = set()
        for name in self.random.sample(self.names, count):
            if name in self.chains and self.random.random() < 0.3:
                del self.chains[name]
                removed.add(name)
            else:
                changed[name] = self.chains[name] = self.rules()
        if removed or self.random.random() < 0.5:
            changed["KUBE-SERVICES"] = self.chains["KUBE-SERVICES"] = self.leaves()
        return changed, removed


def is_ours(chain: str) -> bool:
    return chain.startswith(("KUBE-EXT-", "KUBE-SVC-", "KUBE-SVL-")) or chain == "KUBE-SERVICES"


def text_of(chains: Mapping[str, Sequence[str]], removed: Sequence[str] = (), foreign: str = "") -> str:
    heads = "".join(f":{name} - [0:0]\n" for name in (*chains, *removed))
    rules = "".join(f"-A {name} {rule}\n" for name, found in chains.items() for rule in found)
    return f"*nat\n{heads}{foreign}{rules}{''.join(f'-X {name}{chr(10)}' for name in removed)}COMMIT\n"


def restore(netns: NetworkNamespace, family: int, text: str, *options: str) -> None:
    netns.command(tool(family, "restore"), "--noflush", "-w", *options, stdin=text)


def tool(family: int, verb: str = "") -> str:
    return f"{'iptables' if family == 4 else 'ip6tables'}-legacy{'-' if verb else ''}{verb}"


def saved(netns: NetworkNamespace, family: int) -> list[str]:
    lines = netns.command(tool(family, "save"), "-t", "nat", "-c").splitlines()
    return [line for line in lines if not line.startswith("#")]


def raw(netns: NetworkNamespace, family: int) -> tuple[TableInfo, bytes]:
    def read() -> tuple[TableInfo, bytes]:
        with LegacySocket(family) as socket:
            info = socket.info("nat")
            assert info is not None
            return info, bytes(socket.entries("nat", info)[ENTRIES_HEAD:])

    return netns.run(read)


def changes(
    chains: Mapping[str, Sequence[str]], removed: Sequence[str] = (), examples: Chains | None = None
) -> ChainChanges:
    return ChainChanges(chains, set(removed), is_ours, (examples or {}).items)


@FAMILIES
@pytest.mark.parametrize("behind", [False, True], ids=["ours last", "others behind ours"])
@pytest.mark.parametrize("seed", [1, 2])
def test_random_changes_come_out_as_by_iptables(
    netns: NetworkNamespace, twin: NetworkNamespace, family: int, behind: bool, seed: int
) -> None:
    wanted = Wanted(family, seed)
    foreign = FOREIGN + (":cali-PREROUTING - [0:0]\n-A cali-PREROUTING -j CNI-HOSTPORT-DNAT\n" if behind else "")
    for namespace in (netns, twin):
        restore(namespace, family, text_of(wanted.chains, foreign=foreign))
    patcher = LegacyPatcher(family)
    patched = 0
    for _ in range(40):
        examples = dict(wanted.chains)
        chains, removed = wanted.change()
        text = text_of(chains, sorted(removed))
        restore(twin, family, text)
        try:
            netns.run(patcher.patch, "nat", changes(chains, sorted(removed), examples))
            patched += 1
        except PatchImpossible as why:
            assert "not seen from iptables yet" in str(why)
            restore(netns, family, text)
            patcher.forget()
        assert raw(netns, family) == raw(twin, family)
    assert saved(netns, family) == saved(twin, family)
    assert patched >= 35
    patcher.close()


@FAMILIES
def test_counters_stay_but_for_chains_that_change(netns: NetworkNamespace, family: int) -> None:
    wanted = Wanted(family, 5)
    text = text_of(wanted.chains, foreign=FOREIGN)
    number = iter(range(1, 10_000))
    counted = re.sub("^-A", lambda _: f"[{next(number)}:{next(number) * 60}] -A", text, flags=re.MULTILINE)
    restore(netns, family, counted, "--counters")
    before = saved(netns, family)
    patcher = LegacyPatcher(family)
    name = next(name for name, rules in wanted.chains.items() if name.startswith("KUBE-SVC") and rules)
    longer = {name: [*wanted.chains[name], wanted.chains[name][0]]}
    netns.run(patcher.patch, "nat", changes(longer, (), wanted.chains))
    after = saved(netns, family)
    assert [line for line in after if f"-A {name} " not in line] == [line for line in before if f"-A {name} " not in line]
    own = [line for line in after if f"-A {name} " in line]
    assert own == [f"[0:0] -A {name} {rule}" for rule in longer[name]]
    same = {name: [*longer[name][1:], longer[name][0]]}  # of the same size: made in place
    netns.run(patcher.patch, "nat", changes(same, (), wanted.chains))
    assert [line for line in saved(netns, family) if f"-A {name} " not in line] == [
        line for line in before if f"-A {name} " not in line
    ]
    patcher.close()


@pytest.mark.parametrize(
    "command",
    [
        "-R CNI-HOSTPORT-DNAT 1 -p tcp -m tcp --dport 2002 -j RETURN",
        "-R cali-PREROUTING 1 -s 192.0.2.7 -j RETURN",
        "-A CNI-HOSTPORT-DNAT -p tcp -m tcp --dport 2002 -j RETURN",
        "-I PREROUTING -s 192.0.2.7 -j RETURN",
        "-N KUBE-ROUTER",
    ],
)
def test_what_others_changed_meanwhile_stays(netns: NetworkNamespace, command: str) -> None:
    wanted = Wanted(4, 3)
    behind = ":cali-PREROUTING - [0:0]\n-A cali-PREROUTING -s 192.0.2.1 -j RETURN\n" if "cali" in command else ""
    restore(netns, 4, text_of(wanted.chains, foreign=FOREIGN + behind))
    patcher = LegacyPatcher(4)
    names = [name for name in wanted.chains if name.startswith("KUBE-SVC")]
    for name in names[:2]:
        netns.run(patcher.patch, "nat", changes({name: ["-j KUBE-MARK-MASQ"]}, (), wanted.chains))
    netns.command(tool(4), "-t", "nat", *command.split())
    theirs = [line for line in saved(netns, 4) if names[2] not in line]
    netns.run(patcher.patch, "nat", changes({names[2]: ["-j KUBE-MARK-MASQ"]}, (), wanted.chains))
    assert [line for line in saved(netns, 4) if names[2] not in line] == theirs
    assert f"[0:0] -A {names[2]} -j KUBE-MARK-MASQ" in saved(netns, 4)
    patcher.close()


def test_only_what_is_before_our_chains_is_read_again(netns: NetworkNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Wanted(4, 3)
    restore(netns, 4, text_of(wanted.chains, foreign=FOREIGN))
    whole: list[str] = []
    entries = LegacySocket.entries
    monkeypatch.setattr(LegacySocket, "entries", lambda self, table, info: whole.append(table) or entries(self, table, info))
    patcher = LegacyPatcher(4)
    name = next(name for name in wanted.chains if name.startswith("KUBE-SVC"))
    for address in ("10.0.7.1", "10.0.7.2", "10.0.7.3"):
        rule = f"-p tcp -j DNAT --to-destination {address}:8080"
        examples = wanted.chains
        netns.run(patcher.patch, "nat", changes({name: [rule]}, (), examples))
        assert f"[0:0] -A {name} {rule}" in saved(netns, 4)
    assert whole == ["nat"]
    patcher.close()


def test_a_change_by_somebody_without_the_lock_is_not_undone(
    netns: NetworkNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted = Wanted(4, 3)
    restore(netns, 4, text_of(wanted.chains, foreign=FOREIGN))
    replace = LegacySocket.replace

    def late(self: LegacySocket, *arguments: object) -> bytearray:
        lock = f"XTABLES_LOCKFILE={tmp_path / 'other.lock'}"
        netns.command("env", lock, tool(4), "-t", "nat", "-A", "CNI-HOSTPORT-DNAT", "-s", "192.0.2.9", "-j", "RETURN")
        return replace(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(LegacySocket, "replace", late)
    patcher = LegacyPatcher(4)
    name = next(name for name in wanted.chains if name.startswith("KUBE-SVC"))
    change = changes({name: ["-j KUBE-MARK-MASQ"] * 9}, (), wanted.chains)
    before = [line for line in saved(netns, 4) if "192.0.2.9" not in line]
    with pytest.raises(PatchImpossible, match="EAGAIN"):
        netns.run(patcher.patch, "nat", change)
    after = saved(netns, 4)
    assert "[0:0] -A CNI-HOSTPORT-DNAT -s 192.0.2.9/32 -j RETURN" in after
    assert [line for line in after if "192.0.2.9" not in line] == before
    monkeypatch.setattr(LegacySocket, "replace", replace)
    netns.run(patcher.patch, "nat", change)
    assert "[0:0] -A CNI-HOSTPORT-DNAT -s 192.0.2.9/32 -j RETURN" in saved(netns, 4)
    patcher.close()


def impossible(netns: NetworkNamespace, patcher: LegacyPatcher, change: ChainChanges, why: str) -> None:
    before = raw(netns, 4)
    with pytest.raises(PatchImpossible, match=why):
        netns.run(patcher.patch, "nat", change)
    assert raw(netns, 4) == before


def test_forms_are_used_only_once_iptables_wrote_one(netns: NetworkNamespace) -> None:
    chains: Chains = {"KUBE-SERVICES": ["-d 10.0.0.1/32 -j KUBE-SVC-A"], "KUBE-SVC-A": ["-j KUBE-MARK-MASQ"]}
    restore(netns, 4, text_of(chains, foreign=FOREIGN))
    patcher = LegacyPatcher(4)
    new = {"KUBE-SVC-A": ["-p tcp -j DNAT --to-destination 10.0.0.2:80"]}
    impossible(netns, patcher, changes(new, (), chains), "not seen from iptables yet: -j DNAT, -p tcp")
    restore(netns, 4, text_of(new))
    patcher.forget()
    newer = {"KUBE-SVC-A": ["-p tcp -j DNAT --to-destination 10.0.0.3:81"]}
    netns.run(patcher.patch, "nat", changes(newer, (), chains))  # learned from what was left to iptables
    assert f"[0:0] -A KUBE-SVC-A {newer['KUBE-SVC-A'][0]}" in saved(netns, 4)
    patcher.close()


def test_a_form_that_comes_and_goes_is_learned(netns: NetworkNamespace) -> None:
    """Also if nothing is to be written in that form when it is seen, and if another table is changed meanwhile."""
    chains: Chains = {"KUBE-SERVICES": ["-d 10.0.0.1/32 -j KUBE-SVC-A"], "KUBE-SVC-A": ["-j KUBE-MARK-MASQ"]}
    restore(netns, 4, text_of(chains, foreign=FOREIGN))
    netns.command(tool(4), "-t", "filter", "-N", "KUBE-SERVICES")
    patcher = LegacyPatcher(4)
    comes, goes = {"KUBE-SVC-A": ["-p tcp -j DNAT --to-destination 10.0.0.2:80"]}, {"KUBE-SVC-A": chains["KUBE-SVC-A"]}
    for _ in range(4):  # for as long as iptables does not come to write it
        impossible(netns, patcher, changes(comes, (), chains), "not seen from iptables yet: -j DNAT, -p tcp")
    restore(netns, 4, text_of(comes))
    patcher.forget()
    netns.run(patcher.patch, "filter", changes({"KUBE-SERVICES": []}))
    netns.run(patcher.patch, "nat", changes(goes, (), chains))
    netns.run(patcher.patch, "nat", changes(comes, (), chains))
    assert f"[0:0] -A KUBE-SVC-A {comes['KUBE-SVC-A'][0]}" in saved(netns, 4)
    patcher.close()


def test_an_encoding_unlike_that_of_iptables_is_not_used(netns: NetworkNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Wanted(4, 3)
    restore(netns, 4, text_of(wanted.chains, foreign=FOREIGN))
    encode: Callable[[RuleEncoder, str], EncodedRule] = RuleEncoder.encode

    def other(self: RuleEncoder, text: str) -> EncodedRule:
        rule = encode(self, text)
        return rule._replace(entry=rule.entry.replace(b"DNAT\0", b"DNAS\0"))

    monkeypatch.setattr(RuleEncoder, "encode", other)
    new = {"KUBE-SVC-0000000000000000": ["-p tcp -j DNAT --to-destination 10.0.0.2:80"]}
    patcher = LegacyPatcher(4)
    for _ in range(3):
        impossible(netns, patcher, changes(new, (), wanted.chains), "not seen from iptables yet: -j DNAT")
    monkeypatch.setattr(LegacySocket, "entries", None)  # given up: nothing is read any more
    with pytest.raises(PatchImpossible, match="not as iptables writes it: -j DNAT"):
        netns.run(patcher.patch, "nat", changes(new, (), wanted.chains))


@pytest.mark.parametrize(
    ("chains", "removed", "why"),
    [
        ({"KUBE-SVC-A": ["-m set --match-set X src -j KUBE-MARK-MASQ"]}, (), "-m set"),
        ({"KUBE-SVC-A": ["-j KUBE-SVC-NOT-THERE"]}, (), "no chain KUBE-SVC-NOT-THERE"),
        ({"KUBE-SVC-A": ["-j MASQUERADE"]}, (), "-j MASQUERADE"),
        ({"KUBE-SVC-A": ["-j KUBE-SERVICES"]}, (), "IPT_SO_SET_REPLACE nat: ELOOP"),
        ({}, ("KUBE-SVC-A",), "a jump to a chain that goes"),
        ({}, ("KUBE-SVC-B",), "no chain KUBE-SVC-B"),
        ({"KUBE-SVC-A": []}, ("KUBE-SVC-A",), "to change and to go"),
    ],
)
def test_what_cannot_be_done_leaves_the_table_as_it_is(
    netns: NetworkNamespace, chains: Chains, removed: Sequence[str], why: str
) -> None:
    present: Chains = {"KUBE-SERVICES": ["-d 10.0.0.1/32 -j KUBE-SVC-A"], "KUBE-SVC-A": ["-j KUBE-MARK-MASQ"]}
    restore(netns, 4, text_of(present, foreign=FOREIGN))
    patcher = LegacyPatcher(4)
    impossible(netns, patcher, changes(chains, removed, present), why)
    netns.run(patcher.patch, "nat", changes({"KUBE-SVC-A": ["-j KUBE-MARK-MASQ"] * 2}, (), present))
    patcher.close()


def test_an_absent_table_and_an_unreadable_order_are_left_to_iptables(netns: NetworkNamespace) -> None:
    with pytest.raises(PatchImpossible):
        netns.run(LegacyPatcher(4).patch, "nosuch", changes({"A": []}))
    with pytest.raises(PatchImpossible):
        netns.run_async(lambda: XTables(Variant.NFT, 4).patch("nat", changes({"A": []})))


def test_without_the_lock_it_is_left_to_iptables(
    netns: NetworkNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "no" / "such" / "directory"))

    async def work() -> None:
        tables = XTables(Variant.LEGACY, 4)
        with pytest.raises(PatchImpossible, match="without the xtables lock"):
            await tables.patch("nat", changes({"KUBE-SVC-A": []}))
        async with tables.turn():
            with pytest.raises(PatchImpossible, match="without the xtables lock"):
                await tables.patch("nat", changes({"KUBE-SVC-A": []}))

    netns.run_async(work)


def test_without_privilege_it_is_left_to_iptables_to_say_so(netns: NetworkNamespace) -> None:
    code = """
from nodeproxy.kernel.legacy.patch import ChainChanges, LegacyPatcher
try:
    LegacyPatcher(4).patch("nat", ChainChanges({"A": []}, set(), str.isupper, dict))
except Exception as error:
    print(type(error).__name__, error)
"""
    assert python_without_privilege(netns, code).startswith("PatchImpossible ")


def test_restore_makes_the_next_patch_look_again(netns: NetworkNamespace) -> None:
    """What iptables-restore wrote of our own chains is not undone by an older idea of them, even of the same size."""
    chains: Chains = {f"KUBE-SVC-{name}": ["-d 10.0.0.1/32 -j RETURN"] for name in "ABC"}
    restore(netns, 4, text_of(chains))

    async def work() -> None:
        tables = XTables(Variant.LEGACY, 4)
        async with tables.turn():
            await tables.patch("nat", changes({"KUBE-SVC-A": ["-d 10.0.0.2/32 -j RETURN"]}, (), chains))
            await tables.restore(text_of({"KUBE-SVC-B": ["-d 10.0.0.3/32 -j RETURN"]}))
            await tables.patch("nat", changes({"KUBE-SVC-C": ["-d 10.0.0.4/32 -j RETURN"]}, (), chains))
        tables.close()

    netns.run_async(work)
    rules = [line.partition("] ")[2] for line in saved(netns, 4) if "] -A " in line]
    assert rules == [f"-A KUBE-SVC-{name} -d 10.0.0.{low}/32 -j RETURN" for name, low in zip("ABC", (2, 3, 4), strict=True)]


def test_a_cancelled_patch_is_carried_out(netns: NetworkNamespace) -> None:
    chains: Chains = {f"KUBE-SVC-{name}": ["-d 10.0.0.1/32 -j RETURN"] for name in "AB"}
    restore(netns, 4, text_of(chains))

    async def work() -> None:
        tables = XTables(Variant.LEGACY, 4)
        async with tables.turn():
            change = changes({"KUBE-SVC-A": ["-d 10.0.0.9/32 -j RETURN"]}, (), chains)
            task = asyncio.create_task(tables.patch("nat", change))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    netns.run_async(work)
    assert "[0:0] -A KUBE-SVC-A -d 10.0.0.9/32 -j RETURN" in saved(netns, 4)
