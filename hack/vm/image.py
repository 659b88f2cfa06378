"""The VM's disks: ext4 images, made at native speed from files of this machine, and kept in the cache.

The system image holds the files of some Debian packages of this machine with all they depend on, the Python that .venv
is made of, and the kernel's modules. Directories as a whole (.venv, built Kubernetes binaries) are images of their own.
All are attached read-only; what the VM writes goes to its memory.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hack.vm.kernel import Kernel
from hack.vm.places import VENV, VmError, built, cache

FORMAT: Final = 3
"""Counts up where this module makes something else of the same input."""

PACKAGES: Final = """
    bash ca-certificates conntrack coreutils curl dash debianutils diffutils ethtool findutils grep gzip hostname
    ipset iproute2 iptables kmod libc-bin make mawk mount netbase nftables procps sed tar util-linux
"""
OPTIONAL: Final = "ipvsadm tcpdump strace iputils-ping e2fsprogs gdb less nano perl-base"
"""Present in the VM where this machine has them."""

_ETC: Final = """
    passwd group nsswitch.conf host.conf ld.so.conf ld.so.conf.d ld.so.cache ssl localtime alternatives
    ca-certificates.conf iproute2 protocols services ethertypes os-release debian_version profile
"""
_NOT_NEEDED: Final = re.compile(r"/usr/share/(doc|man|locale|info|lintian|bug|perl|perl5|zsh|i18n)/|/usr/lib/.*/(gconv)/")
_STDLIB_SKIP: Final = "test tests site-packages dist-packages idlelib tkinter turtledemo ensurepip lib2to3"


@dataclass(frozen=True)
class Disk:
    """An image and where it is mounted in the VM."""

    image: Path
    mounted: Path


def system(kernel: Kernel) -> Disk:
    """The root of the VM."""
    packages = _closure()
    text = [f"{name}={version}" for name, version in sorted(packages.items())]
    text += [str(FORMAT), kernel.version, sys.base_prefix, sys.version, _fingerprint(Path("/etc/alternatives"))]
    target = cache() / "images" / f"system-{_digest(text)}"
    with built(target) as work:
        if work is not None:
            _stage_system(work / "root", packages, kernel)
            _make(work / "root", work / "disk.ext4")
            shutil.rmtree(work / "root")
    return Disk(target / "disk.ext4", Path("/"))


def directories() -> list[Disk]:
    """Whole directories of this machine, each at its own place."""
    places = [VENV, *sorted(Path.home().glob(".cache/nodeproxy/kubernetes-*/bin"))]
    return [directory(place) for place in places if place.is_dir()]


def directory(place: Path) -> Disk:
    """The image of one directory."""
    ready = place / ".ready"
    mark = ready.read_text() if ready.exists() else ""
    inner = [place, *place.glob("bin"), *place.glob("lib/python3*/site-packages")]
    text = [str(FORMAT), str(place), mark, *(_fingerprint(each) for each in inner)]
    target = cache() / "images" / f"{place.name.strip('.')}-{_digest(text)}"
    with built(target) as work:
        if work is not None:
            _make(place, work / "disk.ext4")
    return Disk(target / "disk.ext4", place)


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _fingerprint(place: Path) -> str:
    """Names, sizes and times of what is directly in a directory."""
    entries = sorted(os.scandir(place), key=lambda entry: entry.name)
    facts = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries if entry.name != "__pycache__"]
    return " ".join(f"{name}:{fact.st_size}:{fact.st_mtime_ns}" for name, fact in facts)


def _closure() -> dict[str, str]:
    """The wanted packages with all they depend on, and their versions, as installed here."""
    form = "${db:Status-Abbrev}\t${Package}\t${Version}\t${Depends},${Pre-Depends}\t${Provides}\n"
    listed = subprocess.run(["dpkg-query", "-W", "-f", form], capture_output=True, text=True, check=True).stdout
    versions: dict[str, str] = {}
    needs: dict[str, list[list[str]]] = {}
    provider: dict[str, str] = {}
    for line in listed.splitlines():
        status, name, version, depends, provides = line.split("\t")
        if status.strip() != "ii":
            continue
        versions[name] = version
        needs[name] = [[_bare(one) for one in group.split("|")] for group in depends.split(",") if group.strip()]
        provider.update({_bare(one): name for one in provides.split(",") if one.strip()})
    missing = [name for name in PACKAGES.split() if name not in versions and name not in provider]
    if missing:
        raise VmError(f"packages that the VM is made of are not installed here: {' '.join(missing)} (apt-get install them)")
    found: dict[str, str] = {}
    todo = [*PACKAGES.split(), *(name for name in OPTIONAL.split() if name in versions)]
    while todo:
        name = todo.pop()
        name = name if name in versions else provider.get(name, name)
        if name not in versions or name in found:
            continue
        found[name] = versions[name]
        for group in needs[name]:
            todo += [one for one in group if one in versions or one in provider][:1]
    return found


def _bare(relation: str) -> str:
    """`libc6:any (>= 2.34)` without the qualifiers."""
    return re.split(r"[\s(:]", relation.strip(), maxsplit=1)[0]


class _Stage:
    """A directory that is filled with files of this machine at their own places: links where possible, else copies."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._directories: set[str] = set()

    def add(self, path: str) -> None:
        """Add a file or a symbolic link, and what the link points to."""
        folder, name = os.path.split(path)
        real = os.path.join(os.path.realpath(folder), name)  # noqa: PTH118 - thousands of files
        if _NOT_NEEDED.search(real):
            return
        target = f"{self.root}{real}"
        self._folder(os.path.dirname(target))  # noqa: PTH120
        if os.path.lexists(target):
            return
        if os.path.islink(real):  # noqa: PTH114
            os.symlink(os.readlink(real), target)  # noqa: PTH115, PTH211
            pointed = os.path.realpath(real)
            if os.path.isfile(pointed):  # noqa: PTH113
                self.add(pointed)
        elif os.path.isfile(real):  # noqa: PTH113
            try:
                os.link(real, target)
            except OSError:
                shutil.copy2(real, target)

    def tree(self, top: Path, skip: Iterable[str] = ()) -> None:
        """Add all files below a directory, but for some names directly in it."""
        for folder, folders, files in os.walk(top):
            if Path(folder) == top:
                folders[:] = [name for name in folders if name not in skip]
            for name in (*files, *(one for one in folders if os.path.islink(os.path.join(folder, one)))):  # noqa: PTH114, PTH118
                self.add(os.path.join(folder, name))  # noqa: PTH118

    def _folder(self, folder: str) -> None:
        if folder not in self._directories:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._directories.add(folder)


