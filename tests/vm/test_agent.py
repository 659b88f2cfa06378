"""The agent's operations and the protocol, without a VM: over a socket pair, on this machine."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hack.vm.guest import agent, wire
from hack.vm.guest.wire import Closed, Stream

SECRET = "open sesame"
Ask = Callable[..., Stream]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Ask]:
    """Begin an operation of an agent."""
    monkeypatch.setattr(agent, "CGROUPS", tmp_path / "no cgroups here")
    streams: list[Stream] = []

    def begin(operation: str, secret: str = SECRET, **request: Any) -> Stream:
        here, there = socket.socketpair()
        threading.Thread(target=agent.serve, args=(there, SECRET), daemon=True).start()
        here.settimeout(10)
        stream = Stream(here)
        streams.append(stream)
        stream.send_json({"op": operation, "secret": secret, **request})
        return stream

    yield begin
    for stream in streams:
        stream.close()


def run(ask: Ask, script: str, **more: Any) -> Stream:
    return ask("exec", argv=["sh", "-c", script], env={}, cwd="/", **more)


def outcome(stream: Stream) -> tuple[bytes, bytes, int]:
    """Standard output, standard error, status."""
    output = {wire.STDOUT: b"", wire.STDERR: b""}
    while True:
        kind, payload = stream.receive()
        if kind == wire.EXIT:
            return output[wire.STDOUT], output[wire.STDERR], int(payload)
        if kind in output:
            output[kind] += payload


def test_output_and_status_come_back(ask: Ask) -> None:
    assert outcome(run(ask, "echo out; echo err >&2; exit 7")) == (b"out\n", b"err\n", 7)


def test_a_command_that_a_signal_ended(ask: Ask) -> None:
    assert outcome(run(ask, "kill -TERM $$"))[2] == 128 + signal.SIGTERM


def test_a_command_that_is_not_there(ask: Ask) -> None:
    output, error, status = outcome(ask("exec", argv=["/no/such"], env={}, cwd="/"))
    assert (output, status) == (b"", 127)
    assert b"/no/such" in error


def test_standard_input_and_its_end(ask: Ask) -> None:
    stream = run(ask, "cat; echo over")
    stream.send(wire.STDIN, b"hello\n")
    stream.send(wire.END)
    assert outcome(stream) == (b"hello\nover\n", b"", 0)


def test_a_signal_reaches_the_whole_process_group(ask: Ask) -> None:
    stream = run(ask, "trap 'echo interrupted; exit 9' TERM; sleep 60 & echo ready; wait")
    assert stream.receive() == (wire.STDOUT, b"ready\n")
    stream.send(wire.SIGNAL, str(int(signal.SIGTERM)).encode())
    assert outcome(stream)[::2] == (b"interrupted\n", 9)


def test_a_command_dies_with_the_connection(ask: Ask, tmp_path: Path) -> None:
    stream = run(ask, f"echo $$ >{tmp_path / 'pid'}; echo ready; exec sleep 60")
    assert stream.receive() == (wire.STDOUT, b"ready\n")
    stream.close()
    pid = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()


def test_what_a_command_leaves_in_the_background_holds_nobody_up(ask: Ask) -> None:
    begin = time.monotonic()
    assert outcome(run(ask, "sleep 5 & echo done")) == (b"done\n", b"", 0)
    assert time.monotonic() - begin < 3


def test_a_terminal(ask: Ask) -> None:
    stream = run(ask, "test -t 0 && stty size && exit 4", tty=True, size=[33, 101])
    output, _, status = outcome(stream)
    assert (output, status) == (b"33 101\r\n", 4)


def test_without_the_secret_nothing_is_done(ask: Ask, tmp_path: Path) -> None:
    stream = ask("exec", "wrong", argv=["touch", str(tmp_path / "made")], env={}, cwd="/")
    with pytest.raises(Closed):
        stream.receive()
    assert not (tmp_path / "made").exists()


def sync(ask: Ask, root: Path, files: dict[str, tuple[int, int, bytes]]) -> tuple[list[str], dict[str, int]]:
    stream = ask("sync", root=str(root))
    stream.send_json({name: [mode, modified, len(content)] for name, (mode, modified, content) in files.items()})
    wanted: list[str] = stream.receive_json()
    for name in wanted:
        stream.send(wire.DATA, files[name][2])
    return wanted, stream.receive_json()


def test_a_tree_is_made_equal(ask: Ask, tmp_path: Path) -> None:
    root = tmp_path / "tree"
    second = 1_000_000_000
    first = {"a/x.py": (0o100644, second, b"one"), "run": (0o100755, second, b"#!"), "link": (0o120777, second, b"a/x.py")}
    assert sync(ask, root, first)[1] == {"written": 3, "removed": 0}
    assert (root / "a/x.py").read_bytes() == b"one"
    assert (root / "a/x.py").stat().st_mtime == 1
    assert os.access(root / "run", os.X_OK)
    assert (root / "link").resolve() == root / "a/x.py"
    assert sync(ask, root, first) == ([], {"written": 0, "removed": 0})
    changed = {"run": (0o100755, 2 * second, b"#!2")}
    assert sync(ask, root, changed) == (["run"], {"written": 1, "removed": 2})
    assert [path.name for path in root.iterdir()] == ["run"]
    assert (root / "run").read_bytes() == b"#!2"


def test_files_are_handed_back(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "out/deep").mkdir(parents=True)
    (tmp_path / "out/deep/file").write_bytes(b"result")
    stream = ask("pull", root=str(tmp_path / "out"))
    facts = stream.receive_json()
    assert facts["name"] == "deep/file"
    assert stream.receive() == (wire.DATA, b"result")
    assert stream.receive_json() is None


def test_settings_are_read_as_the_shell_reads_them(tmp_path: Path) -> None:
    (tmp_path / "settings").write_text("SECRET=abc\nDISKS='vdb:/a vdc:/b'\n")
    with (tmp_path / "settings").open() as file:
        assert agent.settings(file) == {"SECRET": "abc", "DISKS": "vdb:/a vdc:/b"}
