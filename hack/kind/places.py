"""Owns where things are: this clone, the cache that outlives it, the state of running clusters; and KindError."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from hack.controlplane.build import cache as shared_cache
from hack.vm.places import locked, unmade

__all__ = ["HERE", "REPOSITORY", "KindError", "built", "cache", "locked", "state"]

REPOSITORY: Final = Path(__file__).resolve().parents[2]
HERE: Final = Path(__file__).resolve().parent


class KindError(Exception):
    """What went wrong, and what to do about it."""


def cache() -> Path:
    """What is costly to make and does not change: `~/.cache/nodeproxy/kind`, or below `NODEPROXY_CACHE`."""
    return shared_cache() / "kind"


def state() -> Path:
    """What is true until the next boot: the engine that we started, the clusters; `NODEPROXY_RUN` sets it."""
    usual = Path("/run/nodeproxy") if os.geteuid() == 0 else shared_cache() / "run"
    path = Path(os.environ.get("NODEPROXY_RUN") or usual)
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def built(target: Path) -> Iterator[Path | None]:
    """For making the file or directory `target` at most once, whoever asks: a work place that becomes it, or None."""
    with unmade(target) as needed:
        if not needed:
            yield None
            return
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True) as work:
            made = Path(work, "made")
            yield made
            if not made.exists():
                raise KindError(f"{target} was not made")
            _move(made, target)


def _move(made: Path, target: Path) -> None:
    made.chmod(0o755 if made.is_dir() else 0o644)
    shutil.move(made, target)
