"""Owns how programs are run: their output, a time limit, and errors that quote the program's last words."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

from tenacity import retry, retry_if_exception, stop_after_attempt, wait_fixed

from hack.kind.places import KindError

_LAST_WORDS = 25
# While others make and remove links (as tests in namespaces do), Docker may not find its own bridge.
_PASSING = ("no such network interface",)
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with the system's programs on PATH, and `more`."""
    return {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:{_SBIN}", **(more or {})}


def run(
    command: Sequence[object],
    *,
    input: str | bytes | None = None,
    stdin: IO[bytes] | None = None,
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Standard output of a program that must succeed within `timeout` seconds; KindError quotes what it said."""
    words = [str(word) for word in command]
    data = input.encode() if isinstance(input, str) else input
    source = subprocess.PIPE if data is not None else stdin or subprocess.DEVNULL
    try:
        # A process group of its own: Ctrl-C comes to us alone, and we end all that the program has started.
        process = subprocess.Popen(
            words,
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(env),
            cwd=cwd,
            process_group=0,
        )
    except FileNotFoundError as error:
        raise KindError(f"there is no program {words[0]}") from error
    with process:
        try:
            output, errors = process.communicate(data, timeout=timeout)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            said = b"".join(process.communicate())
            raise KindError(f"not done within {timeout:.0f} s: {shlex.join(words)}\n{_tail(said)}") from error
    if process.returncode:
        raise KindError(f"failed ({process.returncode}): {shlex.join(words)}\n{_tail(output + errors)}")
    return output.decode(errors="replace")


def _is_passing(error: BaseException) -> bool:
    return isinstance(error, KindError) and any(text in str(error) for text in _PASSING)


again: Final = retry(retry=retry_if_exception(_is_passing), stop=stop_after_attempt(3), wait=wait_fixed(1), reraise=True)
"""Decorates what may fail by chance in Docker, and will not if it is done again."""


def succeeds(command: Sequence[object], *, timeout: float | None = None) -> bool:
    """Whether a program ends well (False too if there is none, or it takes longer than `timeout` seconds)."""
    try:
        run(command, timeout=timeout)
    except KindError:
        return False
    return True


def _tail(output: bytes) -> str:
    return "\n".join(output.decode(errors="replace").splitlines()[-_LAST_WORDS:])
