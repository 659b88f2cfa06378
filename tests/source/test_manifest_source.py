"""A manifest directory as a source: what is delivered when files come, change, break and go."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from nodeproxy.api.objects import Kind, ObjectKey, Service
from nodeproxy.source.decoding import Selection
from nodeproxy.source.events import Event
from nodeproxy.source.manifests import ManifestSource
from nodeproxy.source.manifests.file import parse_file
from tests.source.manifest_objects import endpoint_slice, node, service
from tests.source.replay import Replay


def key(name: str) -> ObjectKey:
    return ObjectKey(Kind.SERVICE, "shop", name)


def put(path: Path, *objects: Any) -> None:
    """Write as an atomic rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("---\n".join(o if isinstance(o, str) else yaml.safe_dump(o) for o in objects))
    temporary.rename(path)


def put_in_place(path: Path, *objects: Any) -> None:
    """Write over the old text."""
    path.write_text("---\n".join(map(yaml.safe_dump, objects)))


def max_queued_events() -> int:
    """What one inotify queue of this machine can hold."""
    return int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())


def port(replay: Replay, name: str) -> int | None:
    found = replay.objects.get(key(name))
    return found.spec.ports[0].port if isinstance(found, Service) and found.spec.ports else None


@asynccontextmanager
async def running(directory: Path, poll: float | None = None, sync: bool = True) -> AsyncIterator[Replay]:
    replay = Replay()
    task = asyncio.create_task(ManifestSource(directory, "here", poll_seconds=poll).run(replay))
    try:
        if sync:
            await replay.synced()
        yield replay
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.wait([task], timeout=5)
        assert task.cancelled(), task


@pytest.fixture(params=[None, 0.05], ids=["inotify", "polling"])
def poll(request: pytest.FixtureRequest) -> float | None:
    value: float | None = request.param
    return value


async def test_empty_directory_is_a_valid_state(tmp_path: Path, poll: float | None) -> None:
    async with running(tmp_path, poll) as replay:
        assert replay.complete == dict.fromkeys(Kind, 1)
        assert (replay.objects, replay.refused) == ({}, [])


async def test_files_come_change_and_go(tmp_path: Path, poll: float | None) -> None:
    put(tmp_path / "a.yaml", service("a"), endpoint_slice("a", ["10.0.0.1"]), node("here"), node("there"))
    async with running(tmp_path, poll) as replay:
        assert len(replay.objects) == 3
        put(tmp_path / "b.yml", service("b"))
        await replay.until(lambda: key("b") in replay.objects)
        put(tmp_path / "b.yml", service("b", 81))
        await replay.until(lambda: port(replay, "b") == 81)
        (tmp_path / "c.json").write_text(json.dumps(service("c")))  # in place
        await replay.until(lambda: key("c") in replay.objects)
        (tmp_path / "b.yml").unlink()
        await replay.until(lambda: key("b") not in replay.objects)
        (tmp_path / "c.json").write_text(json.dumps(service("c", 82)))
        await replay.until(lambda: port(replay, "c") == 82)
        (tmp_path / "c.json").rename(tmp_path / "c.json.off")
        await replay.until(lambda: key("c") not in replay.objects)
        (tmp_path / "ignored.txt").write_text("kind: Service")
        (tmp_path / ".hidden.yaml").write_text("nonsense: [")
        (tmp_path / "folder.yaml").mkdir()
        put(tmp_path / "d.yaml", service("d"))
        await replay.until(lambda: key("d") in replay.objects)
        assert replay.names() == {"a", "d"}
        assert (replay.redundant, replay.refused) == ([], [])
        assert replay.complete == dict.fromkeys(Kind, 1)
        assert replay.upserts[key("a")] == 1


