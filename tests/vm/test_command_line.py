"""What `python -m hack.vm` understands, what it refuses, and where it runs a command."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hack.conformance import vm as conformance
from hack.vm import cli, e2e, native
from hack.vm.places import REPOSITORY, VmError

BROKEN = 125


def test_what_follows_the_dashes_is_the_command() -> None:
    options = cli.parser().parse_args(["run", "--timeout", "3", "--env", "A=1", "--", "pytest", "-x", "--timeout", "9"])
    assert cli._command(options) == ["pytest", "-x", "--timeout", "9"]
    assert options.timeout == 3
    assert options.env == ["A=1"]


def test_a_command_is_needed(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run"]) == BROKEN
    assert "which command?" in capsys.readouterr().err


def test_variables_are_set_or_taken_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "from here")
    monkeypatch.delenv("NOWHERE", raising=False)
    values = cli.environment(["A=x=y", "EMPTY=", "HERE", "NOWHERE"], within_vm=True)
    assert values["A"] == "x=y"
    assert values["EMPTY"] == ""
    assert values["HERE"] == "from here"
    assert "NOWHERE" not in values


def test_programs_of_the_virtual_environment_come_first_everywhere() -> None:
    for within_vm in (True, False):
        assert cli.environment([], within_vm=within_vm)["PATH"].startswith(f"{REPOSITORY}/.venv/bin:")


def test_a_variable_needs_a_name() -> None:
    with pytest.raises(VmError, match="NAME=VALUE"):
        cli.environment(["=x"], within_vm=True)


def test_exec_without_a_vm_says_how_to_start_one(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["exec", "--", "true"]) == BROKEN
    assert "python -m hack.vm start" in capsys.readouterr().err


def test_status_and_stop_without_a_vm(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status"]) == 1
    assert cli.main(["stop"]) == 0
    assert "no VM is running" in capsys.readouterr().out


def test_a_wrong_wish_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HACK_VM", "maybe")
    assert cli.main(["run", "--", "true"]) == BROKEN
    assert "HACK_VM=maybe: native, vm or auto" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("sleep 9", 124)])
def test_natively_the_status_is_the_commands(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, status: int
) -> None:
    monkeypatch.setenv("HACK_VM", "native")
    assert cli.main(["run", "--timeout", "0.5", "--", "sh", "-c", command]) == status
    assert f"HACK_VM=native, running on it: sh -c {command}" in capsys.readouterr().err


def test_natively_a_missing_program_is_127(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert native.execute(["no-such-program"], env={}, cwd="/", limit=1) == native.NOT_FOUND
    assert "no-such-program" in capsys.readouterr().err


def test_a_kernel_with_ipvs_needs_no_vm(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "has_ipvs", lambda: True)
    assert cli.main(["run", "--timeout", "9", "--", "true"]) == 0
    assert "this machine's kernel has IPVS, running on it: true" in capsys.readouterr().err


def test_without_a_limit_the_command_takes_over(cache: Path) -> None:
    child = os.fork()
    if child == 0:
        native.execute(["sh", "-c", "exit 5"], env={}, cwd="/", limit=None)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize(("suite", "name"), [(e2e.main, "e2e"), (conformance.main, "hack.conformance")])
def test_help_of_a_suite_makes_no_machine_ready(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    suite: Callable[[Sequence[str]], int],
    name: str,
    flag: str,
) -> None:
    monkeypatch.setattr(cli, "runs_here", lambda: pytest.fail("it looks for where the suite is to run"))
    assert suite([flag]) == 0
    assert f"Usage: python -m {name} " in capfd.readouterr().out
