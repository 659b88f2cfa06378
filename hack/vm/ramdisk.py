"""The initial ramdisk: busybox, the modules that the root needs, our init and agent, and the settings of one VM."""

import io
import os
import shlex
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from hack.vm import guest
from hack.vm.kernel import Kernel

FIRST_MODULES: Final = ("virtio_pci", "virtio_blk", "ext4", "overlay")
LOAD: Final = """
    ip_vs ip_vs_rr ip_vs_wrr ip_vs_lc ip_vs_wlc ip_vs_sh ip_vs_mh nf_conntrack nf_conntrack_netlink dummy veth
    bridge br_netfilter nf_tables nft_compat nft_chain_nat ip_tables ip6_tables ip_set xt_set
"""
"""Loaded at the start; all others load themselves when asked for."""

_APPLETS: Final = "sh mount insmod mkdir cp switch_root poweroff echo"


def ramdisk(kernel: Kernel, kind: str, settings: Mapping[str, str]) -> bytes:
    """A cpio archive in the kernel's own format."""
    archive = _Cpio()
    for name in ("bin", "dev", "proc", "sys", "modules", "guest"):
        archive.folder(name)
    archive.device("dev/console", 5, 1)
    archive.file("bin/busybox", kernel.busybox.read_bytes(), 0o755)
    for name in _APPLETS.split():
        archive.link(f"bin/{name}", "busybox")
    modules = [] if kind == "uml" else _with_dependencies(kernel.modules, FIRST_MODULES)
    for module in modules:
        archive.file(f"modules/{module.name}", module.read_bytes(), 0o644)
    home = Path(guest.__file__).parent
    for folder in ("hack", "hack/vm", "hack/vm/guest"):
        archive.folder(f"guest/{folder}")
        archive.file(f"guest/{folder}/__init__.py", b"", 0o644)
    for name in ("agent.py", "wire.py", "system.sh"):
        archive.file(f"guest/hack/vm/guest/{name}", (home / name).read_bytes(), 0o644)
    archive.file("init", (home / "init.sh").read_bytes(), 0o755)
    values = {"MODULES": " ".join(module.name for module in modules), "LOAD": " ".join(LOAD.split()), **settings}
    text = "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())
    archive.file("settings", text.encode(), 0o600)
    return archive.finish()


def _with_dependencies(modules: Path, names: tuple[str, ...]) -> list[Path]:
    """Module files in an order in which insmod can load them; what is built in is left out."""
    needs: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        needs[path] = rest.split()
    by_name = {Path(path).stem.replace("-", "_"): path for path in needs}
    order: list[str] = []
    # crc32c is asked for by name at run time (ext4), so no dependency names it.
    for name in ("crc32c_generic", *names):
        if name in by_name:
            path = by_name[name]
            order += [each for each in (*reversed(needs[path]), path) if each not in order]
    return [modules / path for path in order]


class _Cpio:
    """Writes the `newc` format of cpio(5)."""

    def __init__(self) -> None:
        self._out = io.BytesIO()
        self._inode = 0

    def folder(self, name: str) -> None:
        self._entry(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, content: bytes, mode: int) -> None:
        self._entry(name, stat.S_IFREG | mode, content)

    def link(self, name: str, target: str) -> None:
        self._entry(name, stat.S_IFLNK | 0o777, os.fsencode(target))

    def device(self, name: str, major: int, minor: int) -> None:
        self._entry(name, stat.S_IFCHR | 0o600, b"", major, minor)

    def finish(self) -> bytes:
        self._entry("TRAILER!!!", 0, b"")
        return self._out.getvalue()

    def _entry(self, name: str, mode: int, content: bytes, major: int = 0, minor: int = 0) -> None:
        self._inode += 1
        label = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, major, minor, len(label), 0)
        self._out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + label)
        self._pad()
        self._out.write(content)
        self._pad()

    def _pad(self) -> None:
        self._out.write(b"\0" * (-self._out.tell() % 4))
