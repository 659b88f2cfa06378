"""The kernel as User Mode Linux, built from the source that Debian packages.

User Mode Linux is Linux compiled as a program: netfilter and ip_vs in it are the same code as anywhere, it needs no
virtualization, and its processes run natively. Debian's own build of it lacks nf_tables for IP, and 6.1 needs a change for
processors with AMX.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from hack.vm import debian
from hack.vm.kernel import Kernel, busybox
from hack.vm.places import VmError, built, cache

Report = Callable[[str], None]

_CONFIG: Final = Path(__file__).parent / "uml.config"
_PATCH: Final = Path(__file__).parent / "uml.patch"
_C_LIBRARY: Final = Path("/usr/include/stdio.h")
_TOOLS: Final = {tool: tool for tool in ("bc", "bison", "flex", "gcc", "make", "patch")} | {
    "xz": "xz-utils",
    "depmod": "kmod",
    "unshare": "util-linux",
}
# What is built ends with us, however we end: nobody else may start in the same folder while a compiler still writes there.
_TOGETHER: Final = ("setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child=KILL")


def user_mode_kernel(report: Report) -> Kernel:
    """The kernel of the cache, or else one built now, which takes some minutes once."""
    if platform.machine() != "x86_64":
        raise VmError(f"User Mode Linux is built for x86_64 only, this is {platform.machine()}")
    recipe = _CONFIG.read_text() + _PATCH.read_text()
    target = cache() / f"uml-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    failed = target.with_name(f"{target.name}.failed")
    with built(target) as work:
        if work is not None:
            if failed.exists():
                raise VmError(f"the kernel could not be built before (rm {failed} to try again):\n{failed.read_text()}")
            _fetch(work, report)
            try:
                _build(work, report)
            except VmError as error:
                failed.write_text(str(error))
                raise
    return Kernel((target / "version").read_text(), target / "linux", target / "modules")


def _fetch(work: Path, report: Report) -> None:
    debian.need(_TOOLS | ({} if _C_LIBRARY.exists() else {str(_C_LIBRARY): "libc6-dev"}), report)
    report("fetching the kernel's source")
    busybox(work)
    package = debian.resolve("linux-source", r"linux-source-\S+")
    debian.unpack(package, work / "package")


def _build(work: Path, report: Report) -> None:
    source, log = work / "source", work / "build.log"
    make = [*_TOGETHER, "make", "-s", "ARCH=um", f"-j{len(os.sched_getaffinity(0))}"]
    report("unpacking the kernel's source")
    (archive,) = work.glob("package/usr/src/linux-source-*.tar.xz")
    _run(["tar", "-xf", str(archive), "--strip-components=1", "--one-top-level=source"], work, log)
    shutil.rmtree(work / "package")
    _run(["patch", "-p1", "-i", str(_PATCH)], source, log)
    _run([*make, f"KCONFIG_ALLCONFIG={_CONFIG}", "allnoconfig"], source, log)
    check_configuration(source)
    report("building the kernel as User Mode Linux")
    _run([*make, "linux", "modules"], source, log)
    _run([*make, f"INSTALL_MOD_PATH={work / 'installed'}", "modules_install"], source, log)
    report("cleaning up")
    (modules,) = (work / "installed/lib/modules").iterdir()
    for link in ("build", "source"):
        (modules / link).unlink(missing_ok=True)
    (work / "version").write_text(modules.name)
    shutil.copy2(source / "linux", work / "linux")
    modules.rename(work / "modules")
    for folder in ("source", "installed"):
        shutil.rmtree(work / folder)


def _run(command: Sequence[str], folder: Path, log: Path) -> None:
    with log.open("ab") as output:
        done = subprocess.run(command, cwd=folder, stdout=output, stderr=output, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
        words = [word for word in command if word not in _TOGETHER]
        raise VmError(f"{' '.join(words)} failed with status {done.returncode}:\n{last}")


def check_configuration(source: Path) -> None:
    """Every wish of uml.config must have come true: a misspelt option or an unmet dependency is dropped silently."""
    made = set((source / ".config").read_text().splitlines())
    wishes = [line for line in _CONFIG.read_text().splitlines() if re.match(r"CONFIG_\w+=[^n]", line)]
    if lost := [wish for wish in wishes if wish not in made]:
        raise VmError(f"the kernel's configuration did not take {', '.join(lost)}")
