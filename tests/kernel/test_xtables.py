"""Transactions through iptables-restore, both variants and families, against the real kernel."""

import asyncio
import fcntl
import os
import shutil
import time
from pathlib import Path

import pytest

from nodeproxy.kernel.errors import LockHeld, PermissionMissing, RestoreRefused, ToolMissing
from nodeproxy.kernel.xtables import Variant, XTables
from nodeproxy.kernel.xtables_stamp import LegacyStamp, legacy_tables
from tests.kernel.conftest import NetworkNamespace

pytestmark = pytest.mark.kernel

VARIANTS = pytest.mark.parametrize("variant", list(Variant))
FAMILIES = pytest.mark.parametrize("family", [4, 6])


def refusal(netns: NetworkNamespace, variant: Variant, text: str, family: int = 4) -> RestoreRefused:
    with pytest.raises(RestoreRefused) as caught:
        netns.run_async(lambda: XTables(variant, family).restore(text))
    assert "\n" not in str(caught.value)
    return caught.value


@VARIANTS
@FAMILIES
def test_restored_rules_are_in_the_table_and_other_chains_stay(
    netns: NetworkNamespace, variant: Variant, family: int
) -> None:
    address = "192.0.2.1" if family == 4 else "2001:db8::1"

    async def work() -> str:
        tables = XTables(variant, family)
        await tables.restore(f"*nat\n:ONE - [0:0]\n-A ONE -d {address} -j RETURN\nCOMMIT\n")
        await tables.restore(b"*nat\n:TWO - [0:0]\n-A TWO -j ONE\nCOMMIT\n")
        return await tables.save("nat")

    saved = netns.run_async(work)
    assert f"-A ONE -d {address}/{32 if family == 4 else 128} -j RETURN" in saved
    assert "-A TWO -j ONE" in saved
    program = f"{'iptables' if family == 4 else 'ip6tables'}-{variant}-save"
    assert "-A TWO -j ONE" in netns.command(program, "-t", "nat")


@VARIANTS
@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("-A AAA --bogus -j RETURN", "unknown option"),
        ("-A AAA -d 1.2.3.444 -j RETURN", "1.2.3.444"),
        ("-A AAA -p tcp --dport 99999 -j RETURN", "99999"),
        ("-A AAA -m nosuchmatch -j RETURN", "nosuchmatch"),
        ("-A AAA -m set --match-set NOSET dst -j RETURN", "NOSET"),
        ("-A AAA -j DNAT --to-destination 1.2.3.4:80", "Need TCP, UDP"),
        ("-A AAA -j NOSUCH", "NOSUCH"),
    ],
)
def test_line_chain_and_rule_of_a_refused_line_are_named(
    netns: NetworkNamespace, variant: Variant, rule: str, words: str
) -> None:
    error = refusal(netns, variant, f"# comment\n*nat\n:AAA - [0:0]\n-A AAA -j RETURN\n{rule}\n-A AAA -j ACCEPT\nCOMMIT\n")
    assert (error.table, error.line, error.chain, error.rule) == ("nat", 5, "AAA", rule)
    assert words in error.message


@VARIANTS
@pytest.mark.parametrize("line", ["-A NOPE -j RETURN", "-F NOPE", "-X NOPE", "-D AAA -j ACCEPT", "[0:0] -A NOPE -j RETURN"])
def test_absent_chain_or_rule_is_named(netns: NetworkNamespace, variant: Variant, line: str) -> None:
    error = refusal(netns, variant, f"*filter\n:AAA - [0:0]\n{line}\nCOMMIT\n")
    assert (error.table, error.line, error.at_commit) == ("filter", 3, False)
    assert error.chain == ("AAA" if " AAA " in line else "NOPE")


def test_kernel_refusal_names_every_rule_in_nft(netns: NetworkNamespace) -> None:
    text = (
        "*nat\n:AAA - [0:0]\n:BBB - [0:0]\n-A AAA -j RETURN\n-A BBB -j REJECT\n-A BBB -j ACCEPT\n-A AAA -j REJECT\nCOMMIT\n"
    )
    error = refusal(netns, Variant.NFT, text)
    assert error.at_commit
    assert [(part.line, part.chain, part.rule) for part in error.refused] == [
        (5, "BBB", "-A BBB -j REJECT"),
        (7, "AAA", "-A AAA -j REJECT"),
    ]
    assert "Invalid argument" in error.message


