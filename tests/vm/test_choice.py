"""Which VM is tried, how large it is, and what is said when it cannot be."""

import os
import platform
from pathlib import Path

import pytest

from hack.vm import choice, debian, qemu
from hack.vm.choice import Machine
from hack.vm.places import VmError


def test_a_named_kind_is_the_only_one(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HACK_VM_ACCEL", "tcg")
    assert choice.kinds() == ["tcg"]
    monkeypatch.setenv("HACK_VM_ACCEL", "magic")
    with pytest.raises(VmError, match="HACK_VM_ACCEL=magic: auto, kvm or uml or tcg"):
        choice.kinds()


def test_software_emulation_is_always_left(cache: Path) -> None:
    assert choice.kinds()[-1] == "tcg"


def test_kvm_that_failed_is_not_tried_again(cache: Path) -> None:
    choice.remember_failed("kvm")
    assert (cache / "failed-kvm").read_text() == platform.release()
    assert str(cache / "failed-kvm") in (choice.why_not("kvm") or "")
    assert "kvm" not in choice.kinds()


def test_a_kernel_of_ones_own_is_for_one_kind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HACK_VM_KERNEL", "/nowhere")
    with pytest.raises(VmError, match="set HACK_VM_ACCEL too"):
        choice.kinds()
    with pytest.raises(VmError, match="no kernel at /nowhere"):
        choice.kernel_image(Path("/usual"))


def test_sizes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice.machine("uml").cpus == 1
    monkeypatch.setenv("HACK_VM_MEMORY", "700")
    monkeypatch.setenv("HACK_VM_CPUS", "3")
    assert choice.machine("tcg") == Machine("tcg", 700, 3)
    for wrong in ("0", "-1", "4G"):
        monkeypatch.setenv("HACK_VM_MEMORY", wrong)
        with pytest.raises(VmError, match=f"HACK_VM_MEMORY={wrong}"):
            choice.machine("tcg")


def test_too_little_memory_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: "MemTotal: 900000 kB\nMemAvailable: 500000 kB\n")
    with pytest.raises(VmError, match="488 MiB of memory are available, the VM needs 512"):
        choice.memory()


def test_what_is_missing_and_cannot_be_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian.shutil, "which", lambda *_, **__: None)
    with pytest.raises(VmError, match="apt-get install --no-install-recommends dpkg e2fsprogs qemu-system-x86 util-linux"):
        debian.need(qemu.NEEDS, print)


def test_what_is_there_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "apt", lambda *_: pytest.fail("nothing is missing"))
    debian.need({"sh": "dash"}, print)


def test_without_apt_a_debian_machine_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(VmError, match="a Debian machine is needed"):
        debian.apt("update")
