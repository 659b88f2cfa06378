"""Owns network namespaces: making them, working inside them, and leaving nothing behind.

A `Namespace` is one named network namespace (`/run/netns/NAME`, so that `ip netns exec NAME` works on it) with one
thread that lives inside it. Work for the namespace is handed to that thread: a socket made there belongs to the
namespace for good, whichever thread uses it later, and a process started there starts in it.

Names hold the process id and the start time of the process that made them, so that `cleanup_stale` can tell the
leftovers of a dead process (SIGKILL, power cut) from the namespaces of a living one, even when process ids are reused.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import re
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Final, ParamSpec, Self, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

CLONE_NEWNET: Final = 0x40000000
MS_BIND: Final = 0x1000
MNT_DETACH: Final = 2
SIOCGIFFLAGS: Final = 0x8913
IFF_RUNNING: Final = 0x40

NETNS_DIR: Final = Path("/run/netns")
PREFIX: Final = "npbox"
_NAME: Final = re.compile(rf"{PREFIX}-(?P<pid>\d+)-(?P<start>\d+)-")

_libc = ctypes.CDLL(None, use_errno=True)
_serial = itertools.count(1)


class NamespaceError(Exception):
    """A namespace could not be made, entered or configured; the text says which and why."""


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise NamespaceError(f"{what}: {os.strerror(code)}")


def process_start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot, or None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def unique_stem() -> str:
    """A name no other sandbox on this machine has; the owner's pid and start time are in it."""
    pid = os.getpid()
    return f"{PREFIX}-{pid}-{process_start_time(pid)}-{next(_serial)}"


def _owner_is_dead(name: str) -> bool:
    match = _NAME.match(name)
    return match is not None and process_start_time(int(match["pid"])) != int(match["start"])


def cleanup_stale() -> list[str]:
    """Remove namespaces and work directories whose owner is dead; return their names."""
    removed = []
    if NETNS_DIR.is_dir():
        for path in NETNS_DIR.iterdir():
            if _owner_is_dead(path.name):
                _unmount(path)
                removed.append(path.name)
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}-*"):
        if _owner_is_dead(path.name):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path.name)
    return removed


def _unmount(path: Path) -> None:
    if _libc.umount2(os.fsencode(path), MNT_DETACH) != 0 and ctypes.get_errno() not in (errno.EINVAL, errno.ENOENT):
        raise NamespaceError(f"unmount {path}: {os.strerror(ctypes.get_errno())}")
    path.unlink(missing_ok=True)


class Namespace:
    """One named network namespace and the thread that works in it. Close it when done (or use `with`)."""

    def __init__(self, name: str, *, sysctls: Mapping[str, object] | None = None) -> None:
        self.name = name
        self.path = NETNS_DIR / name
        self.environment: dict[str, str] = {}
        self._closed = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        try:
            self.run(self._create)
            if sysctls:
                self.sysctl(sysctls)
        except BaseException:
            self.close()
            raise

    def _create(self) -> None:
        NETNS_DIR.mkdir(parents=True, exist_ok=True)
        _check(_libc.unshare(CLONE_NEWNET), f"new network namespace {self.name}")
        self.path.touch(exist_ok=False)
        source = b"/proc/thread-self/ns/net"
        _check(_libc.mount(source, os.fsencode(self.path), None, MS_BIND, None), f"mount {self.path}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove the name and end the thread. The kernel drops the namespace with its last socket and process."""
        if self._closed:
            return
        self._closed = True
        self._thread.shutdown(wait=True)
        _unmount(self.path)

    def submit(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Start `work` inside the namespace, after what was handed over before."""
        return self._thread.submit(work, *args, **kwargs)

    def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do `work` inside the namespace and return its result."""
        return self.submit(work, *args, **kwargs).result()

    def sysctl(self, values: Mapping[str, object], *, optional: bool = False) -> None:
        """Write `net.…` sysctls of this namespace. With `optional`, those this kernel lacks here are left out."""
        self.run(_write_sysctls, values, optional)

    def read_sysctl(self, key: str) -> str:
        """The value of one `net.…` sysctl in this namespace."""
        return self.run(_sysctl_path(key).read_text).strip()

    def ip(self, lines: Iterable[str], *, family: int = 0) -> None:
        """Run lines of `ip` (link, address, route, rule) as one `ip -batch`; raises at the first that fails.

        The family (4 or 6) is needed only where no address in a line tells it.
        """
        text = "".join(f"{line}\n" for line in lines)
        done = self.command(["ip", *([f"-{family}"] if family else []), "-batch", "-"], input=text, check=False)
        if done.returncode != 0:
            raise NamespaceError(f"ip in {self.name}: {done.stderr.strip()}\n{text}")

    def wait_links_up(self, devices: Iterable[str], timeout: float = 5) -> None:
        """Wait until the kernel has noticed the carrier of these links; before, they drop what is sent on them."""
        self.run(_wait_running, list(devices), timeout)

    def command(
        self, argv: Sequence[str], *, input: str | None = None, check: bool = True, timeout: float = 30
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the namespace to its end, text in, text out."""
        done = self.run(
            subprocess.run,
            list(argv),
            input=input,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ | self.environment,
        )
        if check and done.returncode != 0:
            raise NamespaceError(f"{' '.join(argv)} in {self.name}: exit {done.returncode}: {done.stderr.strip()}")
        return done

    def spawn(
        self, argv: Sequence[str], *, output: IO[bytes] | int = subprocess.DEVNULL, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process in the namespace; it is killed when this process dies, however it dies."""
        process = self.run(
            subprocess.Popen,
            ["setpriv", "--pdeathsig", "KILL", "--", *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | self.environment | dict(env or {}),
            start_new_session=True,
        )
        name = Path(f"/proc/{process.pid}/comm")
        while process.poll() is None and name.read_text() == "setpriv\n":  # not bound to our life before that
            time.sleep(0.0005)
        return process


def _wait_running(devices: Sequence[str], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for device in devices:
            request = struct.pack("16sH14x", device.encode(), 0)
            while not struct.unpack_from("H", fcntl.ioctl(sock, SIOCGIFFLAGS, request), 16)[0] & IFF_RUNNING:
                if time.monotonic() > deadline:
                    raise NamespaceError(f"link {device} has no carrier after {timeout:g} s")
                time.sleep(0.001)
    time.sleep(0.001)  # the queue is opened just after the flag is set


def _sysctl_path(key: str) -> Path:
    return Path("/proc/sys") / key.replace(".", "/")


def _write_sysctls(values: Mapping[str, object], optional: bool) -> None:
    for key, value in values.items():
        skip = contextlib.suppress(FileNotFoundError, PermissionError) if optional else contextlib.nullcontext()
        with skip:
            _sysctl_path(key).write_text(f"{value}\n")
