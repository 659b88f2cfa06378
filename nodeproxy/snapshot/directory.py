"""Owns the form of a snapshot on disk: a directory of manifests and a configuration, or a .tar.gz of one.

`nodeproxy run --manifests DIR --config DIR/config.conf` programs what the node's own agent programs. The file SNAPSHOT, that
no agent reads, says when and whence it was taken, and holds what a KubeProxyConfiguration has no field for.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, Annotated, Final, Literal

import msgspec
import structlog
from msgspec import Meta, Struct
from msgspec.structs import replace

from nodeproxy.api.objects import ApiObject, Kind, Labels, ObjectMeta
from nodeproxy.cluster.addresses import parse_address
from nodeproxy.cluster.findings import printable, quoted
from nodeproxy.configuration.agent_config import AgentConfig, ConfigError
from nodeproxy.configuration.effective import as_document
from nodeproxy.configuration.resolve import resolve
from nodeproxy.forwarding.table import Family
from nodeproxy.snapshot.archive import unpack
from nodeproxy.snapshot.gathering import Gathering
from nodeproxy.snapshot.model import BOTH_FAMILIES, Snapshot, SnapshotError
from nodeproxy.source.decoding import DECODE_ERRORS, Selection
from nodeproxy.source.manifests.scan import ManifestScanner

CONFIG: Final = "config.conf"
ABOUT: Final = "SNAPSHOT"
_ARCHIVE: Final = ".tar.gz"
_FILE_BYTES: Final = 16 << 20  # a manifest file may have 64 MiB
_NAMES: Final = {Kind.NODE: "node", Kind.SERVICE: "services", Kind.ENDPOINT_SLICE: "endpoint-slices"}
_API_VERSIONS: Final = {Kind.NODE: "v1", Kind.SERVICE: "v1", Kind.ENDPOINT_SLICE: "discovery.k8s.io/v1"}
_ELSEWHERE: Final = frozenset({"kubeconfig", "master", "manifests", "service_proxy_name"})
"""Settings that say where the state came from. What is written is selected already, and needs none of them."""

_log = structlog.get_logger(__name__)


class _Flags(Struct, omit_defaults=True, frozen=True):
    """What matters to a node and has no field in config.conf, by field of `AgentConfig`."""

    iptables_variant: Literal["legacy", "nft"] | None = None
    ipvs_drain_timeout: Annotated[float, Meta(ge=0)] = AgentConfig(node_name="").ipvs_drain_timeout


class _About(Struct, rename="camel"):
    """The file SNAPSHOT."""

    nodeproxy: str
    taken: str
    origin: str
    objects: int
    refused: int = 0
    node_addresses: tuple[str, ...] = ()
    families: tuple[Family, ...] = BOTH_FAMILIES
    flags: _Flags = _Flags()


def save(snapshot: Snapshot, path: Path) -> None:
    """Write a directory, or an archive where `path` ends in .tar.gz. What was refused is not written.

    A snapshot that is there is replaced. Raises `SnapshotError`, also where something else is there.
    """
    try:
        if path.name.endswith(_ARCHIVE):
            _save_archive(_files(snapshot), path)
        else:
            _save_directory(_files(snapshot), path)
    except OSError as error:
        raise SnapshotError(f"{path}: {error.strerror or error}") from error


def write_archive(snapshot: Snapshot, file: IO[bytes]) -> None:
    """Write a .tar.gz to a file that need not be one on disk. Raises OSError."""
    _write_archive(_files(snapshot), file, "snapshot")


def load(path: Path, node_name: str | None = None) -> Snapshot:
    """Read what `save` wrote; or a plain directory of manifests, with the configuration in its config.conf if there is one.

    `node_name`: the node to look from, instead of the configuration's. Raises `SnapshotError`.
    """
    try:
        if path.is_dir():
            return _load_directory(path, path, node_name)
        if not path.exists():
            raise SnapshotError(f"{path}: no such file or directory")
        with tempfile.TemporaryDirectory(prefix="nodeproxy-snapshot-") as directory:
            _unpack(path, Path(directory))
            return _load_directory(Path(directory), path, node_name)
    except OSError as error:
        raise SnapshotError(f"{path}: {error.strerror or error}") from error


def _files(snapshot: Snapshot) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file, SNAPSHOT first, so that one which was cut short can be written again."""
    import yaml  # noqa: PLC0415 - the agent does without

    config = replace(snapshot.config, **dict.fromkeys(_ELSEWHERE))
    about = _About(
        nodeproxy=version("nodeproxy"),
        taken=snapshot.taken,
        origin=snapshot.origin,
        objects=len(snapshot.objects),
        refused=len(snapshot.refused),
        node_addresses=snapshot.node_addresses,
        families=snapshot.families,
        flags=msgspec.convert(config, _Flags, from_attributes=True),
    )
    yield ABOUT, msgspec.json.format(msgspec.json.encode(about)) + b"\n"
    yield CONFIG, yaml.safe_dump(as_document(config), sort_keys=True).encode()
    for kind, name in _NAMES.items():
        lines = (_line(one) for one in snapshot.objects if one.key.kind is kind)
        for number, content in enumerate(_lists(lines), 1):
            yield f"{name}-{number:03}.json", content