def test_kernel_refusal_in_legacy_names_the_table_only(netns: NetworkNamespace) -> None:
    error = refusal(netns, Variant.LEGACY, "*nat\n:AAA - [0:0]\n-A AAA -j REJECT\nCOMMIT\n")
    assert (error.table, error.line, error.chain, error.at_commit) == ("nat", None, None, True)
    assert "AAA" not in netns.run_async(lambda: XTables(Variant.LEGACY, 4).save("nat"))


@VARIANTS
@pytest.mark.parametrize("words", ["Permission denied (you must be root)", "holding the xtables lock"])
def test_text_of_a_rule_cannot_pass_for_another_error(netns: NetworkNamespace, variant: Variant, words: str) -> None:
    error = refusal(netns, variant, f'*nat\n:AAA - [0:0]\n-A AAA "{words}" -j RETURN\nCOMMIT\n')
    assert (error.line, error.chain) == (3, "AAA")


@VARIANTS
def test_chain_in_use_cannot_be_deleted(netns: NetworkNamespace, variant: Variant) -> None:
    netns.run_async(lambda: XTables(variant, 4).restore("*nat\n:USED - [0:0]\n-A OUTPUT -j USED\nCOMMIT\n"))
    error = refusal(netns, variant, "*nat\n-X USED\nCOMMIT\n")
    assert (error.line, error.chain) == (2, "USED")


@VARIANTS
def test_second_table_refused_leaves_the_first_changed(netns: NetworkNamespace, variant: Variant) -> None:
    error = refusal(netns, variant, "*nat\n:GOOD - [0:0]\nCOMMIT\n*filter\n-A NOPE -j RETURN\nCOMMIT\n")
    assert (error.table, error.line) == ("filter", 5)
    assert ":GOOD" in netns.run_async(lambda: XTables(variant, 4).save("nat"))


@VARIANTS
@pytest.mark.parametrize(
    "text", ["*nat\n:AAA - [0:0]\n", "-A AAA -j RETURN\n", "*nosuch\nCOMMIT\n", "*nat\ngarbage\nCOMMIT\n"]
)
def test_malformed_text_is_refused(netns: NetworkNamespace, variant: Variant, text: str) -> None:
    assert refusal(netns, variant, text).line is not None


@pytest.fixture
def lock_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock file of our own: holding the machine's would stop other tests that run beside this one."""
    path = tmp_path / "xtables.lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(path))
    return path


def test_held_lock_is_reported_after_the_timeout(netns: NetworkNamespace, lock_file: Path) -> None:
    with lock_file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        started = time.monotonic()
        with pytest.raises(LockHeld) as caught:
            netns.run_async(lambda: XTables(Variant.LEGACY, 4, 1).restore("*nat\n:AAA - [0:0]\nCOMMIT\n"))
        assert 0.9 < time.monotonic() - started < 3
        assert caught.value.waited_seconds == 1
        assert caught.value.lock_file == str(lock_file)
        netns.run_async(lambda: XTables(Variant.NFT, 4, 1).restore("*nat\n:AAA - [0:0]\nCOMMIT\n"))  # has no lock
    netns.run_async(lambda: XTables(Variant.LEGACY, 4, 1).restore("*nat\n:AAA - [0:0]\nCOMMIT\n"))


def test_zero_timeout_does_not_wait_for_ever(netns: NetworkNamespace, lock_file: Path) -> None:
    with lock_file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(LockHeld):
            netns.run_async(lambda: XTables(Variant.LEGACY, 4, 0).restore("*nat\n:AAA - [0:0]\nCOMMIT\n"))


def test_cancelled_restore_is_killed(netns: NetworkNamespace, lock_file: Path) -> None:
    async def work() -> None:
        async with asyncio.timeout(0.3):
            await XTables(Variant.LEGACY, 4, 60).restore("*nat\n:AAA - [0:0]\nCOMMIT\n")

    with lock_file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError):
            netns.run_async(work)
    time.sleep(0.3)  # the lock is free now: a program that still waited for it would go on
    assert netns.run_async(lambda: XTables(Variant.LEGACY, 4).save("nat")) == ""


def test_missing_program_is_named(netns: NetworkNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolMissing, match="ip6tables-nft-restore is not on PATH"):
        netns.run_async(lambda: XTables(Variant.NFT, 6).restore("*nat\nCOMMIT\n"))


