"""Owns the places that requests are sent from: the network namespaces of pods, of nodes and of a client outside.

A request from a place is sent by this process from within that network namespace, which is what a process in the pod does,
for a thousandth of the price of an exec. It needs root on the machine that runs Docker.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

from e2e.harness.asking import Ask, ask
from e2e.harness.pace import scaled
from nodeproxy.sandbox.client import Verdict

P = ParamSpec("P")
T = TypeVar("T")

_CLONE_NEWNET: Final = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class PlaceError(Exception):
    """A network namespace is not there, or may not be entered; the text says which and why."""


class Place:
    """A network namespace that exists, with a thread of ours in it. `address`: the first one it is reached by."""

    def __init__(self, name: str, namespace: Path, addresses: Sequence[str]) -> None:
        self.name = name
        self.addresses = tuple(addresses)
        self._descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self.run(self.enter)

    def __repr__(self) -> str:
        return self.name

    @property
    def address(self) -> str:
        return self.addresses[0]

    def address_of(self, family: int) -> str:
        """Its first address of a family, 4 or 6."""
        return next(one for one in self.addresses if (":" in one) == (family == 6))

    def enter(self) -> None:
        """Let the calling thread enter. Sockets it makes from now on belong here."""
        if _libc.setns(self._descriptor, _CLONE_NEWNET) != 0:
            reason = os.strerror(ctypes.get_errno())
            raise PlaceError(f"enter the network namespace of {self.name}: {reason} (the suite needs to be root)")

    def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do `work` in this place."""
        return self._thread.submit(work, *args, **kwargs).result()

    def ask(self, address: str, port: int, count: int = 1, **options: Any) -> list[Verdict]:
        """Send so many requests, one after the other; `options` are those of `Ask`."""
        return self.run(lambda: [ask(Ask(address, port, **options)) for _ in range(count)])

    def get(self, url: str, timeout: float = 10.0) -> tuple[int, str]:
        """The status and the body of a page, whatever the status; certificates are not checked. Raises OSError."""
        return self.run(_get, url, scaled(timeout))

    def command(self, *argv: str, input: str | None = None, check: bool = True) -> str:
        """Run a program of this machine in this place, and return what it prints."""
        done = self.run(subprocess.run, argv, input=input, capture_output=True, text=True, timeout=120, check=False)
        if check and done.returncode != 0:
            raise PlaceError(f"{' '.join(argv)} in {self.name}: exit {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def close(self) -> None:
        """End the thread, and let go of the namespace."""
        self._thread.shutdown()
        os.close(self._descriptor)


def node_place(container: str, addresses: Sequence[str]) -> Place:
    """The network namespace of a node, or of any other container of Docker, by its name."""
    return Place(container, Path(f"/proc/{container_pid(container)}/ns/net"), addresses)


def container_pid(container: str) -> int:
    """The process id of a container's first process, on this machine."""
    return int(docker("inspect", "--format", "{{.State.Pid}}", container))


def pod_place(node: str, name: str, addresses: Sequence[str]) -> Place:
    """The network namespace of a pod that runs on a node: the one that has its address."""
    directory = Path(f"/proc/{container_pid(node)}/root/run/netns")
    for path in _newest_first(directory):
        place = Place(name, path, addresses)
        if place.run(_has_address, addresses[0]):
            return place
        place.close()
    raise PlaceError(f"no network namespace of {node} has the address {addresses[0]} of pod {name}")


def docker(*arguments: str) -> str:
    """Run the docker command line."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PlaceError(f"docker {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def _get(url: str, timeout: float) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=timeout, context=ssl._create_unverified_context()) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def _newest_first(directory: Path) -> Iterator[Path]:
    def age(path: Path) -> float:
        try:
            return path.stat().st_ctime
        except OSError:  # gone meanwhile
            return 0.0

    yield from sorted((path for path in directory.iterdir() if path.name.startswith("cni-")), key=age, reverse=True)


def _has_address(address: str) -> bool:
    """Whether the network namespace of this thread has it."""
    if ":" in address:
        return ipaddress.ip_address(address).packed.hex() in Path("/proc/thread-self/net/if_inet6").read_text()
    return f"|-- {address}\n" in Path("/proc/thread-self/net/fib_trie").read_text()
