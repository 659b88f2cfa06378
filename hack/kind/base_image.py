"""Owns the image `debian:bookworm-slim`: Debian's own where it can be pulled, else one made by debootstrap."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

from hack.kind.command import run
from hack.kind.images import KEY_LABEL, Image, ensure, key
from hack.kind.places import KindError
from hack.kind.progress import say, step
from hack.vm.debian import need
from hack.vm.places import VmError

REFERENCE: Final = "debian:bookworm-slim"
_SUITE: Final = "bookworm"
_MIRROR: Final = "http://deb.debian.org/debian"
_SECURITY: Final = "http://deb.debian.org/debian-security"
# What Debian's slim images leave out; dpkg leaves it out of later packages, too.
_EXCLUDED: Final = ("usr/share/doc", "usr/share/info", "usr/share/locale", "usr/share/man", "usr/share/lintian")
_DPKG: Final = "".join(f"path-exclude /{folder}/*\n" for folder in _EXCLUDED) + "path-include /usr/share/doc/*/copyright\n"
_APT: Final = """APT::Install-Recommends "false";
Acquire::Languages "none";
Acquire::GzipIndexes "true";
DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb || true"; };
"""


def base_image() -> str:
    """The reference of the base image, which is in the engine."""
    # Whatever carries the name is taken, so the key only names the archive in the cache.
    made_of = key([_SUITE, _mirror(), _DPKG, _APT])
    if _present():
        return REFERENCE
    return ensure(Image(REFERENCE, made_of), lambda: _debootstrap(made_of), pull=True)


def _present() -> bool:
    try:
        run(["docker", "image", "inspect", REFERENCE])
    except KindError:
        return False
    return True


def _debootstrap(made_of: str) -> None:
    if os.geteuid() != 0:
        raise KindError(f"{REFERENCE} cannot be pulled, and debootstrap needs root: run this as root")
    try:
        need({"debootstrap": "debootstrap", "tar": "tar"}, say)
    except VmError as error:
        raise KindError(str(error)) from error
    with tempfile.TemporaryDirectory(prefix="nodeproxy-debootstrap-", ignore_cleanup_errors=True) as work:
        root = Path(work, "root")
        with step("debootstrap"):
            run(["debootstrap", "--variant=minbase", _SUITE, root, _mirror()], timeout=1800)
        _slim(root)
        archive = Path(work, "root.tar")
        with step("docker import"):
            run(["tar", "--create", "--numeric-owner", "--one-file-system", "--file", archive, "--directory", root, "."])
            changes = (f"LABEL {KEY_LABEL}={made_of}", 'CMD ["bash"]', "ENV PATH=/usr/local/sbin:/usr/local/bin:"
                       "/usr/sbin:/usr/bin:/sbin:/bin")  # fmt: skip
            options = [word for change in changes for word in ("--change", change)]
            run(["docker", "import", *options, archive, REFERENCE])


def _slim(root: Path) -> None:
    """What Debian's slim images have of it: no documents, no package lists, all three archives as sources."""
    for folder in (*_EXCLUDED, "var/cache/apt", "var/lib/apt/lists", "var/log"):
        for path in (root / folder).glob("*"):
            if path.is_dir() and not path.is_symlink():
                _empty(path)
            else:
                path.unlink()
    lists = f"deb {_mirror()} {_SUITE} main\ndeb {_mirror()} {_SUITE}-updates main\n"
    security = _mirror() + "-security" if _mirror() != _MIRROR else _SECURITY
    (root / "etc/apt/sources.list").write_text(f"{lists}deb {security} {_SUITE}-security main\n")
    (root / "etc/apt/apt.conf.d/docker").write_text(_APT)
    (root / "etc/dpkg/dpkg.cfg.d/docker").write_text(_DPKG)
    for name in ("etc/hostname", "etc/resolv.conf"):  # of the machine that it was made on
        (root / name).write_text("")
    (root / "var/lib/apt/lists/partial").mkdir(parents=True, exist_ok=True)
    (root / "var/cache/apt/archives/partial").mkdir(parents=True, exist_ok=True)


def _empty(folder: Path) -> None:
    """Remove a folder of documents, but keep what licences ask to be kept."""
    kept = [path for path in folder.rglob("copyright") if "usr/share/doc" in str(path)]
    for path in sorted(folder.rglob("*"), reverse=True):
        if path in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        else:
            path.unlink()
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)


def _mirror() -> str:
    return os.environ.get("DEBIAN_MIRROR", _MIRROR).rstrip("/")
