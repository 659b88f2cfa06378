"""Owns the image `nodeproxy:dev`: its build context (deploy/Dockerfile, and wheels from requirements.lock), and its build.

    python -m hack.kind.agent_image DIRECTORY [--platform linux/arm64 …]

makes the context alone, for building by hand: `docker build DIRECTORY`, or for several architectures `docker buildx build`.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import click

from hack.kind.base_image import base_image
from hack.kind.command import run
from hack.kind.images import Image, build, ensure, key
from hack.kind.places import REPOSITORY, KindError
from hack.kind.progress import say, step

REFERENCE: Final = "nodeproxy:dev"
_DOCKERFILE: Final = REPOSITORY / "deploy" / "Dockerfile"
_ASSEMBLE: Final = REPOSITORY / "deploy" / "image" / "assemble.py"
_SOURCES: Final = ("nodeproxy", "pyproject.toml", "LICENSE")
_PYTHON: Final = "311"  # of Debian 12
# Which wheels Debian 12 takes, the newest C library first.
_TAGS: Final = (*(f"manylinux_2_{minor}" for minor in (36, 35, 34, 31, 28, 27, 24, 17)), "manylinux2014")
_MACHINES: Final = {"linux/amd64": "x86_64", "linux/arm64": "aarch64"}
# A package that only kubernetes.aio imports, which assemble.py leaves out.
_NOT_USED: Final = ("aiohttp-retry",)
_EXTRAS: Final = ("operator",)  # the image is that of `nodeproxy operator`, too
_MINUTES: Final = 60


class Locked(NamedTuple):
    """A package of requirements.lock: as it stands there, and which packages (or ours) it is there for."""

    text: str
    needed_by: frozenset[str]


def agent_image() -> str:
    """The reference of the agent's image, which is in the engine; built if this clone's differs."""
    base = base_image()
    # Whatever the base is called, what is in it decides; its packages are those of today.
    made_of = key([*(REPOSITORY / name for name in _SOURCES), _DOCKERFILE, _ASSEMBLE, Path(__file__), requirements()])
    return ensure(Image(REFERENCE, made_of), lambda: _build(base, made_of))


def _build(base: str, made_of: str) -> None:
    with tempfile.TemporaryDirectory(prefix="nodeproxy-image-") as directory:
        machine = run(["docker", "version", "--format", "{{.Server.Os}}/{{.Server.Arch}}"]).strip()
        make_context(Path(directory), [machine])
        arguments = {"BASE": base, "VERSION": _version(), "REVISION": _revision()}
        build(Path(directory), REFERENCE, key=made_of, arguments=arguments)


def make_context(directory: Path, platforms: Sequence[str]) -> None:
    """Fill a directory with all that building the image for these platforms (`linux/amd64`, `linux/arm64`) needs."""
    if unknown := [platform for platform in platforms if platform not in _MACHINES]:
        raise KindError(f"no wheels are chosen for {', '.join(unknown)}: known are {', '.join(_MACHINES)}")
    wheels = directory / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    needed = wheels / "requirements.txt"
    needed.write_text(requirements())
    for platform in platforms:
        with step(f"wheels for {platform}"):
            _download(needed, wheels, _MACHINES[platform])
    wheel = _own_wheel(wheels)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with needed.open("a") as file:
        file.write(f"nodeproxy=={_version()} --hash=sha256:{digest}\n")
    shutil.copyfile(_DOCKERFILE, directory / "Dockerfile")
    shutil.copyfile(_ASSEMBLE, directory / "assemble.py")


def requirements() -> str:
    """What of requirements.lock an agent and the operator need, versions and hashes as they stand there."""
    locked = parse_lock((REPOSITORY / "requirements.lock").read_text())
    project = _project()
    lines = [*project["dependencies"], *(line for extra in _EXTRAS for line in project["optional-dependencies"][extra])]
    wanted = [re.split(r"[\s\[<>=!~;]", line)[0].lower() for line in lines]
    kept: dict[str, str] = {}
    while wanted:
        name = wanted.pop()
        if name in kept or name in _NOT_USED:
            continue
        if name not in locked:
            raise KindError(f"requirements.lock has no {name}, which pyproject.toml names: make it anew")
        kept[name] = locked[name].text
        wanted += [other for other, entry in locked.items() if name in entry.needed_by]
    return "".join(kept[name] for name in sorted(kept))


def parse_lock(text: str) -> dict[str, Locked]:
    """The packages of a lock file as pip-compile writes it, with hashes and `# via` notes."""
    found = {}
    for entry in re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE):
        name = re.match(r"[a-z0-9][a-z0-9._-]*(?===)", entry)
        if name is None:
            continue
        lines = entry.splitlines(keepends=True)
        notes = " ".join(line.strip(" #\n") for line in lines if line.lstrip().startswith("#"))
        needed_by = frozenset(notes.removeprefix("via").split())
        found[name[0]] = Locked("".join(line for line in lines if not line.lstrip().startswith("#")), needed_by)
    return found


def _download(needed: Path, target: Path, machine: str) -> None:
    platforms = [word for tag in _TAGS for word in ("--platform", f"{tag}_{machine}")]
    kinds = [
        "--implementation",
        "cp",
        "--python-version",
        _PYTHON,
        "--abi",
        f"cp{_PYTHON}",
        "--abi",
        "abi3",
        "--abi",
        "none",
    ]
    run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"),
            *("--only-binary=:all:", "--require-hashes", *platforms, *kinds, "--dest", target, "--requirement", needed),
        ],
        timeout=15 * _MINUTES,
    )


def _own_wheel(target: Path) -> Path:
    """The wheel of this clone; made from a copy, because setuptools leaves its work beside the sources."""
    with tempfile.TemporaryDirectory(prefix="nodeproxy-wheel-") as directory, step("the wheel of nodeproxy"):
        for name in _SOURCES:
            source = REPOSITORY / name
            if source.is_dir():
                shutil.copytree(source, Path(directory, name), ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, Path(directory, name))
        Path(directory, "README.md").write_text("A kube-proxy replacement for Linux nodes.\n")  # nobody reads it in an image
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
        run([*command, "--no-build-isolation", "--wheel-dir", target, directory], timeout=5 * _MINUTES)
    return next(target.glob("nodeproxy-*.whl"))


def _project() -> Mapping[str, Any]:
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        project: Mapping[str, list[str]] = tomllib.load(file)["project"]
    return project


def _version() -> str:
    return str(_project()["version"])


def _revision() -> str:
    try:
        return run(["git", "-C", REPOSITORY, "describe", "--always", "--dirty", "--abbrev=40"]).strip()
    except KindError:  # not a clone
        return "unknown"


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--platform", "platforms", multiple=True, default=["linux/amd64"], show_default=True, help="May be given again."
)
def main(directory: Path, platforms: tuple[str, ...]) -> None:
    """Make the build context of the agent's image in DIRECTORY, for `docker build` by hand."""
    try:
        make_context(directory, platforms)
    except KindError as error:
        raise SystemExit(f"agent_image: {error}") from error
    say(f"docker build --tag {REFERENCE} {directory}")


if __name__ == "__main__":
    main()
