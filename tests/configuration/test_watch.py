"""A watched file: every way in which its content changes is noticed once, and nothing else is."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nodeproxy.configuration.watch import process_start, watch_file

_POLL = 0.05
_QUIET = 0.5  # long enough for several looks at the file


@asynccontextmanager
async def watched(path: Path) -> AsyncIterator[Callable[[], int]]:
    """A file that is watched; the value tells how many changes were noticed."""
    count = 0

    async def watch() -> None:
        nonlocal count
        async for _ in watch_file(path, poll_seconds=_POLL):
            count += 1

    task = asyncio.create_task(watch())
    await asyncio.sleep(_QUIET)
    yield lambda: count
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def noticed(count: Callable[[], int], expected: int) -> None:
    deadline = time.monotonic() + 10
    while count() < expected and time.monotonic() < deadline:  # noqa: ASYNC110 - counts what another task does
        await asyncio.sleep(0.02)
    await asyncio.sleep(_QUIET)
    assert count() == expected


async def test_writing_in_place_renaming_over_and_going_away(tmp_path: Path) -> None:
    path = tmp_path / "config.conf"
    path.write_text("one")
    async with watched(path) as count:
        assert count() == 0
        path.write_text("two")
        await noticed(count, 1)
        (tmp_path / "new").write_text("three")
        (tmp_path / "new").rename(path)
        await noticed(count, 2)
        path.unlink()
        await noticed(count, 2)
        path.write_text("three")  # as it was
        await noticed(count, 2)
        path.unlink()
        path.write_text("four")
        await noticed(count, 3)


async def test_the_same_content_written_again_is_no_change(tmp_path: Path) -> None:
    path = tmp_path / "config.conf"
    path.write_text("one")
    async with watched(path) as count:
        path.write_text("one")
        os.utime(path)
        await noticed(count, 0)


async def test_a_configmap_volume_switches_a_symbolic_link(tmp_path: Path) -> None:
    for name in ("1", "2"):
        (tmp_path / f"..{name}").mkdir()
        (tmp_path / f"..{name}" / "config.conf").write_text(name)
    (tmp_path / "..data").symlink_to("..1")
    path = tmp_path / "config.conf"
    path.symlink_to("..data/config.conf")
    async with watched(path) as count:
        (tmp_path / "..data_tmp").symlink_to("..2")
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")
        await noticed(count, 1)


async def test_a_file_that_is_written_slowly_is_noticed_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.conf"
    path.write_text("")
    async with watched(path) as count:
        with path.open("w") as file:
            for _ in range(20):
                file.write("line\n")
                file.flush()
                await asyncio.sleep(0.04)
        await noticed(count, 1)


async def test_a_file_that_comes_later_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "config.conf"
    async with watched(path) as count:
        path.write_text("one")
        await noticed(count, 1)


@pytest.mark.parametrize("before", [True, False])
async def test_a_change_between_reading_and_watching_is_not_lost(tmp_path: Path, before: bool) -> None:
    path = tmp_path / "config.conf"
    path.write_text("one")
    since = time.time() - 5 if before else time.time() + 5
    changes = watch_file(path, since, _POLL)
    first = asyncio.ensure_future(anext(changes))
    done, _ = await asyncio.wait([first], timeout=_QUIET)
    assert bool(done) is before
    first.cancel()


def test_the_start_of_this_process_is_past_and_before_its_files(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    assert process_start() < (tmp_path / "x").stat().st_ctime <= time.time() + 1
    assert process_start() > time.time() - 86400
