"""Child processes that never outlive us, in this network namespace or in another, and sockets in that namespace."""

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_NAMESPACES = Path("/run/netns")
# Below the range of ephemeral ports, so that no outgoing connection takes the port of a server that restarts, and below
# that of node ports.
_PORTS = range(20000, 30000)
_libc = ctypes.CDLL(None, use_errno=True)

# The kernel sends the parent-death signal when the *thread* that forked ends. This one lives as long as the program.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawn")


class StartError(Exception):
    """A process did not become ready; the message ends with the tail of its log."""


class Process:
    """A running child that writes to a log file and that the kernel kills should we die.

    Its log is appended to, so that it tells of restarts, too.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        log: Path,
        netns: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self.command = [str(part) for part in command]
        # `ip netns exec` and `setpriv` replace themselves: the child's id is that of the program.
        enter = ["ip", "netns", "exec", netns] if netns else []
        guarded = [*enter, "setpriv", "--pdeathsig", "KILL", "--", *self.command]
        with log.open("ab") as output:
            self._popen = _spawner.submit(
                subprocess.Popen[bytes],
                guarded,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=None if env is None else {**os.environ, **env},
            ).result()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._popen.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._popen.poll() is None

    def kill(self, signum: signal.Signals = signal.SIGKILL, timeout: float = 30.0) -> int:
        """Sends a signal, waits for the end (killing it when that takes too long) and returns the exit status."""
        if self.running:
            self._popen.send_signal(signum)
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            return self._popen.wait()

    def wait_ready(self, ready: Callable[[], bool], timeout: float, interval: float = 0.03) -> None:
        """Polls until `ready` says so; an OSError from it counts as not yet."""
        deadline = time.monotonic() + timeout
        while self.running:
            with contextlib.suppress(OSError):
                if ready():
                    return
            if time.monotonic() > deadline:
                raise StartError(f"{self.name} was not ready within {timeout:g} s.\n{self.tail()}")
            time.sleep(interval)
        raise StartError(f"{self.name} ended with status {self._popen.returncode}.\n{self.tail()}")

    def tail(self, lines: int = 25) -> str:
        """The end of its log, for error messages."""
        text = self.log.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join([f"--- the end of {self.log}", *text, f"--- ran {' '.join(self.command)}"])


def socket_in(
    netns: str | None, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, protocol: int = 0
) -> socket.socket:
    """A socket that lives in a named network namespace, usable from this one (None: an ordinary socket)."""
    if netns is None:
        return socket.socket(family, kind, protocol)
    return _in_namespace(netns, lambda: socket.socket(family, kind, protocol))


def connect_in(netns: str | None, address: str, port: int, timeout: float) -> socket.socket:
    """A TCP connection made from within a named network namespace (None: from here)."""
    sock = socket_in(netns, _family(address))
    try:
        sock.settimeout(timeout)
        sock.connect((address, port))
    except BaseException:
        sock.close()
        raise
    return sock


def free_port(address: str, netns: str | None = None) -> int:
    """A TCP port that is free at this address."""
    refusal: OSError | None = None
    for port in random.sample(_PORTS, 50):
        try:
            # Without SO_REUSEADDR, so that connections which linger at the port count as well.
            with socket_in(netns, _family(address)) as sock:
                sock.bind((address, port))
                return port
        except OSError as error:
            refusal = error
    raise OSError(f"No port at {address} can be had{f' in the namespace {netns}' if netns else ''}.") from refusal


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _in_namespace(netns: str, make: Callable[[], T]) -> T:
    """Calls `make` in a thread of its own that has entered the namespace, and ends with it."""
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            with (_NAMESPACES / netns).open("rb") as namespace:
                if _libc.setns(namespace.fileno(), _CLONE_NEWNET):
                    code = ctypes.get_errno()
                    raise OSError(code, f"cannot enter the network namespace {netns}: {os.strerror(code)}")
            outcome.append(make())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name=f"netns-{netns}")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
