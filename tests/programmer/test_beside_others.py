"""Somebody else changes the tables at the worst moment: the next audit knows it, and nothing of theirs is taken for ours."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeproxy.forwarding.table import Family, ServicePort, ServicePortKey
from nodeproxy.kernel.errors import LockHeld, PatchImpossible, RequestRefused
from nodeproxy.kernel.xtables import ChainChanges, Variant, XTables
from nodeproxy.programmer.iptables.affinity import AffinitySets
from nodeproxy.programmer.iptables.family import FamilyProgrammer
from nodeproxy.programmer.iptables.ruleset import TABLES
from nodeproxy.programmer.rules import kernel_tables
from nodeproxy.programmer.rules.kernel_tables import KernelTables, Snapshots
from nodeproxy.sandbox.namespace import Namespace, unique_stem

from .test_changes_on_kernel import deltas
from .test_fuzz_rule_text import CONFIG

pytestmark = pytest.mark.kernel

Rows = dict[ServicePortKey, ServicePort]
VARIANTS = pytest.mark.parametrize("variant", list(Variant))


class World:
    """A programmer with the rows of a few Services, and somebody else."""

    def __init__(self, namespace: Namespace, variant: Variant, others_lock: Path) -> None:
        self.variant = variant
        self.steps = list(deltas(Family.IPV4, seed=11, count=60))
        self.tables = KernelTables(XTables(variant, 4), TABLES)
        self.programmer = namespace.run(
            lambda: FamilyProgrammer(Family.IPV4, CONFIG, self.tables, AffinitySets(Family.IPV4))
        )
        self._others_lock = others_lock

    async def start(self) -> None:
        """Program what is there before the last change."""
        assert await self.programmer.full_pass(self.steps[-2][0], frozenset()) == {}
        assert not await self.programmer.audit()

    async def change(self) -> None:
        """The last change."""
        assert await self.programmer.change(self.steps[-1][1], frozenset()) == {}

    def somebody(self, *arguments: str) -> None:
        """Runs iptables, in the thread of the namespace, without our lock: that the test holds in its name."""
        environment = os.environ | {"XTABLES_LOCKFILE": str(self._others_lock)}
        subprocess.run([f"iptables-{self.variant}", "-t", "nat", *arguments], env=environment, check=True)

    async def mended(self) -> None:
        """The audit finds it, once; the next full pass puts it right."""
        assert await self.programmer.audit()
        assert await self.programmer.full_pass(self.steps[-1][0], frozenset()) == {}
        assert not await self.programmer.audit()
        assert "-A PREROUTING -m comment" in await self.tables.xtables.save("nat")


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "xtables.lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(path))
    return path


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace(f"{unique_stem()}-beside") as made:
        yield made


@pytest.mark.parametrize("by_iptables", [False, True], ids=["patch", "iptables"])
def test_a_change_waits_for_somebody_who_holds_the_lock(
    namespace: Namespace, lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_iptables: bool
) -> None:
    world = World(namespace, Variant.LEGACY, tmp_path / "others.lock")
    if by_iptables:

        async def impossible(self: XTables, table: str, changes: ChainChanges) -> None:
            raise PatchImpossible("the test says so")

        monkeypatch.setattr(XTables, "patch", impossible)

    async def scene() -> None:
        await world.start()
        with lock.open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            change = asyncio.create_task(world.change())
            await asyncio.sleep(0.2)
            world.somebody("-F", "PREROUTING")
        await change
        await world.mended()

    namespace.run(asyncio.run, scene())


@VARIANTS
def test_somebody_is_between_reading_and_writing(
    namespace: Namespace, lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: Variant
) -> None:
    world = World(namespace, variant, tmp_path / "others.lock")
    read = KernelTables.read

    async def and_then(self: KernelTables) -> Snapshots:
        found = await read(self)
        world.somebody("-F", "PREROUTING")
        return found

    async def scene() -> None:
        await world.start()
        with monkeypatch.context() as during:
            during.setattr(KernelTables, "read", and_then)
            assert await world.programmer.full_pass(world.steps[-1][0], frozenset()) == {}
        await world.mended()

    namespace.run(asyncio.run, scene())


def test_somebody_is_between_our_transaction_and_the_look_at_it(
    namespace: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nft has no lock; the kernel counts transactions."""
    world = World(namespace, Variant.NFT, tmp_path / "others.lock")
    restore = XTables.restore

    async def and_then(self: XTables, text: bytes | str) -> None:
        await restore(self, text)
        world.somebody("-F", "PREROUTING")

    async def scene() -> None:
        await world.start()
        with monkeypatch.context() as during:
            during.setattr(XTables, "restore", and_then)
            await world.change()
        await world.mended()

    namespace.run(asyncio.run, scene())


