"""The kernels: Debian's own for QEMU, unpacked and never installed; and one built from Debian's source as User Mode Linux.

User Mode Linux is Linux compiled as a program: the kernel's code is the same (ip_vs and netfilter are in no way special
there), it needs no virtualization, and its processes run natively. Debian's own build of it lacks nf_tables for IP.
"""

import contextlib
import hashlib
import lzma
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hack.vm import debian
from hack.vm.places import VmError, built, cache, locked

_HERE: Final = Path(__file__).parent
_XZ: Final = b"\xfd7zXZ\x00"
_KEPT: Final = ("arch", "block", "crypto", "fs", "lib", "mm", "net", "security", "virt")
_KEPT_DRIVERS: Final = ("block", "virtio", "char/hw_random", "net/bonding", "net/vxlan", "net/ipvlan", "net/macvlan")
_BUILD_TOOLS: Final = {tool: tool for tool in ("bc", "bison", "flex", "gcc", "make", "patch")} | {
    "xz": "xz-utils",
    "depmod": "kmod",
}
_C_LIBRARY: Final = Path("/usr/include/stdio.h")


@dataclass(frozen=True)
class Kernel:
    """A kernel in the cache."""

    version: str
    image: Path
    modules: Path
    """What becomes /lib/modules/VERSION."""

    @property
    def busybox(self) -> Path:
        """The static busybox of the initial ramdisk."""
        return self.image.parent / "busybox"


def debian_kernel() -> Kernel:
    """Debian's kernel: that of the cache (the newest), or else a fresh one."""
    root = cache() / "debian"
    with locked(root / ".lock"):
        ready = sorted(root.glob("*/vmlinux"), key=lambda path: path.stat().st_mtime)
        version = ready[-1].parent.name if ready else _fetch(root)
    return Kernel(version, root / version / "vmlinux", root / version / "modules")


def _fetch(root: Path) -> str:
    package = debian.resolve("linux-image-amd64", r"linux-image-\S+")
    version = package.removeprefix("linux-image-")
    with built(root / version) as work:
        if work is not None:
            unpacked = work / "unpacked"
            debian.unpack(package, unpacked)
            _busybox(work)
            _arrange(unpacked, version, work)
            shutil.rmtree(unpacked)
    return version


def _busybox(work: Path) -> None:
    debian.unpack("busybox-static", work / "busybox.d")
    (work / "busybox.d/bin/busybox").rename(work / "busybox")
    shutil.rmtree(work / "busybox.d")


def _arrange(unpacked: Path, version: str, work: Path) -> None:
    """Keep of a package what a VM without hardware needs; the kernel uncompressed, which boots five seconds sooner."""
    (work / "vmlinux").write_bytes(_uncompressed((unpacked / f"boot/vmlinuz-{version}").read_bytes()))
    source = unpacked / "lib/modules" / version
    # depmod wants lib/modules/VERSION below its base.
    tree = work / "depmod/lib/modules" / version
    (tree / "kernel/drivers/net").mkdir(parents=True)
    for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
        shutil.copy2(source / name, tree / name)
    for part in (*_KEPT, *(f"drivers/{name}" for name in _KEPT_DRIVERS)):
        with contextlib.suppress(FileNotFoundError):
            shutil.copytree(source / "kernel" / part, tree / "kernel" / part)
    for module in (source / "kernel/drivers/net").glob("*.ko"):
        shutil.copy2(module, tree / "kernel/drivers/net")
    subprocess.run(["depmod", "-b", work / "depmod", version], check=True)
    tree.rename(work / "modules")
    shutil.rmtree(work / "depmod")


def _uncompressed(vmlinuz: bytes) -> bytes:
    """The ELF file within a bzImage: QEMU starts it by its PVH entry point, without decompressor."""
    at = vmlinuz.find(_XZ)
    while at >= 0:
        with contextlib.suppress(lzma.LZMAError):
            image = lzma.LZMADecompressor().decompress(vmlinuz[at:])
            if image.startswith(b"\x7fELF"):
                return image
        at = vmlinuz.find(_XZ, at + 1)
    raise VmError("the kernel package holds no xz-compressed kernel as expected; please tell the authors of hack/vm")


def user_mode_kernel(report: Callable[[str], None]) -> Kernel:
    """The kernel as User Mode Linux: that of the cache, or else built now, which takes some minutes once."""
    if platform.machine() != "x86_64":
        raise VmError(f"User Mode Linux is built for x86_64 only, this is {platform.machine()}")
    recipe = [(_HERE / name).read_text() for name in ("uml.config", "uml.patch")]
    target = cache() / f"uml-{hashlib.sha256(''.join(recipe).encode()).hexdigest()[:16]}"
    with built(target) as work:
        if work is not None:
            _build(work, report)
    version = (target / "version").read_text()
    return Kernel(version, target / "linux", target / "modules")


def _build(work: Path, report: Callable[[str], None]) -> None:
    debian.need(_BUILD_TOOLS | ({} if _C_LIBRARY.exists() else {str(_C_LIBRARY): "libc6-dev"}), report)
    _busybox(work)
    report("fetching the kernel's source")
    source_package = debian.resolve("linux-source", r"linux-source-\S+")
    debian.unpack(source_package, work / "package")
    (archive,) = work.glob("package/usr/src/linux-source-*.tar.xz")
    report("unpacking the kernel's source")
    with (work / "build.log").open("w") as log:
        _run(["tar", "-xf", archive, "--strip-components=1", "--one-top-level=source"], work, log.name)
        shutil.rmtree(work / "package")
        source = work / "source"
        _run(["patch", "-p1", "-i", str(_HERE / "uml.patch")], source, log.name)
        (source / "mini.config").write_text((_HERE / "uml.config").read_text())
        make = ["make", "-s", "ARCH=um", f"-j{len(os.sched_getaffinity(0))}"]
        _run([*make, "KCONFIG_ALLCONFIG=mini.config", "allnoconfig"], source, log.name)
        _check_configuration(source)
        report("building the kernel as User Mode Linux")
        begin = time.monotonic()
        _run([*make, "linux", "modules"], source, log.name)
        _run([*make, f"INSTALL_MOD_PATH={work / 'installed'}", "modules_install"], source, log.name)
        report(f"built in {time.monotonic() - begin:.0f} s")
    (modules,) = (work / "installed/lib/modules").iterdir()
    for link in ("build", "source"):
        (modules / link).unlink(missing_ok=True)
    (work / "version").write_text(modules.name)
    shutil.copy2(source / "linux", work / "linux")
    modules.rename(work / "modules")
    for folder in ("source", "installed"):
        shutil.rmtree(work / folder)


def _run(command: list[str | Path], folder: Path, log: str) -> None:
    with Path(log).open("ab") as output:
        done = subprocess.run(command, cwd=folder, stdout=output, stderr=output, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        last = "\n".join(Path(log).read_text(errors="replace").splitlines()[-12:])
        raise VmError(f"{' '.join(map(str, command[:3]))} … failed with status {done.returncode}:\n{last}")


def _check_configuration(source: Path) -> None:
    """Every wish of uml.config must have come true: a misspelt option or an unmet dependency is dropped silently."""
    made = set((source / ".config").read_text().splitlines())
    lost = [
        line
        for line in (_HERE / "uml.config").read_text().splitlines()
        if re.match(r"CONFIG_\w+=[^n]", line) and line not in made
    ]
    if lost:
        raise VmError(f"the kernel's configuration did not take {', '.join(lost)}")
