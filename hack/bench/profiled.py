"""Runs nodeproxy under cProfile, worker threads included: `python -m hack.bench.profiled FILE run --mode ...`.

`python -m cProfile` sees the main thread alone, while manifests are read and decoded in another, and counts waiting. Here
only processor time counts. The file is written when nodeproxy ends, for `pstats`.
"""

from __future__ import annotations

import cProfile
import pstats
import sys
import threading
import time
from pathlib import Path

TOP = 25


def main() -> None:
    """Profile everything from the first import on."""
    target, *arguments = sys.argv[1:]
    profiles = [cProfile.Profile(time.thread_time)]

    def start_thread(*_event: object) -> None:
        """Called at the first event of each new thread, in that thread."""
        profiles.append(cProfile.Profile(time.thread_time))
        profiles[-1].enable()

    threading.setprofile(start_thread)
    profiles[0].enable()
    try:
        from nodeproxy.cli.main import main as nodeproxy  # noqa: PLC0415

        sys.argv = ["nodeproxy", *arguments]
        nodeproxy()
    finally:
        profiles[0].disable()
        _dump(profiles, target)


def _dump(profiles: list[cProfile.Profile], target: str) -> None:
    stats = pstats.Stats(profiles[0])
    for profile in profiles[1:]:
        profile.create_stats()
        if profile.getstats():
            stats.add(profile)
    stats.dump_stats(target)


def print_top(file: Path) -> None:
    """The functions that took most processor time, by their own and with what they called."""
    for order in ("tottime", "cumulative"):
        pstats.Stats(str(file)).strip_dirs().sort_stats(order).print_stats(TOP)


if __name__ == "__main__":
    main()
