"""Debian's own kernel, for QEMU: its package is fetched and unpacked, never installed."""

import contextlib
import lzma
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hack.vm import debian
from hack.vm.places import VmError, built, cache, locked

_XZ: Final = b"\xfd7zXZ\x00"
_KEPT: Final = ("arch", "block", "crypto", "fs", "lib", "mm", "net", "security", "virt")
_KEPT_DRIVERS: Final = ("block", "virtio", "char/hw_random", "net/bonding", "net/vxlan", "net/ipvlan", "net/macvlan")


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
            busybox(work)
            _arrange(unpacked, version, work)
            shutil.rmtree(unpacked)
    return version


def busybox(work: Path) -> None:
    """Put a static busybox into a folder."""
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
