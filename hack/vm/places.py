"""Where things are: this clone, the cache that all clones share, the state of one VM; and what fails is a VmError."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
VENV: Final = REPOSITORY / ".venv"


class VmError(Exception):
    """Something that the caller can read and mend: what failed, why, what to do."""


def cache() -> Path:
    """The cache: kernel packages and disk images, kept until somebody removes them."""
    base = os.environ.get("HACK_VM_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nodeproxy", "vm"
    )
    return Path(base)


def states() -> Path:
    """The folder with a folder per VM of this clone."""
    return cache() / "run" / hashlib.sha256(str(REPOSITORY).encode()).hexdigest()[:12]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`, waiting for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"vm: waiting for another process that holds {path}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def unmade(target: Path) -> Iterator[bool]:
    """Whether `target` has to be made: true for one caller at a time, who holds the lock beside it meanwhile."""
    if target.exists():
        yield False
        return
    with locked(target.with_name(f"{target.name}.lock")):
        yield not target.exists()


@contextlib.contextmanager
def built(target: Path) -> Iterator[Path | None]:
    """For making the directory `target` at most once, whoever asks: yields a work directory that becomes it, or None."""
    with unmade(target) as needed:
        if not needed:
            yield None
            return
        work = target.with_name(f"{target.name}.new")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            yield work
            work.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