async def test_only_what_differs_is_delivered(tmp_path: Path) -> None:
    put(tmp_path / "a.yaml", *[service(f"s{i}") for i in range(20)])
    async with running(tmp_path) as replay:
        events = replay.events
        os.utime(tmp_path / "a.yaml")
        put(tmp_path / "a.yaml", *[service(f"s{i}", 99 if i == 7 else 80) for i in range(20)])
        await replay.until(lambda: port(replay, "s7") == 99)
        await asyncio.sleep(0.2)
        assert replay.events == events + 1


async def test_change_arrives_within_a_tenth_of_a_second(tmp_path: Path) -> None:
    put(tmp_path / "a.yaml", endpoint_slice("a", ["10.0.0.1", "10.0.0.2"]))
    async with running(tmp_path) as replay:
        await asyncio.sleep(0.1)
        latencies = []
        for number in range(10):
            target = f"10.0.1.{number}"
            started = time.monotonic()
            put(tmp_path / "a.yaml", endpoint_slice("a", [target]))
            await replay.until(lambda target=target: target in str(replay.objects))  # type: ignore[misc]
            latencies.append(time.monotonic() - started)
        assert sorted(latencies)[5] < 0.1, latencies


async def test_unparseable_file_keeps_its_last_good_state(tmp_path: Path, poll: float | None) -> None:
    put(tmp_path / "a.yaml", service("a"), service("b"))
    async with running(tmp_path, poll) as replay:
        put(tmp_path / "a.yaml", "kind: [broken\n")
        await replay.until(lambda: bool(replay.refused))
        assert replay.names() == {"a", "b"}
        assert "line 2" in replay.refused[0].reason
        assert replay.refused[0].origin == f"{tmp_path / 'a.yaml'}, document 1 (line 1)"
        put(tmp_path / "a.yaml", service("b", 81))
        await replay.until(lambda: port(replay, "b") == 81 and replay.names() == {"b"})
        assert len(replay.refused) == 1


async def test_bad_object_keeps_its_own_last_good_state(tmp_path: Path) -> None:
    put(tmp_path / "a.yaml", service("a"), service("b"), service("c"))
    async with running(tmp_path) as replay:
        put(tmp_path / "a.yaml", service("a", "x"), service("b", 81))  # a broken, b changed, c removed
        await replay.until(lambda: replay.names() == {"a", "b"})
        assert (port(replay, "a"), port(replay, "b")) == (80, 81)
        assert [(r.key, r.reason) for r in replay.refused] == [(key("a"), "spec.ports[0].port: Expected `int`, got `str`")]
        assert replay.refused[0].origin.startswith(f"{tmp_path / 'a.yaml'}, document 1")


async def test_bad_document_keeps_what_it_may_have_held(tmp_path: Path) -> None:
    put(tmp_path / "a.yaml", service("a"), service("b"))
    async with running(tmp_path) as replay:
        put(tmp_path / "a.yaml", service("a", 81), "metadata: {name: b\n")
        await replay.until(lambda: port(replay, "a") == 81 and bool(replay.refused))
        assert replay.names() == {"a", "b"}
        assert replay.refused[0].origin.startswith(f"{tmp_path / 'a.yaml'}, document 2")


async def test_first_file_by_name_holds(tmp_path: Path) -> None:
    put(tmp_path / "b.yaml", service("x", 2))
    put(tmp_path / "c.yaml", service("x", 3))
    async with running(tmp_path) as replay:
        assert port(replay, "x") == 2
        assert [(r.key, r.origin) for r in replay.refused] == [(key("x"), str(tmp_path / "c.yaml"))]
        assert "b.yaml" in replay.refused[0].reason
        put(tmp_path / "a.yaml", service("x", 1))
        await replay.until(lambda: port(replay, "x") == 1)
        await replay.until(lambda: [Path(r.origin).name for r in replay.refused] == ["c.yaml", "b.yaml"])
        (tmp_path / "a.yaml").unlink()
        await replay.until(lambda: port(replay, "x") == 2)
        (tmp_path / "b.yaml").unlink()
        await replay.until(lambda: port(replay, "x") == 3)
        (tmp_path / "c.yaml").unlink()
        await replay.until(lambda: not replay.objects)
        assert replay.deletes[key("x")] == 1


