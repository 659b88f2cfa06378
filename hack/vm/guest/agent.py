"""The agent in the VM: executes commands for the host, takes over its working tree, hands results back.

It listens in a network namespace of its own, into which it moves the VM's only network card: commands see a machine
without one, and whatever they do to addresses and packet filters cannot cut the host off.
"""

import contextlib
import ctypes
import hmac
import itertools
import os
import signal
import socket
import stat
import struct
import subprocess
import threading
import time
import traceback
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ
from typing import IO, Any, Final

from hack.vm.guest import wire
from hack.vm.guest.wire import Stream

CGROUPS: Final = Path("/sys/fs/cgroup/exec")
HEARTBEAT: Final = 5.0
_CLONE_NEWNET: Final = 0x40000000
_ADDRESS: Final = "10.0.2.15/24"
_LINGER: Final = 0.3
"""How long output is waited for after the command itself has ended: a process that it left may keep the pipe open."""

_numbers = itertools.count(1)


class Commands:
    """The `exec` operation: one process group in a cgroup of its own, its output as frames."""

    def __init__(self, stream: Stream, request: dict[str, Any]) -> None:
        self._stream = stream
        self._tty = bool(request.get("tty"))
        self._cgroup = CGROUPS / str(next(_numbers))
        self._over = threading.Event()
        self._terminal = -1
        self._process = self._start(request)

    def _start(self, request: dict[str, Any]) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **request["env"]}
        argv = list(request["argv"])
        if CGROUPS.is_dir():
            self._cgroup.mkdir()
            join = f'echo 0 >{self._cgroup}/cgroup.procs; exec "$@"'
            argv = ["/bin/sh", "-c", join, "sh", *argv]
        if self._tty:
            self._terminal, slave = os.openpty()
            self._resize(request.get("size") or [24, 80])
            with os.fdopen(slave, "r+b", buffering=0) as end:
                return subprocess.Popen(
                    ["setsid", "--ctty", "--wait", *argv],
                    cwd=request["cwd"],
                    env=environment,
                    stdin=end,
                    stdout=end,
                    stderr=end,
                )
        return subprocess.Popen(
            argv,
            cwd=request["cwd"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
        )

    def run(self) -> None:
        """Run to the end, or until the host goes away: then everything that the command started is killed."""
        threads = [threading.Thread(target=work, daemon=True) for work in (self._listen, self._beat)]
        if self._tty:
            pumps = [threading.Thread(target=self._pump, args=(self._terminal, wire.STDOUT), daemon=True)]
        else:
            assert self._process.stdout and self._process.stderr
            ends = ((self._process.stdout.fileno(), wire.STDOUT), (self._process.stderr.fileno(), wire.STDERR))
            pumps = [threading.Thread(target=self._pump, args=end, daemon=True) for end in ends]
        for thread in (*threads, *pumps):
            thread.start()
        status = self._process.wait()
        until = time.monotonic() + _LINGER
        for pump in pumps:
            pump.join(max(0.0, until - time.monotonic()))
        self._over.set()
        with contextlib.suppress(OSError):
            self._stream.send(wire.EXIT, str(128 - status if status < 0 else status).encode())
        with contextlib.suppress(OSError):
            self._cgroup.rmdir()

    def _pump(self, descriptor: int, kind: bytes) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(descriptor, 1 << 16):
                self._stream.send(kind, data)

    def _beat(self) -> None:
        with contextlib.suppress(OSError):
            while not self._over.wait(HEARTBEAT):
                self._stream.send(wire.HEARTBEAT)

    def _listen(self) -> None:
        try:
            while not self._over.is_set():
                self._handle(*self._stream.receive())
        except (OSError, wire.Closed, ValueError):
            if not self._over.is_set():
                self._kill()

    def _handle(self, kind: bytes, payload: bytes) -> None:
        if kind == wire.STDIN:
            self._input(payload)
        elif kind == wire.END and self._process.stdin:
            self._process.stdin.close()
        elif kind == wire.SIGNAL:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, int(payload))
        elif kind == wire.KILL:
            self._kill()
        elif kind == wire.SIZE and self._tty:
            self._resize([int(part) for part in payload.split()])

    def _input(self, payload: bytes) -> None:
        if self._tty:
            os.write(self._terminal, payload)
        elif self._process.stdin:
            with contextlib.suppress(BrokenPipeError, ValueError):
                self._process.stdin.write(payload)

    def _resize(self, size: list[int]) -> None:
        ioctl(self._terminal, TIOCSWINSZ, struct.pack("HHHH", size[0], size[1], 0, 0))

    def _kill(self) -> None:
        with contextlib.suppress(OSError):
            (self._cgroup / "cgroup.kill").write_text("1")
        with contextlib.suppress(OSError):
            self._process.kill()


