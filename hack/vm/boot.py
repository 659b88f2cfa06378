"""Starting a VM: what it is made of, its command line, waiting until it is up, and saying why it is not."""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hack.vm import choice, debian, docker_disk, image, kernel, qemu, ramdisk, uml, uml_kernel
from hack.vm.choice import Machine
from hack.vm.docker_disk import Content
from hack.vm.guest import wire
from hack.vm.guest.wire import Closed
from hack.vm.image import Disk
from hack.vm.instance import LOGS, SHARED, Vm
from hack.vm.kernel import Kernel
from hack.vm.places import REPOSITORY, VmError, locked, states
from hack.vm.progress import Progress

_PHASES: Final = {
    "hack.vm: kernel is up": "the kernel is up, mounting the root",
    "hack.vm: kernel modules are loaded": "kernel modules are loaded, starting the agent",
}


def sweep() -> None:
    """Remove the folders that VMs of `run` left which were killed."""
    for folder in states().glob("run-*"):
        if not Path("/proc", folder.name.removeprefix("run-")).exists():
            Vm(folder).stop()
            shutil.rmtree(folder, ignore_errors=True)


def start(progress: Progress, *, private: bool = False, docker: Content | None = None) -> Vm:
    """A running VM: a private one that dies with this process, or the shared one, started if need be.

    With `docker`, Docker can work in it, and finds that content on its disk.
    """
    sweep()
    vm = Vm(states() / (f"run-{os.getpid()}" if private else SHARED))
    vm.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with locked(vm.state / "lock"):
        if vm.facts() is None:
            kinds, failed = choice.kinds(docker=docker is not None), list[str]()
            for kind in kinds:
                try:
                    _boot(vm, choice.machine(kind), progress, bound=private, docker=docker)
                    break
                except VmError as error:
                    if kind == kinds[-1]:
                        raise
                    progress.note(f"{kind} does not work here, trying {kinds[kinds.index(kind) + 1]}: {error}")
                    failed.append(kind)
            for kind in failed:
                choice.remember_failed(kind)
    return vm


def prepare(progress: Progress) -> None:
    """Make what the first kind of VM needs that works out."""
    kinds = choice.kinds()
    for kind in kinds:
        try:
            _parts(kind, progress)
            return
        except VmError as error:
            if kind == kinds[-1]:
                raise
            progress.note(f"{kind} does not work here: {error}")


@dataclass(frozen=True)
class _Parts:
    """What a VM is made of."""

    kernel: Kernel
    disks: list[Disk]
    docker: Path | None = None
    """The disk for Docker's data."""


def _parts(kind: str, progress: Progress, docker: Content | None = None) -> _Parts:
    """The kernel and the disks of a kind of VM, out of the cache or made now."""
    progress.phase("kernel")
    if kind == "uml":
        debian.need(uml.NEEDS, progress.phase)
        program = uml_kernel.user_mode_kernel(progress.phase)
        if docker is None:
            return _Parts(program, [])
        uml.allow_large_processes(progress.note)
        progress.phase("disk for Docker")
        return _Parts(program, [], docker_disk.disk(docker, progress.phase))
    debian.need(qemu.NEEDS, progress.phase)
    program = kernel.debian_kernel()
    progress.phase("disk images")
    return _Parts(program, [image.system(program), *image.directories()])


@dataclass(frozen=True)
class _Recipe:
    """How a VM is started, and how it is spoken to."""

    version: str
    arguments: list[str]
    facts: dict[str, object]
    environment: dict[str, str] | None = None


def _recipe(vm: Vm, asked: Machine, parts: _Parts, cpu: int) -> _Recipe:
    program = parts.kernel
    secret = secrets.token_hex(16)
    interpreter = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    settings = {"SECRET": secret, "HOSTNAME": "nodeproxy-vm", "PYTHON": str(interpreter), "KIND": asked.kind}
    if asked.kind == "uml":
        folders = {program.modules: f"/usr/lib/modules/{program.version}", REPOSITORY: REPOSITORY}
        settings |= {"CARD": uml.CARD, "FOLDERS": " ".join(f"{source}:{target}" for source, target in folders.items())}
        address, port = uml.ADDRESS, wire.PORT
        if parts.docker:
            settings |= {"DOCKER": f"/dev/{uml.DISK}:{docker_disk.PLACE}"}
        arguments = uml.command(program, vm.state, asked.memory, cpu, parts.docker)
        environment = uml.environment(vm.state, asked.memory)
    else:
        names = [f"vd{chr(ord('a') + number)}:{disk.mounted}" for number, disk in enumerate(parts.disks)]
        settings |= {"CARD": "eth0", "DISKS": " ".join(names[1:])}
        address, port = "127.0.0.1", qemu.free_port()
        arguments, environment = qemu.command(asked, program.image, parts.disks, vm.state, port), None
    _write_private(vm.state / "ramdisk", ramdisk.ramdisk(program, asked.kind, settings))
    return _Recipe(program.version, arguments, {"address": address, "port": port, "secret": secret}, environment)


