"""Owns transactions on the packet filter, of one variant (legacy, nft) and one IP family.

The text is the caller's; this module runs it through iptables-restore, waits for the xtables lock, and turns a refusal into
a typed error that names the line, the chain and the rule as far as the variant tells them. Small changes of legacy tables
can also be had without iptables-restore.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

from nodeproxy.kernel.errors import PatchImpossible, PermissionMissing, RestoreRefused, ToolFailed
from nodeproxy.kernel.legacy.lock import LOCK_FILE_VARIABLE, lock_file, xtables_lock
from nodeproxy.kernel.legacy.patch import ChainChanges, LegacyPatcher
from nodeproxy.kernel.restore_errors import restore_error
from nodeproxy.kernel.xtables_stamp import ChangeStamp, LegacyStamps, NftStamp, NftStamps, legacy_tables
from nodeproxy.kernel.xtables_tools import Tools, Variant, find_tools, run_tool

__all__ = ["ChainChanges", "ChangeStamp", "Tools", "Turn", "Variant", "XTables", "find_tools"]

_PROBE_CHAIN: Final = "NODEPROXY-PROBE"
_TAKES_A_LOCK_FILE: Final = (1, 8, 6)  # earlier programs lock the usual file, whatever they are told


@dataclass(slots=True)
class Turn:
    """What is done to the tables in one go, between the stamps `begin` and `end`.

    `end` is None while it goes on, and where somebody else changed the tables in between.
    """

    begin: ChangeStamp
    end: ChangeStamp | None = None
    transactions: int = 0


class XTables:
    """The tables of one variant and IP family (4 or 6), in the network namespace of the calling thread.

    `lock_timeout_seconds` is how long legacy programs wait for the xtables lock, at least 1: they take 0 as for ever. The
    nft variant has no lock and ignores it. Not meant for two restores at once: the caller keeps their order. Programs are
    looked for on PATH when first needed.
    """

    def __init__(self, variant: Variant, family: int, lock_timeout_seconds: int = 5) -> None:
        if family not in (4, 6):
            raise ValueError(f"IP family must be 4 or 6, not {family}")
        self.variant: Final = variant
        self.family: Final = family
        self._lock_timeout_seconds = max(1, lock_timeout_seconds)
        self._tools: Tools | None = None
        self._stamps: LegacyStamps | NftStamps | None = None
        self._patcher = LegacyPatcher(family) if variant is Variant.LEGACY else None
        self._turn: Turn | None = None
        self._lock: int | None = None

    async def tools(self) -> Tools:
        """The programs that this object runs. Raises ToolMissing."""
        if self._tools is None:
            self._tools = await asyncio.to_thread(find_tools, self.variant, self.family)
        return self._tools

    def close(self) -> None:
        """Close the sockets that `stamp` and `patch` keep."""
        if self._patcher is not None:
            self._patcher.close()
        if self._stamps is not None:
            self._stamps.close()
            self._stamps = None

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Turn]:
        """Restores and patches in this context are one turn; its end tells whether others changed the tables meanwhile.

        Legacy: the xtables lock is held, so that only programs that ignore it can. Nft has no lock: the kernel counts
        transactions. Raises LockHeld, ToolMissing, and what `stamp` raises.
        """
        async with AsyncExitStack() as stack:
            if self.variant is Variant.LEGACY and _version(await self.tools()) >= _TAKES_A_LOCK_FILE:
                with suppress(OSError):  # iptables says what is wrong with the file
                    self._lock = await stack.enter_async_context(xtables_lock(self._lock_timeout_seconds))
            try:
                self._turn = turn = Turn(await self.stamp())
                yield turn
            finally:
                self._turn = self._lock = None
            end = await self.stamp()
            if not isinstance(turn.begin, NftStamp) or end == NftStamp(turn.begin.generation + turn.transactions):
                turn.end = end

    async def restore(self, text: bytes | str) -> None:
        """Carry out the transactions in `text` (iptables-save format), leaving every chain alone that it does not name.

        Each table is all or nothing; a table that was committed before another one was refused stays changed.

        Raises RestoreRefused, LockHeld, PermissionMissing, ToolMissing, and ToolFailed for anything else. On cancellation
        the program is killed.
        """
        data = text.encode() if isinstance(text, str) else text
        if self._patcher is not None:
            self._patcher.forget()
        # No --wait-interval: 1.8.9 deprecates it. Without --wait legacy restore waits for the lock without end.
        program = (await self.tools()).restore
        arguments = [program, "--noflush", "--wait", str(self._lock_timeout_seconds)]
        status, stderr = await self._run_restore(arguments, data)
        if status != 0:
            raise restore_error(
                stderr,
                data,
                tool=program,
                exit_status=status,
                waited_seconds=self._lock_timeout_seconds,
                lock_file=lock_file(),
            )
        if self._turn is not None:
            self._turn.transactions += data.count(b"\nCOMMIT\n")

    async def _run_restore(self, arguments: list[str], data: bytes) -> tuple[int, str]:
        """Run it. Where we hold the xtables lock it shares that, and locks a file of its own instead."""
        if self._lock is None:
            status, _, stderr = await run_tool(arguments, data)
            return status, stderr
        other = os.memfd_create("xtables.lock")
        try:
            environment = {LOCK_FILE_VARIABLE: f"/proc/self/fd/{other}"}
            status, _, stderr = await run_tool(arguments, data, environment=environment, inherit=(self._lock, other))
        finally:
            os.close(other)
        return status, stderr

    async def patch(self, table: str, changes: ChainChanges) -> None:
        """Change user-defined chains of a legacy table, all of them or none, with the outcome that `restore` would have.

        In large tables several times as fast. Only in a turn. On cancellation it is carried out all the same. Raises
        PatchImpossible where `restore` has to do it (always in the nft variant).
        """
        if self._patcher is None:
            raise PatchImpossible("not a legacy table")
        if self._lock is None:
            raise PatchImpossible("without the xtables lock")
        task = asyncio.ensure_future(asyncio.to_thread(self._patcher.patch, table, changes))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait([task])
            task.exception()  # whatever it was, the next one to look will see
            raise

    async def save(self, table: str, *, counters: bool = False) -> str:
        """The table in iptables-save format; "" for a legacy table that does not exist, which is not created by looking.

        Raises ToolFailed, PermissionMissing, ToolMissing.
        """
        if self.variant is Variant.LEGACY and table not in legacy_tables(self.family):
            return ""
        return await self._save("--table", table, *(["--counters"] if counters else []))

    async def save_all(self) -> str:
        """Every table that exists, one after the other, in iptables-save format. Raises as `save`."""
        return await self._save()

    async def _save(self, *options: str) -> str:
        program = (await self.tools()).save
        arguments = [program, *options]
        status, output, stderr = await run_tool(arguments)
        if status != 0:
            message = " ".join(stderr.split())
            if "you must be root" in message or "Permission denied" in message:
                raise PermissionMissing("read the packet filter", message)
            raise ToolFailed(program, status, message)
        return output.decode(errors="replace")

    async def stamp(self) -> ChangeStamp:
        """A mark that differs once somebody, ourselves included, changed the tables; see xtables_stamp for its limits.

        Takes some ten microseconds whatever the size of the tables. Raises PermissionMissing, FeatureMissing,
        RequestRefused.
        """
        if self._stamps is None:
            self._stamps = LegacyStamps(self.family) if self.variant is Variant.LEGACY else NftStamps()
        return self._stamps.read()

    async def accepts(self, *rules: str) -> bool:
        """Whether program and kernel take some rules of the nat table: tried in a chain that nothing jumps to.

        The first transaction adds the rules, so that the kernel itself has seen them, the second removes chain and rules; if
        the first is refused, in whatever words, nothing was made. Raises LockHeld, PermissionMissing, ToolMissing.
        """
        lines = "".join(f"-A {_PROBE_CHAIN} {rule}\n" for rule in rules)
        add = f"*nat\n:{_PROBE_CHAIN} - [0:0]\n{lines}COMMIT\n"
        remove = f"*nat\n:{_PROBE_CHAIN} - [0:0]\n-X {_PROBE_CHAIN}\nCOMMIT\n"
        try:
            await self.restore(add + remove)
        except (RestoreRefused, ToolFailed):
            return False
        return True


def _version(tools: Tools) -> tuple[int, ...]:
    return tuple(int(part) for part in tools.version.split(".") if part)
