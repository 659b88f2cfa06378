"""The state of a VM: what is alive, what is left behind, what breaks; built once by whoever comes first."""

import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from hack.vm import boot, instance, places, uml_kernel
from hack.vm.instance import Vm
from hack.vm.kernel import Kernel
from hack.vm.places import VmError, built
from hack.vm.progress import Progress


def running(state: Path) -> subprocess.Popen[bytes]:
    """A process that looks like the VM of a state folder."""
    state.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(["sh", "-c", "sleep 60; :", str(state / "ramdisk")])
    while str(state) not in read(Path(f"/proc/{process.pid}/cmdline")):
        time.sleep(0.01)
    return process


def write_facts(state: Path, pid: int) -> None:
    (state / "vm.json").write_text(json.dumps({"pid": pid, "kind": "tcg", "address": "127.0.0.1", "port": 1, "secret": "x"}))


def test_a_vm_is_alive_while_its_process_is(tmp_path: Path) -> None:
    vm = Vm(tmp_path / "vm")
    process = running(vm.state)
    assert vm.facts() is None
    write_facts(vm.state, process.pid)
    assert vm.facts() is not None
    assert vm.stop()
    assert process.wait(5) == -9
    assert not vm.stop()
    assert not (vm.state / "vm.json").exists()


def test_another_process_with_its_number_is_not_the_vm(tmp_path: Path) -> None:
    vm = Vm(tmp_path)
    write_facts(vm.state, os.getpid())
    assert vm.facts() is None
    assert not vm.stop()


def test_what_a_killed_run_left_is_swept(cache: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    left, kept = (places.states() / f"run-{pid}" for pid in (gone.pid, os.getpid()))
    for folder in (left, kept):
        folder.mkdir(parents=True)
    process = running(left)
    write_facts(left, process.pid)
    boot.sweep()
    assert process.wait(5) == -9
    assert not left.exists()
    assert kept.exists()


def test_a_kernel_that_broke_is_noticed(tmp_path: Path) -> None:
    vm = Vm(tmp_path)
    vm.console.write_text(
        "fine\n[ 1.0] BUG: kernel NULL pointer dereference, address: 0\n[ 1.1] Kernel panic - not syncing\n"
    )
    assert vm.trouble() == "[ 1.0] BUG: kernel NULL pointer dereference, address: 0"
    assert "Kernel panic" in vm.last_words()


def test_only_one_builds_and_the_others_wait(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made: list[int] = []

    def make(number: int) -> None:
        with built(tmp_path / "thing") as work:
            if work is not None:
                time.sleep(0.3)
                (work / "file").write_text(str(number))
                made.append(number)

    threads = [threading.Thread(target=make, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert (tmp_path / "thing/file").read_text() == str(made[0])
    assert "waiting for another process" in capfd.readouterr().err


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with built(tmp_path / "thing") as work:
            assert work is not None
            (work / "half").touch()
            raise VmError("no")

    with pytest.raises(VmError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["thing.lock"]


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("script", "limit", "message"),
    [
        ("echo 'Too few physical memory!'; exit 1", "9", "process ended with status 1 before the VM was up"),
        ("exec sleep 60", "1", r"not up after 1 s \(HACK_VM_BOOT_LIMIT sets this\)"),
        ("echo 'Kernel panic - not syncing: no root'; exec sleep 60", "1", "It says: Kernel panic - not syncing: no root"),
        ("echo 'hack.vm: ready'; exec sleep 60", "9", "the VM's agent does not answer"),
    ],
)
def test_a_vm_that_does_not_boot_says_why(
    cache: Path, monkeypatch: pytest.MonkeyPatch, script: str, limit: str, message: str
) -> None:
    cache.mkdir()
    image = cache / "linux"
    image.write_text(f"#!/bin/sh\n{script}\n")
    image.chmod(0o755)
    (cache / "busybox").write_bytes(b"")
    monkeypatch.setattr(uml_kernel, "user_mode_kernel", lambda _: Kernel("6.1", image, cache))
    monkeypatch.setattr(instance, "CONNECT_LIMIT", 1.0)
    monkeypatch.setenv("HACK_VM_ACCEL", "uml")
    monkeypatch.setenv("HACK_VM_BOOT_LIMIT", limit)
    with pytest.raises(VmError, match=message) as caught:
        boot.start(Progress(quiet=True))
    assert "HACK_VM_ACCEL=tcg" in str(caught.value) or "agent" in message
    assert str(places.states() / "shared") in str(caught.value)
    assert instance.shared().facts() is None
    assert not [each for each in Path("/proc").glob("[0-9]*/cmdline") if str(image) in read(each)]


def read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