def _boot(vm: Vm, asked: Machine, progress: Progress, *, bound: bool, docker: Content | None) -> None:
    vm.stop()
    parts = _parts(asked.kind, progress, docker)
    progress.phase(f"boot ({asked})")
    with uml.processor() if asked.kind == "uml" else contextlib.nullcontext((0, ())) as (cpu, reserved):
        recipe = _recipe(vm, asked, parts, cpu)
        process = _launch(vm, asked, recipe, reserved, bound=bound)
    try:
        _wait(vm, process, asked, progress)
        _save(vm.state / "vm.json", {"pid": process.pid, "kind": asked.kind, **recipe.facts})
        _greet(vm)
    except BaseException:
        process.kill()
        process.wait()
        vm.stop()
        raise
    progress.done(f"VM ready: kernel {recipe.version}, {asked}")


def _launch(vm: Vm, asked: Machine, recipe: _Recipe, reserved: tuple[int, ...], *, bound: bool) -> subprocess.Popen[bytes]:
    """Start the VM's program; `bound` to the life of this process, or on its own."""
    (vm.state / "command").write_text(" ".join(recipe.arguments) + "\n")
    for name in LOGS:
        (vm.state / name).unlink(missing_ok=True)
    bind = ["setpriv", "--pdeathsig", "KILL"] if bound else []
    with (vm.state / (LOGS[1] if asked.kind == "uml" else LOGS[0])).open("ab") as log:
        return subprocess.Popen(
            [*bind, *recipe.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=recipe.environment,
            start_new_session=True,
            pass_fds=reserved,
        )


def _write_private(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def _save(path: Path, facts: dict[str, object]) -> None:
    """Write down what others need for using this VM; they see all of it or nothing."""
    _write_private(path.with_suffix(".new"), json.dumps(facts).encode())
    path.with_suffix(".new").replace(path)


def _wait(vm: Vm, process: subprocess.Popen[bytes], asked: Machine, progress: Progress) -> None:
    limit = choice.boot_limit(asked.kind)
    begin = time.monotonic()
    seen: set[str] = set()
    while True:
        files = [vm.state / name for name in LOGS]
        text = "".join(file.read_text(errors="replace") for file in files if file.exists())
        if "hack.vm: ready" in text:
            return
        for mark, what in _PHASES.items():
            if mark in text and mark not in seen:
                seen.add(mark)
                progress.phase(what)
        if process.poll() is not None:
            raise VmError(
                f"the VM's process ended with status {process.returncode} before the VM was up.{_advice(vm, asked)}"
            )
        if "KVM internal error" in text:
            raise VmError(f"KVM cannot run this kernel.{_advice(vm, asked)}")
        if time.monotonic() - begin > limit:
            raise VmError(f"the VM was not up after {limit:.0f} s (HACK_VM_BOOT_LIMIT sets this).{_advice(vm, asked)}")
        progress.tick()
        time.sleep(0.02)


def _advice(vm: Vm, asked: Machine) -> str:
    trouble = vm.trouble()
    hints = [f"The command is in {vm.state / 'command'}: {asked}."]
    if trouble:
        hints.insert(0, f"It says: {trouble}")
    if os.geteuid() != 0:
        hints.append("This needs root.")
    if asked.kind != "tcg":
        hints.append("HACK_VM_ACCEL=tcg (QEMU, software emulation) needs least of this machine.")
    if asked.memory < choice.LEAST_MEMORY or (trouble and "memory" in trouble.lower()):
        hints.append("HACK_VM_MEMORY gives it more memory (MiB).")
    return "\n" + "\n".join(hints) + vm.last_words()


def _greet(vm: Vm) -> None:
    """The agent's answer; it sets the VM's clock."""
    try:
        stream = vm.connect("ping", time=time.time())
        stream.receive_json()
        stream.close()
    except (OSError, Closed) as error:
        raise VmError(f"the VM's agent does not answer: {error}{vm.last_words()}") from error
