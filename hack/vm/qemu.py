"""QEMU: its command line."""

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from hack.vm.choice import Machine, kernel_image
from hack.vm.guest import wire
from hack.vm.image import Disk

PROGRAM: Final = "qemu-system-x86_64"
NEEDS: Final = {PROGRAM: "qemu-system-x86", "mke2fs": "e2fsprogs", "dpkg-query": "dpkg", "setpriv": "util-linux"}

# norandmaps: translated code is found again in the next process, which makes starting one three times as fast under TCG.
_KERNEL_LINE: Final = (
    "console=ttyS0 loglevel=5 panic=-1 oops=panic mitigations=off nokaslr norandmaps net.ifnames=0 random.trust_cpu=on "
    "nowatchdog tsc=reliable clocksource=tsc rcupdate.rcu_expedited=1 rcupdate.rcu_cpu_stall_suppress=1 audit=0 apparmor=0"
)
_FAST: Final = {
    "kvm": ["-accel", "kvm", "-cpu", "host"],
    "tcg": ["-accel", "tcg,thread=multi,tb-size=1024", "-cpu", "max,la57=off"],
}


def command(asked: Machine, kernel: Path, disks: Sequence[Disk], state: Path, port: int) -> list[str]:
    """QEMU's command line: disks read-only, one port of 127.0.0.1 that leads to the agent, no other way in or out."""
    drives = []
    for number, disk in enumerate(disks):
        drives += ["-drive", f"if=none,id=d{number},file={disk.image},format=raw,readonly=on,cache=unsafe"]
        drives += ["-device", f"virtio-blk-pci,drive=d{number}"]
    return [
        PROGRAM, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-machine", "q35", *_FAST[asked.kind], "-smp", str(asked.cpus), "-m", str(asked.memory),
        "-kernel", str(kernel_image(kernel)),
        "-initrd", str(state / "ramdisk"), "-append", _KERNEL_LINE, "-serial", f"file:{state / 'console.log'}",
        "-device", "virtio-rng-pci", *drives,
        "-netdev", f"user,id=n0,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:{wire.PORT}",
        "-device", "virtio-net-pci,netdev=n0,romfile=",
    ]  # fmt: skip


def free_port() -> int:
    """A port of 127.0.0.1 that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
