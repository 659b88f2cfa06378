"""One VM of this clone that was started: whether it lives, speaking to its agent, stopping it, what its kernel said."""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from hack.vm.guest.wire import Stream
from hack.vm.places import VmError, states

LOGS: Final = ("program.log", "console.log")
"""What QEMU itself says, and what the VM's kernel says; User Mode Linux is both."""

SHARED: Final = "shared"
"""The name of the VM that `start` leaves running; a VM of `run` alone is named by its process."""

CONNECT_LIMIT = 60.0
"""Seconds in which the agent must take a connection."""

_TROUBLE: Final = re.compile(
    r"Kernel panic|Oops:|BUG: |general protection fault|Out of memory: Killed|KVM internal error|emulation failure"
)
_CLONE_NEWNET: Final = 0x40000000
T = TypeVar("T")


@dataclass
class Vm:
    """A VM by the folder of its state."""

    state: Path

    @property
    def console(self) -> Path:
        """What the VM's kernel and init said."""
        return self.state / "console.log"

    def facts(self) -> dict[str, Any] | None:
        """Process, address and secret of a VM that lives, else None."""
        try:
            facts: dict[str, Any] = json.loads((self.state / "vm.json").read_text())
        except (OSError, ValueError):
            return None
        return facts if alive(int(facts["pid"]), self.state) else None

    def connect(self, operation: str, **request: object) -> Stream:
        """A connection to the agent on which `operation` begins."""
        facts = self.facts()
        if facts is None:
            raise VmError(f"no VM is running; python -m hack.vm start{self.last_words()}")
        address = (str(facts["address"]), int(facts["port"]))
        try:
            if facts["kind"] == "uml":
                connection = within_network_of(
                    int(facts["pid"]), lambda: socket.create_connection(address, timeout=CONNECT_LIMIT)
                )
            else:
                connection = socket.create_connection(address, timeout=CONNECT_LIMIT)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream = Stream(connection)
            stream.send_json({"op": operation, "secret": facts["secret"], **request})
        except OSError as error:
            raise VmError(f"the VM's agent does not answer: {error}{self.last_words()}") from error
        return stream

    def stop(self) -> bool:
        """End the VM, if there is one."""
        facts = self.facts()
        if facts is not None:
            pid = int(facts["pid"])
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            until = time.monotonic() + 5
            while alive(pid, self.state) and time.monotonic() < until:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
                time.sleep(0.01)
        for name in ("vm.json", "ramdisk", "docker.cow"):
            (self.state / name).unlink(missing_ok=True)
        return facts is not None

    def last_words(self) -> str:
        """The end of the console and of the VM program's own output, for an error message."""
        parts = []
        for name in LOGS:
            with contextlib.suppress(OSError):
                text = (self.state / name).read_text(errors="replace")
                lines = [line for line in text.replace("\r", "").splitlines() if line.strip()][-20:]
                if lines:
                    parts.append(f"\n--- the last lines of {self.state / name}:\n" + "\n".join(lines))
        return "".join(parts)

    def trouble(self) -> str | None:
        """The first line of the logs that tells of a kernel that broke, or of a VM program that gave up."""
        for name in LOGS:
            with contextlib.suppress(OSError):
                for line in (self.state / name).read_text(errors="replace").splitlines():
                    if _TROUBLE.search(line):
                        return line.strip()
        return None


def alive(pid: int, state: Path) -> bool:
    """Whether a process is still this VM's (process numbers come back)."""
    try:
        process = Path("/proc", str(pid))
        command = (process / "cmdline").read_bytes()
        status = (process / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return str(state / "ramdisk").encode() in command and status != "Z"


def within_network_of(pid: int, work: Callable[[], T]) -> T:
    """Do something in the network namespace of a process, in a thread of its own."""
    outcome: list[T] = []
    failure: list[BaseException] = []

    def enter() -> None:
        try:
            with Path(f"/proc/{pid}/ns/net").open() as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns: root is needed")
            outcome.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def shared() -> Vm:
    """The VM that `start` starts."""
    return Vm(states() / SHARED)