class Tree:
    """The `sync` operation: a directory of the VM is made equal to a list of the host's files."""

    _known: dict[str, dict[str, list[int]]] = {}  # noqa: RUF012 - shared on purpose: what was taken over, by directory
    _lock = threading.Lock()

    @classmethod
    def sync(cls, stream: Stream, root: Path) -> None:
        """Take the list, ask for what is new or changed, write that, remove what went away."""
        with cls._lock:
            known = cls._known.setdefault(str(root), {})
            files: dict[str, list[int]] = stream.receive_json()
            wanted = [name for name, facts in files.items() if known.get(name) != facts]
            stream.send_json(wanted)
            for name in wanted:
                kind, content = stream.receive()
                if kind == wire.DATA:
                    cls._write(root / name, content, *files[name][:2])
                    known[name] = files[name]
            gone = [name for name in known if name not in files]
            for name in gone:
                (root / name).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    (root / name).parent.rmdir()
                del known[name]
            stream.send_json({"written": len(wanted), "removed": len(gone)})

    @staticmethod
    def _write(path: Path, content: bytes, mode: int, modified: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.sync")
        new.unlink(missing_ok=True)
        if stat.S_ISLNK(mode):
            new.symlink_to(os.fsdecode(content))
        else:
            new.write_bytes(content)
            new.chmod(stat.S_IMODE(mode))
            os.utime(new, ns=(modified, modified))
        new.replace(path)


def pull(stream: Stream, root: Path) -> None:
    """The `pull` operation: every regular file below a directory, or the one file that is named."""
    for path in [root] if root.is_file() else sorted(root.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        name = path.name if path == root else str(path.relative_to(root))
        facts = path.stat()
        stream.send_json({"name": name, "mode": stat.S_IMODE(facts.st_mode), "modified": facts.st_mtime_ns})
        stream.send(wire.DATA, path.read_bytes())
    stream.send_json(None)


def serve(connection: socket.socket, secret: str) -> None:
    """Answer one connection."""
    stream = Stream(connection)
    try:
        request = stream.receive_json()
        if not hmac.compare_digest(str(request.get("secret")), secret):
            return
        operation = request["op"]
        if operation == "ping":
            set_clock(request["time"])
            stream.send_json({"kernel": os.uname().release})
        elif operation == "exec":
            execute(stream, request)
        elif operation == "sync":
            Tree.sync(stream, Path(request["root"]))
        elif operation == "pull":
            pull(stream, Path(request["root"]))
    except (OSError, wire.Closed):
        pass
    except Exception:
        traceback.print_exc()
    finally:
        stream.close()


def execute(stream: Stream, request: dict[str, Any]) -> None:
    """Run a command, or say why it cannot be started, with the shell's statuses."""
    try:
        commands = Commands(stream, request)
    except OSError as error:
        stream.send(wire.STDERR, f"hack.vm: {error}\n".encode())
        stream.send(wire.EXIT, b"127")
        return
    commands.run()


def set_clock(now: float) -> None:
    """Set the VM's clock where it is off (after a snapshot was loaded, or where the real-time clock is coarse)."""
    if abs(time.time() - now) > 0.1 and os.getpid() != 1 and Path("/run/vm/settings").exists():
        with contextlib.suppress(OSError):
            time.clock_settime(time.CLOCK_REALTIME, now)


@contextlib.contextmanager
def own_network(card: str) -> Iterator[None]:
    """Enter a new network namespace that has the VM's card, for making a socket; then leave it."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    if libc.unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    outside = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{before}", "ip"]
    subprocess.run([*outside, "link", "set", card, "netns", str(os.getpid())], check=True)
    for command in ("link set lo up", f"address add {_ADDRESS} dev {card}", f"link set {card} up"):
        subprocess.run(["ip", *command.split()], check=True)
    try:
        yield
    finally:
        if libc.setns(before, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(before)


def settings(file: IO[str]) -> dict[str, str]:
    """The assignments of a shell file that only has `NAME='value'`."""
    pairs = (line.rstrip("\n").partition("=") for line in file if "=" in line)
    return {name: value.strip("'") for name, _, value in pairs}


def main() -> None:
    """Listen for ever."""
    with open("settings") as file:  # noqa: PTH123 - relative to where init put us
        known = settings(file)
    secret = known["SECRET"]
    with own_network(known["CARD"]):
        listener = socket.create_server(("", wire.PORT), backlog=64)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    print("hack.vm: ready", flush=True)
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=serve, args=(connection, secret), daemon=True).start()


if __name__ == "__main__":
    main()
