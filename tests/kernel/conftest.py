"""Owns a throw-away network namespace per test, and running code and programs in it."""

import asyncio
import ctypes
import itertools
import os
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_serial = itertools.count(1)


class NetworkNamespace:
    """A named network namespace. Code runs in a thread that has entered it; sockets opened there stay in it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in a thread of its own inside the namespace; its result or exception is ours."""
        outcome: list[T] = []
        failure: list[BaseException] = []

        def inside() -> None:
            try:
                with Path(f"/run/netns/{self.name}").open() as handle:
                    if _libc.setns(handle.fileno(), _CLONE_NEWNET) != 0:
                        raise OSError(ctypes.get_errno(), "setns")
                outcome.append(function(*arguments))
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        if failure:
            raise failure[0]
        return outcome[0]

    def run_async(self, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine on an event loop of its own inside the namespace."""
        return self.run(lambda: asyncio.run(function()))

    def command(self, *arguments: str, stdin: str = "", check: bool = True, errors: bool = False) -> str:
        """Run a program inside; its standard output, or standard error with `errors`."""
        whole = ["ip", "netns", "exec", self.name, *arguments]
        done = subprocess.run(whole, input=stdin, capture_output=True, text=True, check=False)
        if check and done.returncode != 0:
            raise AssertionError(f"{arguments} failed: {done.stderr}")
        return done.stderr if errors else done.stdout


@pytest.fixture
def netns() -> Iterator[NetworkNamespace]:
    if os.geteuid() != 0:
        pytest.skip("needs root: programs a real kernel")
    name = f"nodeproxy-kernel-{os.getpid()}-{next(_serial)}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        namespace = NetworkNamespace(name)
        namespace.command("ip", "link", "set", "lo", "up")
        yield namespace
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need IPVS or a dummy interface run where IPVS mode is tested, not where every test of them would skip."""
    for item in items:
        if {"ipvs", "dummy"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.ipvs)
