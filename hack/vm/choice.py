"""Which kind of VM suits this machine, with how much memory and how many processors.

The kinds: `kvm` (QEMU with the processor's virtualization), `uml` (User Mode Linux, whose processes run natively) and
`tcg` (QEMU as software emulation, about 15 times slower, works everywhere).
"""

import contextlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hack.vm.places import VmError, cache

KINDS: Final = ("kvm", "uml", "tcg")
LEAST_MEMORY: Final = 512
_MOST_MEMORY: Final = 4096
_BOOT_LIMIT: Final = {"kvm": 30.0, "uml": 60.0, "tcg": 180.0}


@dataclass(frozen=True)
class Machine:
    """What is asked for."""

    kind: str
    memory: int
    cpus: int

    def __str__(self) -> str:
        return f"{self.kind}, {self.cpus} CPU{'' if self.cpus == 1 else 's'}, {self.memory} MiB"


def kinds(*, docker: bool = False) -> list[str]:
    """The kinds to try here, best first, or what HACK_VM_ACCEL says; those in which Docker can work."""
    asked = os.environ.get("HACK_VM_ACCEL") or "auto"
    if docker:
        if asked not in ("auto", "uml"):
            raise VmError(f"Docker works in a VM of the kind uml only, HACK_VM_ACCEL={asked} is asked for")
        asked = "uml"
        if why := why_not(asked):
            raise VmError(f"Docker works in a VM of the kind uml only: {why}")
    if asked in KINDS:
        return [asked]
    if os.environ.get("HACK_VM_KERNEL"):
        raise VmError(f"HACK_VM_KERNEL is for one kind of VM: set HACK_VM_ACCEL too ({', '.join(KINDS)})")
    if asked != "auto":
        raise VmError(f"HACK_VM_ACCEL={asked}: auto, {' or '.join(KINDS)}")
    return [kind for kind in KINDS if why_not(kind) is None]


def why_not(kind: str) -> str | None:
    """Why a kind cannot work here, as far as can be told without trying."""
    with contextlib.suppress(OSError):
        if _failed(kind).read_text() == platform.release():
            return f"it failed here before (rm {_failed(kind)} to try again)"
    if kind == "kvm":
        try:
            os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            return f"/dev/kvm: {error.strerror}"
        if not any(Path("/sys/module", name).exists() for name in ("kvm_intel", "kvm_amd")):
            return "/dev/kvm is there without the processor's virtualization (neither kvm_intel nor kvm_amd is loaded)"
    if kind == "uml" and platform.machine() != "x86_64":
        return f"it is built for x86_64, this is {platform.machine()}"
    if kind == "uml" and os.environ.get("HACK_VM_BUILD") == "no" and not any(cache().glob("uml-*/linux")):
        return "it is not built (HACK_VM_BUILD=no)"
    return None


def remember_failed(kind: str) -> None:
    """Do not try a kind again while this host runs this kernel: for KVM, which may take a minute to fail."""
    if kind != "kvm":
        return
    _failed(kind).parent.mkdir(parents=True, exist_ok=True)
    _failed(kind).write_text(platform.release())


def _failed(kind: str) -> Path:
    return cache() / f"failed-{kind}"


def machine(kind: str) -> Machine:
    """The size of a VM, or what HACK_VM_MEMORY and HACK_VM_CPUS say."""
    cpus = 1 if kind == "uml" else number("HACK_VM_CPUS") or min(len(os.sched_getaffinity(0)), 4)
    return Machine(kind, number("HACK_VM_MEMORY") or memory(), cpus)


def memory() -> int:
    """MiB for a VM: 4096, or less on a host that has little."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) // 1024
    if available * 0.6 < LEAST_MEMORY:
        raise VmError(
            f"{available} MiB of memory are available, the VM needs {LEAST_MEMORY} of its own (HACK_VM_MEMORY sets it)"
        )
    return min(_MOST_MEMORY, int(available * 0.6))


def number(name: str) -> int | None:
    """A positive number from the environment."""
    text = os.environ.get(name)
    if not text:
        return None
    if not text.isdecimal() or int(text) == 0:
        raise VmError(f"{name}={text}: a number is needed")
    return int(text)


def boot_limit(kind: str) -> float:
    """Seconds after which a VM that is not up has failed."""
    return number("HACK_VM_BOOT_LIMIT") or _BOOT_LIMIT[kind]


def kernel_image(usual: Path) -> Path:
    """The kernel to start: the usual one, or HACK_VM_KERNEL."""
    path = Path(os.environ.get("HACK_VM_KERNEL") or usual)
    if not path.is_file():
        raise VmError(f"there is no kernel at {path}")
    return path