def _stage_system(root: Path, packages: dict[str, str], kernel: Kernel) -> None:
    stage = _Stage(root)
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        top = Path("/", name)
        if top.is_symlink():
            root.mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(top.readlink())
    listed = subprocess.run(["dpkg-query", "-L", *packages], capture_output=True, text=True, check=False).stdout
    for line in listed.splitlines():
        if line.startswith("/") and not os.path.isdir(line):  # noqa: PTH112
            stage.add(line)
    for name in _ETC.split():
        each = Path("/etc", name)
        if each.is_dir() and not each.is_symlink():
            stage.tree(each)
        elif each.exists():
            stage.add(str(each))
    for folder in ("/usr/bin", "/usr/sbin"):
        for link in Path(folder).iterdir():
            if (
                link.is_symlink()
                and str(link.readlink()).startswith("/etc/alternatives/")
                and (root / str(link.resolve())[1:]).exists()
            ):
                stage.add(str(link))
    _stage_python(stage)
    shutil.copytree(kernel.modules, root / "usr/lib/modules" / kernel.version)
    for name in ("dev", "proc", "sys", "run", "tmp", "root", "var/lib", "var/log", "var/tmp", "mnt", "opt", "home"):
        (root / name).mkdir(parents=True, exist_ok=True)


def _stage_python(stage: _Stage) -> None:
    """The interpreter that .venv is made of, its standard library, and shared libraries that these and .venv need."""
    interpreter = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    stage.add(str(interpreter))
    for name in ("python3", "python"):
        link = Path(sys.base_prefix, "bin", name)
        if link.exists():
            stage.add(str(link))
    libraries = {
        sysconfig.get_path(name, vars={"base": sys.base_prefix, "platbase": sys.base_prefix})
        for name in ("stdlib", "platstdlib")
    }
    for library in sorted(libraries):
        config = [each.name for each in Path(library).glob("config-*")]
        stage.tree(Path(library), skip=(*_STDLIB_SKIP.split(), *config))
    compiled = [str(path) for top in (*libraries, str(VENV)) for path in Path(top).rglob("*.so")]
    for needed in _linked([str(interpreter), *compiled]):
        stage.add(needed)


def _linked(files: list[str]) -> Iterator[str]:
    """The shared libraries that files are linked with, by the dynamic linker's own answer."""
    seen: set[str] = set()
    for start in range(0, len(files), 100):
        done = subprocess.run(["ldd", *files[start : start + 100]], capture_output=True, text=True, check=False)
        seen.update(re.findall(r"(?:=> |^\s+)(/\S+) \(0x", done.stdout, flags=re.MULTILINE))
    yield from sorted(seen)


def _make(root: Path, image: Path) -> None:
    """Make an ext4 image of a directory, without what only matters on disks that are written to."""
    files = size = 0
    for folder, folders, names in os.walk(root):
        files += len(folders) + len(names)
        size += sum((os.lstat(os.path.join(folder, name)).st_size + 4095) // 4096 * 4096 for name in names)  # noqa: PTH118
        size += len(folders) * 4096
    blocks = size // 4096 * 11 // 10 + files // 8 + 8192
    done = subprocess.run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-N", str(files + 1024), "-E", "root_owner=0:0",
         "-O", "^has_journal,^resize_inode,^metadata_csum,^huge_file", "-d", root, image, str(blocks)],
        env={**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise VmError(f"mke2fs could not make an image of {root}: {done.stderr.strip()[-400:]}")
