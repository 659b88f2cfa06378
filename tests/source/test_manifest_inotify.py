"""Waiting for changes in a directory by inotify: what is named, what is never lost, and what runs while nothing changes."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nodeproxy.source.manifests.inotify import DirectoryWatch
from tests.source.test_manifest_source import max_queued_events


async def settle(watch: DirectoryWatch) -> set[str]:
    """All that is there to take."""
    names: set[str] = set()
    while await watch.wait(0.05):
        names |= watch.take()
    return names


async def test_every_kind_of_change_is_named(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("1")
    outside = tmp_path.with_name(f"{tmp_path.name}-outside")
    outside.mkdir()
    (outside / "came").write_text("1")
    with DirectoryWatch(tmp_path) as watch:
        assert not await watch.wait(0.05)
        assert watch.take() == set()
        changes: list[tuple[Callable[[], Any], set[str]]] = [
            (partial((tmp_path / "there").write_text, "2"), {"there"}),
            (partial((tmp_path / "there").chmod, 0o600), {"there"}),
            (partial((outside / "came").rename, tmp_path / "came"), {"came"}),
            (partial((tmp_path / "came").rename, tmp_path / "named"), {"came", "named"}),
            (partial((tmp_path / "link").symlink_to, "nowhere"), {"link"}),
            (partial((tmp_path / "second name").hardlink_to, tmp_path / "there"), {"second name"}),
            ((tmp_path / "there").unlink, {"there"}),
            ((tmp_path / "folder").mkdir, {"folder"}),
            ((tmp_path / os.fsdecode(b"\xff")).touch, {os.fsdecode(b"\xff")}),
            ((tmp_path / ("n" * 255)).touch, {"n" * 255}),
        ]
        for change, names in changes:
            change()
            assert await watch.wait(5)
            assert await settle(watch) == names
        (tmp_path / "folder" / "deeper").touch()
        (outside / "elsewhere").touch()
        assert not await watch.wait(0.05)


async def test_the_end_of_the_directory(tmp_path: Path) -> None:
    directory = tmp_path / "one"
    directory.mkdir()
    (tmp_path / "link").symlink_to("one")
    with DirectoryWatch(tmp_path / "link") as watch:
        directory.rename(tmp_path / "two")
        assert await settle(watch) == {""}
        assert not watch.ended, "what is renamed is the same directory"
        (tmp_path / "two").rmdir()
        assert await settle(watch) == {""}
        assert watch.ended


async def test_a_cancelled_wait_loses_nothing(tmp_path: Path) -> None:
    """Also when it was cancelled after the event loop had seen that there is something, before the task had."""
    with DirectoryWatch(tmp_path) as watch:
        for turns in range(4):
            (tmp_path / "file").touch()
            waiting = asyncio.create_task(watch.wait(5))
            for _ in range(turns):
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
            assert await watch.wait(5)
            assert watch.take() == {"file"}
            assert not await watch.wait(0.01)


async def test_what_does_not_fit_a_buffer_comes_later(tmp_path: Path) -> None:
    wanted = {f"{number:0200d}" for number in range(600)}
    with DirectoryWatch(tmp_path) as watch:
        for name in wanted:
            (tmp_path / name).mkdir()
        assert await watch.wait(5)
        first = watch.take()
        assert first < wanted
        assert first | await settle(watch) == wanted


async def test_too_many_changes_are_told_by_the_empty_name(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.touch()
    with DirectoryWatch(tmp_path) as watch:
        for number in range(max_queued_events() + 1):  # in turn, as equal events in sequence count as one
            os.utime(files[number % 2])
        (tmp_path / "lost").touch()
        assert await settle(watch) == {"a", "b", ""}
        assert not watch.ended
        (tmp_path / "seen").touch()
        assert await settle(watch) == {"seen"}


def test_a_watch_that_cannot_be_made_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    with pytest.raises(FileNotFoundError):
        DirectoryWatch(tmp_path / "missing")
    with pytest.raises(NotADirectoryError):
        DirectoryWatch(tmp_path / "file")
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


async def test_a_closed_watch_leaves_nothing_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    with DirectoryWatch(tmp_path) as watch:
        await watch.wait(0.01)
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208
    with DirectoryWatch(tmp_path) as watch:  # of the same number: nothing of the first may be in its way
        (tmp_path / "file").touch()
        assert await watch.wait(5)
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


IN_USER_NAMESPACE = """
import asyncio, sys
from pathlib import Path
from structlog.testing import capture_logs
from nodeproxy.source.manifests import ManifestSource
from tests.source.replay import Replay

async def main(directory):
    replay = Replay()
    source = asyncio.create_task(ManifestSource(directory, "here").run(replay))
    await replay.synced()
    (directory / "a.yaml").write_text("{apiVersion: v1, kind: Service, metadata: {name: a}}")
    await replay.until(lambda: replay.names() == {"a"})
    await asyncio.sleep(0.7)
    (directory / "a.yaml").unlink()
    await replay.until(lambda: not replay.names())
    source.cancel()

with capture_logs() as logs:
    asyncio.run(main(Path(sys.argv[1])))
print([(entry["event"], entry["error"].partition("]")[0]) for entry in logs])
"""


@pytest.mark.parametrize(("limit", "number"), [("instances", errno.EMFILE), ("watches", errno.ENOSPC)])
def test_without_inotify_left_it_is_polled_and_said_once(tmp_path: Path, limit: str, number: int) -> None:
    shell = f'echo 0 > /proc/sys/user/max_inotify_{limit} && exec "$@"'
    namespace = ["unshare", "--user", "--map-root-user"]
    if subprocess.run([*namespace, "true"], check=False).returncode:
        pytest.skip("no user namespaces")
    command = [*namespace, "sh", "-c", shell, "sh", sys.executable, "-c", IN_USER_NAMESPACE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == f"[('cannot watch directory, polling it', '[Errno {number}')]\n", done.stderr


IDLE = """
import asyncio, sys
from pathlib import Path
from nodeproxy.source.manifests import ManifestSource
from tests.source.replay import Replay

def wakeups():
    lines = [line for file in Path("/proc/self/task").glob("*/status") for line in file.read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))

async def main():
    replay = Replay()
    source = asyncio.create_task(ManifestSource(sys.argv[1], "here").run(replay))
    await replay.synced()
    await asyncio.sleep(0.2)
    before = wakeups()
    await asyncio.sleep(2.5)
    print(wakeups() - before)
    source.cancel()

asyncio.run(main())
"""


def test_while_nothing_changes_it_wakes_up_once_a_second(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IDLE, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert 2 <= int(done.stdout) <= 10
