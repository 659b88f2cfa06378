"""The process that is a User Mode Linux: its processor, its memory, its kernel's configuration."""

import os
import subprocess
from pathlib import Path

import pytest

from hack.vm import uml, uml_kernel
from hack.vm.places import VmError


def test_two_vms_keep_to_two_processors(cache: Path) -> None:
    cache.mkdir()
    usable = sorted(os.sched_getaffinity(0))
    with uml.processor() as (first, held), uml.processor() as (second, _):
        assert {first, second} <= set(usable)
        assert (first != second) == (len(usable) > 1)
        assert len(held) == 1


def test_a_processor_is_free_again_when_the_last_holder_ended(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    only = min(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {only})
    with uml.processor() as (_, held):
        holder = subprocess.Popen(["sleep", "60"], pass_fds=held)
    with uml.processor() as (number, held):
        assert (number, held) == (only, ())
    holder.kill()
    holder.wait()
    with uml.processor() as (number, held):
        assert (number, len(held)) == (only, 1)


def test_memory_goes_where_there_is_room(tmp_path: Path) -> None:
    assert uml.environment(tmp_path, 1 << 40)["TMPDIR"] == str(tmp_path)


def test_every_wish_of_the_configuration_must_come_true(tmp_path: Path) -> None:
    wishes = (Path(uml_kernel.__file__).parent / "uml.config").read_text()
    (tmp_path / ".config").write_text(wishes)
    uml_kernel.check_configuration(tmp_path)
    (tmp_path / ".config").write_text(wishes.replace("CONFIG_IP_VS=m\n", ""))
    with pytest.raises(VmError, match=r"did not take CONFIG_IP_VS=m$"):
        uml_kernel.check_configuration(tmp_path)


def test_a_build_that_failed_is_not_begun_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Path] = []

    def fetch(work: Path, _: object) -> None:
        (work / "package/usr/src").mkdir(parents=True)
        (work / "package/usr/src/linux-source-9.tar.xz").write_text("no archive")
        begun.append(work)

    monkeypatch.setattr(uml_kernel, "_fetch", fetch)
    with pytest.raises(VmError, match=r"tar -xf .* failed with status 2:"):
        uml_kernel.user_mode_kernel(print)
    with pytest.raises(VmError, match=r"could not be built before \(rm .*\.failed to try again\):\ntar -xf"):
        uml_kernel.user_mode_kernel(print)
    assert len(begun) == 1
    assert not list(cache.glob("*.new"))
