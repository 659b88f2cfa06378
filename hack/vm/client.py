"""Running one command in the VM from here: its output live, its status, signals, a time limit, a kernel that dies."""

import contextlib
import os
import shutil
import signal
import socket
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Final

from hack.vm.guest import wire
from hack.vm.guest.wire import Closed, Stream
from hack.vm.instance import Vm
from hack.vm.native import TIMED_OUT
from hack.vm.places import VmError

SILENCE: Final = 180.0
"""A VM from which not even a heartbeat came for so long is taken for dead."""
_GRACE: Final = 5.0
_OUTPUT: Final = {wire.STDOUT: 1, wire.STDERR: 2}
_NOBODY_READS: Final = 128 + signal.SIGPIPE


def execute(
    vm: Vm,
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: str,
    limit: float | None = None,
    terminal: bool = False,
    stdin: bool = False,
) -> int:
    """Run a command in the VM; its exit status."""
    size = list(shutil.get_terminal_size())[::-1]
    stream = vm.connect("exec", argv=list(argv), env=dict(env), cwd=cwd, tty=terminal, size=size)
    stream.socket.settimeout(SILENCE)
    run = _Run(vm, stream, limit)
    work = [run.watch, *([lambda: _input(stream)] if stdin or terminal else [lambda: stream.send(wire.END)])]
    with _signals(run), _raw_terminal(terminal), contextlib.closing(stream):
        for each in work:
            threading.Thread(target=each, daemon=True).start()
        return run.outcome()


class _Run:
    """A command that runs."""

    def __init__(self, vm: Vm, stream: Stream, limit: float | None) -> None:
        self._vm = vm
        self._stream = stream
        self._limit = limit
        self._timed_out = False
        self._interrupts = 0
        self._over = threading.Event()

    def outcome(self) -> int:
        """Pass output on until the command has ended."""
        clock = threading.Timer(self._limit, self._expire) if self._limit is not None else None
        if clock:
            clock.daemon = True
            clock.start()
        try:
            while True:
                kind, payload = self._stream.receive()
                if kind == wire.EXIT:
                    return TIMED_OUT if self._timed_out else int(payload)
                if kind in _OUTPUT and not _write(_OUTPUT[kind], payload):
                    return _NOBODY_READS  # closing the connection ends the command
        except TimeoutError:
            raise VmError(f"the VM has been silent for {SILENCE:.0f} s{self._vm.last_words()}") from None
        except (OSError, Closed):
            raise VmError(self._death()) from None
        finally:
            self._over.set()
            if clock:
                clock.cancel()

    def watch(self) -> None:
        """Break the connection off when the VM is gone: nobody else would tell."""
        while not self._over.wait(0.5):
            if self._vm.facts() is None:
                with contextlib.suppress(OSError):
                    self._stream.socket.shutdown(socket.SHUT_RDWR)
                return

    def pass_on(self, number: int, _frame: FrameType | None = None) -> None:
        """A signal that came here goes to the command; the second interrupt kills all of it."""
        self._interrupts += 1
        with contextlib.suppress(OSError):
            if self._interrupts > 1:
                self._stream.send(wire.KILL)
            else:
                self._stream.send(wire.SIGNAL, str(int(number)).encode())

    def resize(self, *_: object) -> None:
        """The terminal's size changed."""
        columns, rows = shutil.get_terminal_size()
        with contextlib.suppress(OSError):
            self._stream.send(wire.SIZE, f"{rows} {columns}".encode())

    def _expire(self) -> None:
        self._timed_out = True
        print(f"vm: time is up after {self._limit:g} s, ending the command", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            self._stream.send(wire.SIGNAL, str(int(signal.SIGTERM)).encode())
            time.sleep(_GRACE)
            self._stream.send(wire.KILL)

    def _death(self) -> str:
        """Why the connection broke: mostly since the VM is gone."""
        until = time.monotonic() + 5
        while self._vm.facts() is not None and time.monotonic() < until:
            time.sleep(0.1)
        trouble = self._vm.trouble()
        what = "the VM died" if self._vm.facts() is None else "the VM's agent broke off"
        return f"{what} while the command ran{f': {trouble}' if trouble else ''}{self._vm.last_words()}"


def _write(descriptor: int, data: bytes) -> bool:
    """Write to a standard stream of ours; False when whoever read it is gone."""
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except BrokenPipeError:
        return False
    return True


def _input(stream: Stream) -> None:
    with contextlib.suppress(OSError, ValueError):
        while data := os.read(0, 1 << 16):
            stream.send(wire.STDIN, data)
        stream.send(wire.END)


@contextlib.contextmanager
def _signals(run: _Run) -> Iterator[None]:
    before = {number: signal.signal(number, run.pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, run.resize)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _raw_terminal(terminal: bool) -> Iterator[None]:
    if not terminal or not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def reachable(vm: Vm) -> bool:
    """Whether the agent answers at once."""
    try:
        stream = vm.connect("ping", time=time.time())
        stream.socket.settimeout(10)
        stream.receive_json()
    except (TimeoutError, OSError, Closed, VmError):
        return False
    stream.close()
    return True