async def test_missing_and_vanishing_directory(tmp_path: Path, poll: float | None) -> None:
    directory = tmp_path / "manifests"
    async with running(directory, poll, sync=False) as replay:
        await replay.until(lambda: bool(replay.refused))
        assert "No such file or directory" in replay.refused[0].reason
        assert replay.refused[0].origin == str(directory)
        assert not replay.complete
        directory.mkdir()
        put(directory / "a.yaml", service("a"))
        await replay.synced()
        await replay.until(lambda: replay.names() == {"a"})
        directory.rename(tmp_path / "away")
        await replay.until(lambda: len(replay.refused) == 2)
        assert replay.names() == {"a"}
        await asyncio.sleep(1.2)
        assert len(replay.refused) == 2, "said once"
        directory.mkdir()  # empty: a valid state
        await replay.until(lambda: not replay.objects)
        put(directory / "b.yaml", service("b"))
        await replay.until(lambda: replay.names() == {"b"})
        shutil.rmtree(directory)
        await replay.until(lambda: len(replay.refused) == 3)


async def test_directory_replaced_by_another(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    put(tmp_path / "one" / "a.yaml", service("a"))
    put(tmp_path / "two" / "b.yaml", service("b"))
    (tmp_path / "now").symlink_to("one")
    async with running(tmp_path / "now") as replay:
        assert replay.names() == {"a"}
        (tmp_path / "next").symlink_to("two")
        (tmp_path / "next").rename(tmp_path / "now")
        await replay.until(lambda: replay.names() == {"b"})
        put(tmp_path / "two" / "c.yaml", service("c"))
        await replay.until(lambda: replay.names() == {"b", "c"})


async def test_directory_removed_and_made_again_at_once(tmp_path: Path) -> None:
    """It may get the same inode number: only inotify tells that it is another."""
    directory = tmp_path / "manifests"
    directory.mkdir()
    put(directory / "a.yaml", service("a"))
    async with running(directory) as replay:
        for name in ("b", "c", "d"):
            shutil.rmtree(directory)
            directory.mkdir()
            await replay.until(lambda: not replay.objects)
            put(directory / "a.yaml", service(name))
            await replay.until(lambda name=name: replay.names() == {name})  # type: ignore[misc]


async def test_burst_is_gathered(tmp_path: Path) -> None:
    replay = Replay()
    batches: list[Sequence[Event]] = []

    def deliver(events: Sequence[Event]) -> None:
        batches.append(events)
        replay(events)

    task = asyncio.create_task(ManifestSource(tmp_path, "here").run(deliver))
    await replay.synced()
    batches.clear()
    for number in range(20):
        put(tmp_path / f"{number}.yaml", service(f"s{number}"))
        await asyncio.sleep(0.001)
    await replay.until(lambda: len(replay.objects) == 20)
    task.cancel()
    assert len(batches) < 10


async def test_more_changes_than_inotify_can_hold(tmp_path: Path) -> None:
    put(tmp_path / "a.yaml", service("a"))
    async with running(tmp_path) as replay:
        await asyncio.sleep(0.1)
        for _ in range(max_queued_events() // 2 + 1):
            os.utime(tmp_path / "a.yaml")
            os.utime(tmp_path)
        put(tmp_path / "b.yaml", service("b"))  # of this inotify says nothing
        await replay.until(lambda: replay.names() == {"a", "b"})


async def test_configmap_volume_switches_a_link(tmp_path: Path) -> None:
    for version, number in (("v1", 80), ("v2", 81)):
        (tmp_path / version).mkdir()
        put(tmp_path / version / "a.yaml", service("a", number))
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "a.yaml").symlink_to("..data/a.yaml")
    async with running(tmp_path) as replay:
        assert port(replay, "a") == 80
        (tmp_path / "..data_tmp").symlink_to("v2")
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")
        await replay.until(lambda: port(replay, "a") == 81, 1.0)


async def test_file_written_in_place_slowly_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    text = "---\n".join(yaml.safe_dump(service(f"s{i}")) for i in range(50))
    path.write_text(text)
    async with running(tmp_path) as replay:
        with path.open("w") as file:
            for start in range(0, len(text), len(text) // 10):
                file.write(text[start : start + len(text) // 10])
                file.flush()
                await asyncio.sleep(0.03)
            file.write("---\n" + yaml.safe_dump(service("last")))
        await replay.until(lambda: "last" in replay.names())
        await asyncio.sleep(0.2)
        assert not replay.deletes
        assert not replay.refused


async def test_file_never_quiet_is_taken_all_the_same(tmp_path: Path) -> None:
    put(tmp_path / "a.yaml", service("a"), service("b"))
    async with running(tmp_path) as replay:
        async with asyncio.timeout(5):
            while replay.names() != {"a"}:
                (tmp_path / "a.yaml").write_text(yaml.safe_dump(service("a")) + f"# {time.monotonic_ns()}\n")
                await asyncio.sleep(0.02)


async def test_unreadable_file_is_named_once(tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "dangling.yaml").symlink_to("nowhere")
    put(tmp_path / "z.yaml", service("z"))
    async with running(tmp_path, 0.05) as replay:
        await asyncio.sleep(0.3)
        assert replay.names() == {"z"}
        assert sorted(Path(r.origin).name for r in replay.refused) == ["loop.yaml", "pipe.yaml"]


async def test_hostile_file_does_not_hold_up_the_others(tmp_path: Path) -> None:
    laughs = "a0: &a0 [lol]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    (tmp_path / "a.yaml").write_text(laughs)
    with (tmp_path / "b.yaml").open("wb") as file:
        file.truncate(100 * 1024 * 1024)
    (tmp_path / "c.json").write_text("[" * 1_000_000)
    put(tmp_path / "z.yaml", service("z"))
    async with running(tmp_path) as replay:
        assert replay.names() == {"z"}
        assert {Path(r.origin.partition(",")[0]).name for r in replay.refused} == {"a.yaml", "b.yaml", "c.json"}


async def test_cancelled_in_the_middle_of_a_long_parse(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(("---\n" + yaml.safe_dump(service("a"))) * 50_000)
    replay = Replay()
    task = asyncio.create_task(ManifestSource(tmp_path, "here").run(replay))
    await asyncio.sleep(0.3)
    task.cancel()
    started = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.get_running_loop().shutdown_default_executor()
    assert time.monotonic() - started < 2
    assert not replay.complete


def fresh_look(directory: Path) -> dict[ObjectKey, Any]:
    """All objects of the directory, read anew."""
    fresh: dict[ObjectKey, Any] = {}
    for path in sorted(directory.glob("f*.yaml")):
        for name, value in parse_file(path, path.read_bytes(), Selection("here")).objects.items():
            fresh.setdefault(name, value)
    return fresh


def _mutations(directory: Path, rng: random.Random) -> list[Callable[[], None]]:
    """Random things that happen to a manifest directory, all files valid."""
    name = f"f{rng.randrange(4)}.yaml"
    objects = [service(f"s{i}", rng.randrange(1, 3)) for i in range(8) if rng.random() < 0.5]
    return [
        lambda: put(directory / name, *objects),
        lambda: (directory / name).unlink(missing_ok=True),
        lambda: put_in_place(directory / name, *objects),
    ]


@pytest.mark.parametrize("seed", range(3))
async def test_replayed_events_equal_a_fresh_look(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    async with running(tmp_path) as replay:
        for _ in range(60):
            rng.choice(_mutations(tmp_path, rng))()
            if rng.random() < 0.5:
                await asyncio.sleep(rng.random() * 0.05)
        fresh = fresh_look(tmp_path)
        await replay.until(lambda: replay.objects == fresh, 5)
        assert not replay.redundant
