"""User Mode Linux as a process: the command line, the namespaces around it, and the processor it keeps to."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final

from hack.vm.choice import kernel_image
from hack.vm.kernel import Kernel
from hack.vm.places import VmError, cache

NEEDS: Final = {
    "unshare": "util-linux",
    "setarch": "util-linux",
    "setpriv": "util-linux",
    "taskset": "util-linux",
    "ip": "iproute2",
}
CARD: Final = "vec0"
ADDRESS: Final = "10.0.2.15"
DISK: Final = "ubda"
COPY_ON_WRITE: Final = "docker.cow"
_SETUP: Final = (
    "ip link set lo up && ip tuntap add tap0 mode tap && ip address add 10.0.2.2/24 dev tap0 && ip link set tap0 up && "
    'ulimit -c 0 && exec "$@"'
)
_LOOK: Final = 0.05
_MAPPINGS: Final = 1 << 20


def command(kernel: Kernel, state: Path, memory: int, cpu: int, disk: Path | None = None) -> list[str]:
    """The command line: in a network namespace of its own, and in a PID namespace that ends with it.

    What the VM writes to the disk goes to a file in the state folder.
    """
    disks = [f"ubd0={state / COPY_ON_WRITE},{disk}"] if disk else []
    return [
        "taskset", "-c", str(cpu),
        "unshare", "--net", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "setarch", "-R", "/bin/sh", "-c", _SETUP,
        "uml", str(kernel_image(kernel.image)), f"mem={memory}M", f"initrd={state / 'ramdisk'}", f"uml_dir={state / 'uml'}",
        "umid=vm", "con=null", "con0=null,fd:1", "ssl=null", "loglevel=5", "oops=panic", "vec0:transport=tap,ifname=tap0",
        *disks,
    ]  # fmt: skip


def environment(state: Path, memory: int) -> dict[str, str]:
    """Where it keeps the file that is its memory: /dev/shm if that is large enough, else the state folder."""
    shm = Path("/dev/shm")
    try:
        facts = os.statvfs(shm)
        fits = facts.f_bavail * facts.f_frsize >= memory << 20 and not facts.f_flag & os.ST_NOEXEC
    except OSError:
        fits = False
    return {**os.environ, "TMPDIR": str(shm if fits else state)}


def allow_large_processes(report: Callable[[str], None]) -> None:
    """A process in the VM is one here, in which most of its pages are mappings of their own: Kubernetes' have many."""
    file = Path("/proc/sys/vm/max_map_count")
    before = int(file.read_text())
    if before >= _MAPPINGS:
        return
    try:
        file.write_text(f"{_MAPPINGS}\n")
    except OSError as error:
        raise VmError(f"a VM with Docker needs `sysctl -w vm.max_map_count={_MAPPINGS}` here: {error.strerror}") from error
    report(f"vm.max_map_count raised from {before} to {_MAPPINGS}, which large processes in the VM need")


@contextlib.contextmanager
def processor() -> Iterator[tuple[int, tuple[int, ...]]]:
    """A processor to keep to, and descriptors to hand on that reserve it as long as somebody has them open.

    The kernel and the processes in it are processes here that take turns at every system call: on two processors that takes
    a third longer than on one. The idlest is taken, of those that no other VM of this kind has.
    """
    idle = [number for number, _ in sorted(idleness(), key=lambda pair: -pair[1])]
    for number in idle:
        with (cache() / f"cpu-{number}.lock").open("w") as file:
            if _taken(file):
                continue
            yield number, (file.fileno(),)
            return
    yield idle[0], ()


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def idleness() -> list[tuple[int, int]]:
    """The processors that we may use, and how long (in ticks) each was idle in a moment just now."""
    before = _idle_ticks()
    time.sleep(_LOOK)
    after = _idle_ticks()
    return [(number, after[number] - before[number]) for number in sorted(os.sched_getaffinity(0)) if number in after]


def _idle_ticks() -> dict[int, int]:
    fields = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    return {
        int(each[0][3:]): int(each[4]) + int(each[5]) for each in fields if each[0].startswith("cpu") and each[0] != "cpu"
    }
