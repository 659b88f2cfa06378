"""Archives of snapshots that were damaged on their way, or that somebody made so that they do harm."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path

import msgspec
import pytest

from hack.random_scenes import make_scene
from hack.scene_oracle import snapshot_of_scene
from nodeproxy.snapshot import archive as archive_module
from nodeproxy.snapshot.model import SnapshotError
from nodeproxy.snapshot.take import load, save

SNAPSHOT = snapshot_of_scene(make_scene(3))
DAMAGES = 60


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shot.tar.gz"


def refusal(path: Path) -> str:
    with pytest.raises(SnapshotError) as told:
        load(path)
    assert str(told.value).startswith(f"{path}: ")
    return str(told.value)


def write(path: Path, *members: tuple[tarfile.TarInfo, bytes], end: bytes = bytes(10240)) -> None:
    """An archive of just these members, as they say of themselves, behind a good SNAPSHOT."""
    about = tarfile.TarInfo("x/SNAPSHOT")
    content = msgspec.json.encode({"nodeproxy": "1", "taken": "", "origin": "", "objects": 0})
    about.size = len(content)
    with gzip.open(path, "wb") as file:
        for member, data in ((about, content), *members):
            file.write(member.tobuf(tarfile.PAX_FORMAT if member.pax_headers else tarfile.GNU_FORMAT))
            file.write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
        file.write(end)


def member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size, made.type = size, kind
    return made


def test_a_byte_that_is_another_one_is_refused_or_changes_nothing(path: Path) -> None:
    save(SNAPSHOT, path)
    good, wanted = path.read_bytes(), load(path)
    header = good.index(b"\0", 10) + 1  # with a name and a time, which nobody reads
    for number in range(DAMAGES):
        position = header + number * (len(good) - header) // DAMAGES
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x24]) + good[position + 1 :])
        refusal(path)
    path.write_bytes(good[:5] + b"x" + good[6:])
    assert load(path).objects == wanted.objects


def test_one_that_was_cut_short_is_refused(path: Path) -> None:
    save(SNAPSHOT, path)
    good = path.read_bytes()
    for left in (len(good) - 1, len(good) - 8, len(good) - 20, len(good) // 2, 30):
        path.write_bytes(good[:left])
        refusal(path)


def test_the_good_one_of_these_tests_can_be_read(path: Path) -> None:
    write(path, (member("x/empty"), b""), (member("d", kind=tarfile.DIRTYPE), b""), (member("z", 3, b"Z"), b"abc"))
    assert load(path).objects == ()


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_header_is_not_taken_into_memory_at_any_size(path: Path, kind: bytes) -> None:
    write(path, (member("long", 1 << 20, kind), bytes(1 << 20)), (member("x/services-001.json"), b""))
    assert refusal(path).endswith("holds a header of more than 64 KiB: that is no snapshot, or a damaged one")


def test_nor_are_many_headers_of_one_member(path: Path) -> None:
    write(path, *[(member("long", 512, tarfile.GNUTYPE_LONGNAME), bytes(512))] * 100, (member("x/a"), b""))
    assert "holds a header of more than 64 KiB" in refusal(path)


def test_members_without_content_are_not_without_number(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "_MEMBERS", 20)
    write(path, *[(member("x/a"), b"")] * 19)
    load(path)
    write(path, *[(member("x/a"), b"")] * 20)
    assert "holds more than 20 files" in refusal(path)


@pytest.mark.parametrize("at", ["a file", "what is no file", "behind the end"])
def test_everything_that_is_unpacked_counts(path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    monkeypatch.setattr(archive_module, "_ARCHIVE_BYTES", 1 << 20)
    much = bytes(1 << 20)
    if at == "behind the end":
        write(path, end=much)
    else:
        write(path, (member("x/a", len(much), tarfile.REGTYPE if at == "a file" else b"Z"), much))
    assert "holds more than 0 GiB" in refusal(path)


def test_a_hole_is_not_written_out(path: Path) -> None:
    holes = member("x/a", 2)
    holes.pax_headers = {"GNU.sparse.map": "0,2", "GNU.sparse.size": str(1 << 40)}
    write(path, (holes, b"ab"))
    assert "holds the sparse file 'x/a'" in refusal(path)


def test_it_is_not_read_in_circles(path: Path) -> None:
    write(path, (member("z", -1024, b"Z"), b""))
    assert "holds a header that leads backwards" in refusal(path)
