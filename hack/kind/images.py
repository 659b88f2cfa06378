"""Owns images in Docker's engine: there already, else from our cache, else pulled, else built; in this order.

An image that we build carries the label `nodeproxy.key`, the hash of all that it is made of, and its archive is kept
in the cache (`docker save`), so that an engine with an empty data-root is served without building or network.
`NODEPROXY_PULL=never` pulls nothing, `always` builds nothing; the usual is to try.
"""

from __future__ import annotations

import hashlib
import os
import selectors
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from hack.kind.command import again, environment, run, succeeds
from hack.kind.places import KindError, built, cache, locked
from hack.kind.progress import say, step

KEY_LABEL: Final = "nodeproxy.key"
_FIRST_WORD: Final = 10.0  # seconds in which a registry that can be reached has named the image
_PULL_LIMIT: Final = 900.0
_KEPT_ARCHIVES: Final = 2  # besides the new one
_unreachable: set[str] = set()


@dataclass(frozen=True)
class Image:
    """An image by its reference, and the key of what it is made of where we build it (empty: any will do)."""

    reference: str
    key: str = ""

    @property
    def archive(self) -> Path:
        """Where the cache keeps it."""
        name = self.reference.replace("/", "_").replace(":", "_")
        return cache() / "images" / f"{name.removesuffix(f'-{self.key}')}-{self.key}.tar"


def ensure(image: Image, build: Callable[[], None], *, pull: bool = False) -> str:
    """Have the image in the engine, and return its reference. `build` has to make it, with the label `nodeproxy.key`."""
    if fits(image):
        return image.reference
    lock = cache() / "images" / f"{hashlib.sha256(image.reference.encode()).hexdigest()[:12]}.lock"
    with locked(lock):
        if fits(image) or _load(image) or (pull and pulled(image.reference)):
            return image.reference
        if os.environ.get("NODEPROXY_PULL") == "always":
            raise KindError(f"{image.reference} cannot be pulled, and NODEPROXY_PULL=always forbids to build it")
        say(f"building {image.reference}")
        with step(f"building {image.reference}"):
            build()
        _forget_older(image)
        if not fits(image):
            raise KindError(f"{image.reference} was built without the label {KEY_LABEL}={image.key}")
        _save(image)
    return image.reference


def fits(image: Image) -> bool:
    """Whether the engine has the image, made of what it is to be made of."""
    template = '{{index .Config.Labels "' + KEY_LABEL + '"}}'
    try:
        found = run(["docker", "image", "inspect", "--format", template, image.reference]).strip()
    except KindError:
        return False
    return not image.key or found == image.key


def identity(reference: str) -> str:
    """The id of an image in the engine."""
    return run(["docker", "image", "inspect", "--format", "{{.Id}}", reference]).strip()


def pulled(reference: str) -> bool:
    """Whether the image could be pulled; registries that do not answer are asked once, and not waited for."""
    first = reference.partition("/")[0]
    registry = first if "." in first else "docker.io"
    if os.environ.get("NODEPROXY_PULL") == "never" or registry in _unreachable:
        return False
    with step(f"pulling {reference}"):
        process = subprocess.Popen(
            ["docker", "pull", reference],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(),
        )
        assert process.stdout is not None
        with process, selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(_FIRST_WORD):
                process.kill()
            try:
                process.communicate(timeout=_PULL_LIMIT)
            except subprocess.TimeoutExpired:
                process.kill()
    if process.returncode:
        _unreachable.add(registry)
        say(f"{reference} cannot be pulled: {registry} does not give it")
    return process.returncode == 0


@again
def build(context: Path, reference: str, *, key: str, arguments: Mapping[str, str] | None = None) -> None:
    """`docker build` with whichever builder the client has."""
    options = ["--load"] if _has_buildx() else []
    for name, value in (arguments or {}).items():
        options += ["--build-arg", f"{name}={value}"]
    if key:
        options += ["--label", f"{KEY_LABEL}={key}"]
    run(
        ["docker", "build", "--quiet", *options, "--tag", reference, str(context)],
        env={} if _has_buildx() else {"DOCKER_BUILDKIT": "0"},
    )


def key(parts: Iterable[bytes | str | Path]) -> str:
    """A hash of texts and of files with what is in them (a directory: all below it, with their modes)."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            files = sorted(part.rglob("*")) if part.is_dir() else [part]
            for file in files:
                if file.is_file() and "__pycache__" not in file.parts:
                    digest.update(f"{file.relative_to(part.parent)} {file.stat().st_mode:o}\0".encode())
                    digest.update(hashlib.sha256(file.read_bytes()).digest())
        else:
            digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:12]


def _forget_older(image: Image) -> None:
    """What this one replaces, and nobody uses: images without a name, and all but the newest archives."""
    if not image.key:
        return
    run(["docker", "image", "prune", "--force", "--filter", f"label={KEY_LABEL}"])
    repository = image.reference.rsplit(":", 1)[0]
    listed = run(
        ["docker", "image", "ls", "--filter", f"label={KEY_LABEL}", "--format", "{{.Repository}}:{{.Tag}}", repository]
    )
    for other in set(listed.split()) - {image.reference}:
        if other.startswith(f"{repository}:") and other.rsplit("-", 1)[0] == image.reference.rsplit("-", 1)[0]:
            succeeds(["docker", "rmi", other])  # refused while a container is made of it
    archives = cache().glob(f"images/{repository.replace('/', '_')}_*.tar")
    for archive in sorted(archives, key=lambda path: path.stat().st_mtime, reverse=True)[_KEPT_ARCHIVES:]:
        archive.unlink(missing_ok=True)
        archive.with_name(f"{archive.name}.lock").unlink(missing_ok=True)


def _load(image: Image) -> bool:
    if not image.key or not image.archive.exists():
        return False
    with step(f"loading {image.reference} from {image.archive}"):
        run(["docker", "load", "--quiet", "--input", image.archive])
    return fits(image)


def _save(image: Image) -> None:
    if not image.key:
        return
    with built(image.archive) as work:
        if work is not None:
            with step(f"saving {image.reference} in the cache"):
                run(["docker", "save", "--output", work, image.reference])


@lru_cache(maxsize=1)
def _has_buildx() -> bool:
    return succeeds(["docker", "buildx", "version"])
