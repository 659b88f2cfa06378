"""Owns finding and running the iptables programs of one variant and family.

Images differ: some have iptables-nft-restore and iptables-legacy-restore, some only plain iptables-restore, which says in
its version which variant it is. Programs run with their text on standard input and output held in memory files, so that a
transaction of megabytes passes without the event loop moving it in pieces.
"""

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from nodeproxy.kernel.errors import ToolMissing


class Variant(StrEnum):
    """Which of the kernel's two packet filters the iptables programs talk to."""

    LEGACY = "legacy"
    NFT = "nft"


@dataclass(frozen=True, slots=True)
class Tools:
    """Paths of the programs of one variant and IP family (4 or 6), and the version text of the restore program."""

    variant: Variant
    family: int
    restore: str
    save: str
    version: str


_VERSION: Final = re.compile(r"v(\d[\d.]*)(?:\s+\((\w+)\))?")
_NO_MORE: Final[Mapping[str, str]] = MappingProxyType({})
_HINT: Final = "install the iptables package (1.8 or later) of the node's distribution"


def find_tools(variant: Variant, family: int) -> Tools:
    """The programs named after the variant, else the plain ones if their version says that they are of this variant.

    `family` is 4 or 6. Runs `--version`, which takes some milliseconds. Raises ToolMissing when there are none on PATH.
    """
    stem = {4: "iptables", 6: "ip6tables"}[family]
    for prefix in (f"{stem}-{variant}", stem):
        restore, save = shutil.which(f"{prefix}-restore"), shutil.which(f"{prefix}-save")
        if restore is None or save is None:
            continue
        found = version_of(restore)
        if found is not None and found[1] is variant:
            return Tools(variant, family, restore, save, found[0])
    raise ToolMissing(f"{stem}-{variant}-restore", _HINT)


def version_of(program: str) -> tuple[str, Variant] | None:
    """(version, variant) that `program --version` prints; None if it does not run or prints something else.

    Versions before 1.8 print no variant: they are legacy.
    """
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, errors="replace", check=False)
    except OSError:
        return None
    match = _VERSION.search(done.stdout)
    if done.returncode != 0 or match is None:
        return None
    return match[1], Variant.NFT if match[2] == "nf_tables" else Variant.LEGACY


async def run_tool(
    arguments: list[str], text: bytes = b"", *, environment: Mapping[str, str] = _NO_MORE, inherit: Collection[int] = ()
) -> tuple[int, bytes, str]:
    """Run a program with `text` on its standard input: (exit status, standard output, standard error).

    `environment`: variables beside our own. `inherit`: descriptors that it gets, too. A status below 0 is the signal that
    ended it. If the caller is cancelled the program is killed and waited for; iptables commits a table at a time, so each
    table is then either changed wholly or not at all. Raises ToolMissing.
    """
    stdin, stdout = os.memfd_create("stdin"), os.memfd_create("stdout")
    try:
        remaining = memoryview(text)
        while remaining:
            remaining = remaining[os.write(stdin, remaining) :]
        os.lseek(stdin, 0, os.SEEK_SET)
        try:
            process = await asyncio.create_subprocess_exec(
                *arguments,
                stdin=stdin,
                stdout=stdout,
                stderr=asyncio.subprocess.PIPE,
                env={**os.environ, "LC_ALL": "C", **environment},
                pass_fds=inherit,
            )
        except FileNotFoundError as error:
            raise ToolMissing(arguments[0], _HINT) from error
        try:
            _, stderr = await process.communicate()
        except BaseException:
            if process.returncode is None:
                process.kill()
                await process.wait()
            raise
        size = os.lseek(stdout, 0, os.SEEK_END)
        output = bytearray()
        while len(output) < size:
            output += os.pread(stdout, size - len(output), len(output))
        assert process.returncode is not None
        return process.returncode, bytes(output), stderr.decode(errors="replace")
    finally:
        os.close(stdin)
        os.close(stdout)