def test_program_that_went_away_is_named(netns: NetworkNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("iptables-nft-restore", "iptables-nft-save"):
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    monkeypatch.setenv("PATH", str(tmp_path))

    async def work() -> None:
        tables = XTables(Variant.NFT, 4)
        await tables.restore("*nat\n:AAA - [0:0]\nCOMMIT\n")
        (tmp_path / "iptables-nft-restore").unlink()
        await tables.restore("*nat\n:BBB - [0:0]\nCOMMIT\n")

    with pytest.raises(ToolMissing):
        netns.run_async(work)


def test_plain_names_are_used_if_their_version_says_so(
    netns: NetworkNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for program in ("restore", "save"):
        (tmp_path / f"iptables-{program}").symlink_to(shutil.which(f"iptables-legacy-{program}") or "")
    monkeypatch.setenv("PATH", str(tmp_path))
    netns.run_async(lambda: XTables(Variant.LEGACY, 4).restore("*nat\n:AAA - [0:0]\nCOMMIT\n"))
    assert netns.run(legacy_tables, 4) == ("nat",)
    with pytest.raises(ToolMissing):
        netns.run_async(lambda: XTables(Variant.NFT, 4).restore("*nat\n:AAA - [0:0]\nCOMMIT\n"))


@VARIANTS
def test_lack_of_capability_is_told_apart(
    netns: NetworkNamespace, variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for program in ("restore", "save"):
        name = f"iptables-{variant}-{program}"
        (tmp_path / name).write_text(f'#!/bin/sh\nexec setpriv --reuid 65534 --clear-groups {shutil.which(name)} "$@"\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(PermissionMissing, match="not permitted to change the packet filter"):
        netns.run_async(lambda: XTables(variant, 4).restore("*nat\nCOMMIT\n"))


@VARIANTS
@FAMILIES
def test_stamp_changes_with_every_change_and_only_then(netns: NetworkNamespace, variant: Variant, family: int) -> None:
    async def work() -> None:
        tables = XTables(variant, family)
        seen = [await tables.stamp()]
        for text in (
            "*nat\n:AAA - [0:0]\nCOMMIT\n",
            "*nat\n-A AAA -j RETURN\nCOMMIT\n",
            "*nat\n-A OUTPUT -j AAA\nCOMMIT\n",
            "*nat\n-D OUTPUT -j AAA\n-A PREROUTING -j AAA\nCOMMIT\n",  # as many rules, of the same size, elsewhere
            "*nat\n-F AAA\nCOMMIT\n",
            "*filter\n:BBB - [0:0]\nCOMMIT\n",
        ):
            assert await tables.stamp() == seen[-1]
            await tables.restore(text)
            stamp = await tables.stamp()
            assert stamp not in seen
            seen.append(stamp)
        tables.close()
        assert await tables.stamp() == seen[-1]

    netns.run_async(work)


@FAMILIES
def test_looking_creates_no_legacy_table(netns: NetworkNamespace, family: int) -> None:
    async def work() -> None:
        tables = XTables(Variant.LEGACY, family)
        assert await tables.stamp() == LegacyStamp(())
        assert await tables.save("nat") == ""
        assert legacy_tables(family) == ()

    netns.run_async(work)


@VARIANTS
@FAMILIES
def test_random_fully_is_tried_and_leaves_nothing(netns: NetworkNamespace, variant: Variant, family: int) -> None:
    async def work() -> str:
        tables = XTables(variant, family)
        assert await tables.accepts("-j MASQUERADE --random-fully")
        return await tables.save("nat")

    assert "PROBE" not in netns.run_async(work)


def test_random_fully_unknown_to_the_program(
    netns: NetworkNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # an iptables that knows the target but not the option: a stand-in that hides the option's name from the real one
    real = shutil.which("iptables-nft-restore")
    old = tmp_path / "iptables-nft-restore"
    old.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec {real} --version\nsed s/--random-fully/--no-such-option/ | {real} "$@"\n'
    )
    old.chmod(0o755)
    (tmp_path / "iptables-nft-save").symlink_to(shutil.which("iptables-nft-save") or "")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert netns.run_async(lambda: XTables(Variant.NFT, 4).accepts("-j MASQUERADE --random-fully")) is False


@VARIANTS
def test_large_transaction_passes_at_once(netns: NetworkNamespace, variant: Variant) -> None:
    rules = "".join(f"-A BIG -p tcp -d 10.{i >> 8}.{i & 255}.1 --dport 80 -j RETURN\n" for i in range(20_000))

    async def work() -> str:
        tables = XTables(variant, 4)
        await tables.restore(f"*nat\n:BIG - [0:0]\n{rules}COMMIT\n")
        return await tables.save("nat")

    assert netns.run_async(work).count("-A BIG ") == 20_000
