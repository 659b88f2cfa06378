"""Probes that go on while something happens on the node: every frontend of the Services, from a pod and from outside."""

from __future__ import annotations

import socket
import threading
import time
from types import TracebackType
from typing import NamedTuple, Self

from nodeproxy.sandbox.client import Answered, Connected, Probe, Verdict, probe_many
from nodeproxy.sandbox.namespace import Namespace
from nodeproxy.sandbox.pace import scaled
from nodeproxy.sandbox.topology import Sandbox
from tests.takeover import shop

_PAUSE = 0.01
_PATIENCE = 0.7  # seconds until a packet counts as lost: below TCP's first repetition


class _Round(NamedTuple):
    """Probes sent together from one place, which all must be answered, or none."""

    where: Namespace
    probes: list[Probe]
    answered: bool = True
    patience: float = _PATIENCE

    def send(self) -> list[tuple[Probe, Verdict]]:
        """Send all; those that did not get the answer that they should, or that got one and should not."""
        verdicts = zip(self.probes, probe_many(self.where, self.probes, timeout=self.patience), strict=True)
        if self.answered:
            return [(probe, verdict) for probe, verdict in verdicts if not isinstance(verdict, Answered)]
        return [(probe, verdict) for probe, verdict in verdicts if isinstance(verdict, Answered | Connected)]


class Failure(NamedTuple):
    """A probe that got another answer than it should, `after` so many seconds of probing."""

    after: float
    probe: Probe
    verdict: Verdict

    def __str__(self) -> str:
        return f"{self.after:6.2f} s: {self.probe.protocol} to {self.probe.destination}:{self.probe.port}: {self.verdict}"


def _rounds(box: Sandbox) -> list[_Round]:
    node4, node6 = shop.NODE_ADDRESS, shop.NODE_ADDRESS6
    from_pod = [Probe(one, 80) for one in (shop.WEB, shop.WEB6, shop.REMOTE_WEB, shop.STICKY, shop.LOCAL)]
    from_pod += [Probe(shop.DNS, 53, "UDP"), Probe(node4, shop.WEB_PORT), Probe(shop.EXTERNAL_IP, 80)]
    outside = [Probe(one, 80) for one in (shop.EXTERNAL_IP, shop.BALANCED_IP, shop.FENCED_IP, shop.WEB)]
    outside += [Probe(one, shop.WEB_PORT) for one in (node4, node6)]
    outside += [Probe(node4, shop.LOCAL_PORT), Probe(node4, shop.DNS_PORT, "UDP")]
    return [
        _Round(box.pods[shop.ASKING_POD[0]], from_pod),
        _Round(box.clients[shop.CLIENT[0]], outside),
        _Round(box.node, [Probe(shop.WEB, 80), Probe(shop.DNS, 53, "UDP")]),
        _Round(box.clients[shop.REFUSED_CLIENT], [Probe(shop.FENCED_IP, 80)], answered=False, patience=0.1),
    ]


class Probing:
    """Probes without end, from each place by a thread of its own, while the block runs."""

    def __init__(self, box: Sandbox) -> None:
        self.failures: list[Failure] = []
        self.sent = 0
        self._rounds = _rounds(box)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(one,)) for one in self._rounds]

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def problems(self) -> list[str]:
        """What went wrong, in words: empty where each probe got the answer that it should. Call it after the block."""
        if self.sent < 10 * len(self._rounds):
            return [f"only {self.sent} probes were sent"]
        if not self.failures:
            return []
        return [f"{len(self.failures)} of {self.sent} probes failed:", *(str(failure) for failure in self.failures[:20])]

    def _run(self, one: _Round) -> None:
        while not self._stop.is_set():
            after = time.monotonic() - self._start
            self.failures += (Failure(after, probe, verdict) for probe, verdict in one.send())
            self.sent += len(one.probes)
            self._stop.wait(_PAUSE)


def wait_serving(box: Sandbox, timeout: float = 10) -> None:
    """Wait until every probe gets the answer that it should, once: a proxy may say that it is ready a little early."""
    deadline = time.monotonic() + scaled(timeout)
    while True:
        wrong = [f"{probe}: {verdict}" for one in _rounds(box) for probe, verdict in one.send()]
        if not wrong:
            return
        assert time.monotonic() < deadline, "\n".join(wrong)


def asked(box: Sandbox, address: str, where: Namespace | None = None) -> Verdict:
    """What a pod, or somebody else, is answered on port 80 of a service address."""
    return probe_many(where or box.pods[shop.ASKING_POD[0]], [Probe(address, 80)], timeout=_PATIENCE)[0]


class Stream:
    """A TCP connection of a pod through a Service that lives on: each line sent is answered by the same server."""

    def __init__(self, where: Namespace, address: str, port: int) -> None:
        self._socket = where.run(_connect, address, port)
        self._file = self._socket.makefile("rwb", buffering=0)
        self._greeting = self._file.readline()

    def problems(self) -> list[str]:
        """What went wrong: empty where the same server still answers on it."""
        try:
            self._file.write(b"on\n")
            answer = self._file.readline()
        except OSError as error:
            return [f"an established connection is dead: {error}"]
        return [] if answer == self._greeting else [f"an established connection was answered {answer!r}"]

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def _connect(address: str, port: int) -> socket.socket:
    return socket.create_connection((address, port), timeout=scaled(3))