def _lists(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Lists of objects, an object a line, none much larger than a manifest file should be."""
    held: list[bytes] = []
    size = 0
    for line in lines:
        held.append(line)
        size += len(line)
        if size >= _FILE_BYTES:
            yield _list(held)
            held, size = [], 0
    if held:
        yield _list(held)


def _list(lines: list[bytes]) -> bytes:
    return b'{"apiVersion":"v1","kind":"List","items":[\n' + b",\n".join(lines) + b"\n]}\n"


def _line(obj: ApiObject) -> bytes:
    """An object with what decides forwarding, as JSON. Selected already, it needs no label that says so."""
    kind = obj.key.kind
    metadata = obj.metadata
    labels = metadata.labels
    kept = Labels(service_name=labels.service_name, zone=labels.zone) if labels is not None else None
    stripped = replace(
        obj,
        metadata=ObjectMeta(
            name=metadata.name,
            namespace=metadata.namespace,
            creation_timestamp=metadata.creation_timestamp if kind is Kind.SERVICE else None,
            labels=None if kept == Labels() else kept,
        ),
    )
    if kind is Kind.NODE and stripped.spec is not None:  # type: ignore[union-attr]
        stripped = replace(stripped, spec=replace(stripped.spec, taints=None))  # type: ignore[union-attr]
    head = f'{{"apiVersion":"{_API_VERSIONS[kind]}","kind":"{kind}",'.encode()
    return head + msgspec.json.encode(stripped)[1:]


def _save_directory(files: Iterable[tuple[str, bytes]], path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise SnapshotError(f"{path}: is not a directory")
    path.mkdir(parents=True, exist_ok=True)
    present = list(path.iterdir())
    if present and path / ABOUT not in present:
        raise SnapshotError(f"{path}: is not empty and holds no snapshot; choose another directory")
    for old in present:
        if old.name == CONFIG or any(old.match(f"{name}-[0-9][0-9][0-9].json") for name in _NAMES.values()):
            old.unlink()
    for name, content in files:
        (path / name).write_bytes(content)


def _save_archive(files: Iterable[tuple[str, bytes]], path: Path) -> None:
    if path.exists():
        with tempfile.TemporaryDirectory(prefix="nodeproxy-snapshot-") as directory:
            _unpack(path, Path(directory))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            _write_archive(files, file, path.name.removesuffix(_ARCHIVE))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_archive(files: Iterable[tuple[str, bytes]], file: IO[bytes], directory: str) -> None:
    with tarfile.open(fileobj=file, mode="w|gz") as archive:
        for name, content in files:
            member = tarfile.TarInfo(f"{directory}/{name}")
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))


def _unpack(path: Path, directory: Path) -> None:
    """Unpack an archive into a directory. Raises `SnapshotError` where it holds no snapshot, and OSError."""
    unpack(path, directory)
    if not (directory / ABOUT).exists():
        raise SnapshotError(f"{path}: holds no snapshot (no file {ABOUT} in it)")


def _load_directory(directory: Path, path: Path, node_name: str | None) -> Snapshot:
    """The snapshot in `directory`, which the user knows as `path`."""
    about = _read_about(directory / ABOUT, path)
    written = _read_config(directory / CONFIG, about.flags if about else _Flags(), path)
    config = replace(written, node_name=node_name or written.node_name)
    gathering = Gathering(config.node_name)
    gathering.deliver(ManifestScanner(directory, Selection(config.node_name)).scan(settled=True).events)
    if about is None:
        return gathering.snapshot(config, f"manifests {path}")
    snapshot = gathering.snapshot(
        config,
        f"snapshot {path} of {about.origin}",
        node_addresses=about.node_addresses,
        families=about.families,
        taken=about.taken,
    )
    # Of an archive the user knows no directory.
    named = tuple(replace(one, origin=one.origin.replace(str(directory), str(path))) for one in snapshot.refused)
    snapshot = replace(snapshot, refused=named)
    _tell_of_missing(snapshot, about.objects - (config.node_name != written.node_name), path)
    return snapshot


def _tell_of_missing(snapshot: Snapshot, written: int, path: Path) -> None:
    """No error: people may take objects out of a snapshot, to see what becomes of it without them."""
    named = {one.key for one in snapshot.objects} | {one.key for one in snapshot.refused if one.key is not None}
    if len(named) < written:
        _log.warning(
            "the snapshot has fewer objects than it was written with",
            snapshot=str(path),
            objects=len(named),
            written=written,
        )


def _read_about(file: Path, path: Path) -> _About | None:
    if not file.exists():
        return None
    try:
        about = msgspec.json.decode(file.read_bytes(), type=_About)
    except DECODE_ERRORS as error:
        raise SnapshotError(f"{path}: {ABOUT}: {error}") from error
    addresses = [parse_address(text) for text in about.node_addresses]
    for index, (text, address) in enumerate(zip(about.node_addresses, addresses, strict=True)):
        if address is None:
            raise SnapshotError(f"{path}: {ABOUT}: nodeAddresses[{index}]: {quoted(text)} is not an IP address")
    return replace(
        about,
        taken=printable(about.taken),
        origin=printable(about.origin),
        node_addresses=tuple(address.text for address in addresses if address is not None),
    )


def _read_config(file: Path, flags: _Flags, path: Path) -> AgentConfig:
    try:
        config = resolve(file if file.exists() else None).usable()
    except ConfigError as error:
        raise SnapshotError(f"{path}: {error.complaints[0]}".replace(str(file), CONFIG)) from error
    return replace(config, **msgspec.structs.asdict(flags))
