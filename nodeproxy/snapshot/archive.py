"""Owns unpacking the .tar.gz of a snapshot, which somebody else may have made, and which may be damaged."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import Final

from nodeproxy.snapshot.model import SnapshotError

_ARCHIVE_BYTES: Final = 2 << 30
_MEMBERS: Final = 10_000
_HEADER_BYTES: Final = 64 << 10  # of one member, with its long name or extended headers
_CHUNK_BYTES: Final = 64 << 10


def unpack(path: Path, directory: Path) -> None:
    """Write the regular files of an archive into a directory, by their last names. Raises `SnapshotError` and OSError.

    It is read to its very end, where its checksum is.
    """
    try:
        with gzip.open(path) as file:
            content = _Content(path, file)
            with tarfile.open(fileobj=content, mode="r:") as archive:
                for number, member in enumerate(archive, 1):
                    content.check(number <= _MEMBERS, f"more than {_MEMBERS} files")
                    content.check(not member.issparse(), f"the sparse file {member.name!r}")
                    if member.isfile() and (data := archive.extractfile(member)) is not None:
                        content.allowed = member.size
                        with (directory / Path(member.name).name).open("wb") as target:
                            shutil.copyfileobj(data, target, _CHUNK_BYTES)
                    content.allowed = _HEADER_BYTES
            content.read_to_end()
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError) as error:
        raise SnapshotError(f"{path}: neither a directory nor a .tar.gz of a snapshot, or damaged: {error}") from error


class _Content(io.BufferedIOBase):
    """What an archive holds when unzipped, read once and forwards, as `tarfile` does. `allowed`: how much may be read next.

    `tarfile` believes the sizes that an archive tells, and holds a header of any size in memory. Raises `SnapshotError`
    where no snapshot is so large.
    """

    def __init__(self, path: Path, file: gzip.GzipFile) -> None:
        self.allowed = _HEADER_BYTES
        self._path = path
        self._file = file
        self._position = 0

    def check(self, good: bool, held: str) -> None:
        """Raise `SnapshotError` where `held` is in it, and `good` is not so."""
        if not good:
            raise SnapshotError(f"{self._path}: holds {held}: that is no snapshot, or a damaged one")

    def read(self, size: int | None = None, /) -> bytes:
        """So many bytes, fewer only at the end."""
        size = -1 if size is None else size
        self.check(0 <= size <= self.allowed, f"a header of more than {_HEADER_BYTES >> 10} KiB")
        self.allowed -= size
        return self._take(size)

    def tell(self) -> int:
        """Where it is read next."""
        return self._position

    def seek(self, position: int, whence: int = io.SEEK_SET, /) -> int:
        """Go on to a position."""
        self.check(whence == io.SEEK_SET and position >= self._position, "a header that leads backwards")
        while self._position < position and self._take(min(_CHUNK_BYTES, position - self._position)):
            pass
        return self._position

    def read_to_end(self) -> None:
        """Pass over what is left. Raises `gzip.BadGzipFile` where the checksum is another one."""
        while self._take(_CHUNK_BYTES):
            pass

    def _take(self, size: int) -> bytes:
        data = self._file.read(size)
        self._position += len(data)
        self.check(self._position <= _ARCHIVE_BYTES, f"more than {_ARCHIVE_BYTES >> 30} GiB")
        return data
