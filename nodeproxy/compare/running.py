"""Owns where a mode's work is done: a process on this machine's kernel, or one in a VM where this kernel has no IPVS.

The VM is the repository's own tool (hack/vm), which is there in a clone and not in an installed nodeproxy.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

import nodeproxy
from nodeproxy.compare.one_mode import Job, ModeRun, Step, Work
from nodeproxy.compare.probing import Progress
from nodeproxy.compare.results import ModeResult
from nodeproxy.configuration.agent_config import Mode
from nodeproxy.kernel.errors import KernelError
from nodeproxy.kernel.ipvs import IPVS
from nodeproxy.snapshot.directory import save
from nodeproxy.snapshot.model import Snapshot

LIMIT: Final = 1800.0
"""Seconds after which a mode's work is given up."""
_PROGRAM: Final = [sys.executable, "-m", "nodeproxy.compare.one_mode"]
_WORDS = 6  # last lines of what a program said, to say why it failed


class Where(Struct, frozen=True):
    """Where a mode can be run: the command that does, and its words. `lacking`: why it can be run nowhere."""

    command: tuple[str, ...] = ()
    words: str = ""
    directory: Path | None = None
    lacking: str | None = None


def where(mode: Mode) -> Where:
    """This machine's kernel if it has what the mode needs, else a VM if the repository's tool is there."""
    lacks = _lacks_ipvs() if mode is Mode.IPVS else None
    if lacks is None:
        return Where(tuple(_PROGRAM), "this machine")
    root = repository()
    if root is None:
        return Where(lacking=f"{lacks}; a clone of nodeproxy's repository has hack/vm, a VM for that")
    return Where((sys.executable, "-m", "hack.vm", "run", "-i", "--", *_PROGRAM), "VM", root)


def repository() -> Path | None:
    """The clone that this nodeproxy is of, where its VM is."""
    root = Path(nodeproxy.__file__).parents[1] if nodeproxy.__file__ else None
    return root if root is not None and (root / "hack" / "vm" / "__main__.py").is_file() else None


def _lacks_ipvs() -> str | None:
    try:
        with IPVS() as ipvs:
            ipvs.require()
    except KernelError as error:
        return str(error)
    return None


def packed(snapshot: Snapshot) -> bytes:
    """A snapshot as an archive."""
    with tempfile.TemporaryDirectory(prefix="nodeproxy-compare-") as directory:
        archive = Path(directory, "snapshot.tar.gz")
        save(snapshot, archive)
        return archive.read_bytes()


def run(at: Where, work: Work, snapshot: bytes, progress: Progress) -> ModeRun:
    """Have a program do the work of a mode. What goes wrong with the program itself is the result's error, too."""
    progress("starting", 0, 1)
    said: deque[str] = deque(maxlen=_WORDS)
    job = msgspec.json.encode(Job(work, snapshot))
    with (
        tempfile.TemporaryFile() as output,
        subprocess.Popen(
            at.command, cwd=at.directory, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.PIPE
        ) as process,
    ):
        timer = threading.Timer(LIMIT, process.kill)
        timer.start()
        try:
            feeding = threading.Thread(target=_feed, args=(process.stdin, job), daemon=True)
            feeding.start()
            _follow(process.stderr or (), progress, said)
            status = process.wait()
        except BaseException:
            process.terminate()
            raise
        finally:
            timer.cancel()
        output.seek(0)
        answer = output.read()
    if status == 0:
        try:
            made = msgspec.json.decode(answer, type=ModeRun)
        except msgspec.DecodeError as error:
            said.append(f"unreadable answer: {error}")
        else:
            return replace(made, result=replace(made.result, where=f"{at.words} ({made.result.where})"))
    why = " / ".join(said) or "it said nothing"
    failed = ModeResult(str(work.mode), work.variant, at.words, f"the program for it ended with status {status}: {why}")
    return ModeRun(failed)


def _feed(stdin: IO[bytes] | None, job: bytes) -> None:
    if stdin is None:
        return
    try:
        with stdin:
            stdin.write(job)
    except OSError:  # it ended before it had read everything: its status says so
        return


def _follow(lines: Iterable[bytes], progress: Progress, said: deque[str]) -> None:
    """Pass steps on, and keep the last of what else is said."""
    for line in lines:
        try:
            step = msgspec.json.decode(line, type=Step)
        except msgspec.DecodeError:
            said.append(line.decode(errors="replace").strip())
        else:
            progress(step.stage, step.done, step.of)


def machine() -> str:
    """This machine, in words."""
    count = len(os.sched_getaffinity(0))
    cpus = f"{count} CPU{'' if count == 1 else 's'}"
    return f"{platform.system()} {platform.release()}, {cpus}, Python {platform.python_version()}"