def test_a_change_alone_is_no_reason_to_read_the_tables(namespace: Namespace, tmp_path: Path) -> None:
    for variant in Variant:
        world = World(namespace, variant, tmp_path / "others.lock")

        async def scene(world: World = world) -> None:
            await world.start()
            await world.change()
            assert await world.tables.look() is None

        namespace.run(asyncio.run, scene())


def test_a_legacy_rule_exchanged_for_one_of_the_same_size(
    namespace: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(namespace, Variant.LEGACY, tmp_path / "others.lock")
    monkeypatch.setattr(kernel_tables, "_LOOK_ANYWAY_SECONDS", 0.0)

    async def scene() -> None:
        await world.start()
        await world.change()
        world.somebody("-R", "KUBE-MARK-MASQ", "1", "-j", "MARK", "--or-mark", "0x8000")
        await world.mended()

    namespace.run(asyncio.run, scene())


def test_nobody_gets_in_while_iptables_works_for_us(
    namespace: Namespace, lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program holds our lock even if we end before it does."""

    async def scene() -> None:
        tables = XTables(Variant.LEGACY, 4, 1)
        async with tables.turn() as turn:
            await tables.restore("*nat\n:AAA - [0:0]\nCOMMIT\n")
            assert turn.end is None
            with lock.open() as handle, pytest.raises(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert turn.end == await tables.stamp() != turn.begin
        with lock.open() as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    namespace.run(asyncio.run, scene())


def test_a_turn_that_could_not_begin_is_taken_for_none_that_holds_the_lock(
    namespace: Namespace, lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(self: XTables) -> None:
        raise RequestRefused("IPT_SO_GET_INFO nat", errno.ENOMEM)

    async def scene() -> None:
        tables = XTables(Variant.LEGACY, 4, 1)
        with monkeypatch.context() as during, pytest.raises(RequestRefused):
            during.setattr(XTables, "stamp", refused)
            async with tables.turn():
                pass
        with lock.open() as handle, pytest.raises(LockHeld):
            fcntl.flock(handle, fcntl.LOCK_EX)
            await tables.restore("*nat\n:AAA - [0:0]\nCOMMIT\n")

    namespace.run(asyncio.run, scene())


def test_the_program_shares_our_lock(
    namespace: Namespace, lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that nobody else gets it if we end before the program does."""
    held = tmp_path / "held"
    (tmp_path / "iptables-legacy-restore").write_text(
        "#!/bin/sh\n"
        f"case $1 in --version) exec /usr/sbin/iptables-legacy-restore --version;; esac\n"
        f"ls -l /proc/self/fd > {held}\n"
        'exec /usr/sbin/iptables-legacy-restore "$@"\n'
    )
    (tmp_path / "iptables-legacy-restore").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    async def scene() -> None:
        tables = XTables(Variant.LEGACY, 4, 1)
        async with tables.turn():
            await tables.restore("*nat\n:AAA - [0:0]\nCOMMIT\n")

    namespace.run(asyncio.run, scene())
    assert str(lock) in held.read_text()


def test_an_iptables_that_knows_no_other_lock_file_takes_the_lock_itself(
    namespace: Namespace, lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodeproxy.kernel.xtables._TAKES_A_LOCK_FILE", (9,))
    world = World(namespace, Variant.LEGACY, tmp_path / "others.lock")

    async def scene() -> None:
        await world.start()
        await world.change()
        assert not await world.programmer.audit()
        assert world.tables.left_to_iptables

    namespace.run(asyncio.run, scene())
