"""Owns the child processes of a load: how they are started, told what to do line by line, and ended.

A child reads JSON lines from its standard input and writes JSON lines to its standard output. The end of its input is its
end, so it never outlives us. It enters network namespaces by itself, by their names.
"""

from __future__ import annotations

import ctypes
import os
import select
import subprocess
import sys
import tempfile
import time
from typing import Final, TypeVar

import msgspec

from nodeproxy.sandbox.namespace import NETNS_DIR

T = TypeVar("T")

_CLONE_NEWNET: Final = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class LoadError(Exception):
    """A generator or the servers did not do what they were told; the text holds what they wrote."""


def enter(namespace: str) -> None:
    """Let the calling thread enter a named network namespace. Sockets it has made stay where they were made."""
    descriptor = os.open(NETNS_DIR / namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"enter network namespace {namespace}: {os.strerror(code)}")
    finally:
        os.close(descriptor)


class Child:
    """A child process of this Python, running a module of this package."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        self._rest = b""
        command = [sys.executable, "-m", module]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors)

    def say(self, message: object) -> None:
        """Send one line. Raises LoadError if the child has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise LoadError(self._text("has ended")) from None

    def hear(self, kind: type[T], timeout: float) -> T:
        """The next line of the child, as a `kind`. Raises LoadError after `timeout` seconds, or if it has ended."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout
        while b"\n" not in self._rest:
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise LoadError(self._text(f"said nothing for {timeout:g} s"))
            data = os.read(descriptor, 1 << 20)
            if not data:
                raise LoadError(self._text("has ended"))
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return msgspec.json.decode(line, type=kind)

    def end(self) -> None:
        """End its input, and kill it if that does not end it. Safe to call twice."""
        if self._process.stdin and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._errors.close()

    def _text(self, what: str) -> str:
        self._errors.seek(0)
        return f"{self._module} {what}\n{self._errors.read().decode(errors='replace')}".strip()
