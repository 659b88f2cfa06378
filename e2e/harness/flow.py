"""Owns requests without end from several places at the same time, of which every failure is remembered.

A lane is one kind of request from one place to one address. "connection" makes a connection for each request, "stream" sends
one request after the other on one connection, and "udp" keeps its source port. Each lane is a thread in its place's network
namespace, which sends a request, waits for the answer, pauses, and sends the next.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Literal, Self

from e2e.harness.asking import WHO_ARE_YOU, Ask, ask, http_bodies, name_of, open_socket
from e2e.harness.pace import scaled
from e2e.harness.places import Place
from nodeproxy.sandbox.client import Answered

Kind = Literal["connection", "stream", "udp"]

_TIMEOUT: Final = 5.0  # a lost packet is sent again before
_SLOW: Final = 0.9  # a request that took as long had a packet lost


@dataclass(frozen=True, slots=True)
class Lane:
    """Where requests go, from where, how, and seconds between an answer and the next request."""

    place: Place
    address: str
    port: int
    kind: Kind = "connection"
    pause: float = 0.02

    def __str__(self) -> str:
        return f"{self.kind} from {self.place} to {self.address}:{self.port}"


@dataclass
class Seen:
    """What one lane saw. `failures`: seconds since the beginning, and what. `slow`: answered, but packets were lost."""

    lane: Lane
    answers: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[float, str]] = field(default_factory=list)
    slow: int = 0
    last: float = 0.0

    def __str__(self) -> str:
        shown = [f"  {at:8.3f} s: {what}" for at, what in self.failures[:5]]
        more = [f"  … {len(self.failures)} in all"] if len(self.failures) > 5 else []
        answers = f"{self.answers.total()} answered by {dict(self.answers)}"
        head = f"{self.lane}: {answers}, {self.slow} slow, {len(self.failures)} failed"
        return "\n".join([head, *shown, *more])


class Requests:
    """A context manager: requests flow within. `stop` ends them early and returns what was seen."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.seen = [Seen(lane) for lane in lanes]
        self._stop = threading.Event()
        self._began = time.monotonic()
        self._threads = [threading.Thread(target=self._run, args=(one,), daemon=True) for one in self.seen]

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def since(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    def stop(self) -> list[Seen]:
        """End, and say what was seen."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        return self.seen

    def steady(self, least: int = 20) -> str:
        """End them, and demand that none failed, and that each lane had at least so many answers. Returns a summary."""
        self.stop()
        summary = "\n".join(str(one) for one in self.seen)
        assert not any(one.failures for one in self.seen), f"requests failed\n{summary}"
        assert all(one.answers.total() >= least for one in self.seen), f"hardly any requests\n{summary}"
        return summary

    def failures_after(self, moment: float) -> list[str]:
        """What failed later than so many seconds after the beginning."""
        return [f"{one.lane}: {at:.3f} s: {what}" for one in self.seen for at, what in one.failures if at > moment]

    def _run(self, seen: Seen) -> None:
        seen.lane.place.enter()
        with contextlib.closing(_KINDS[seen.lane.kind](seen.lane)) as step:
            while not self._stop.is_set():
                start = time.monotonic()
                what, answered = step.request()
                now = time.monotonic()
                if answered:
                    seen.answers[what] += 1
                    seen.slow += now - start > _SLOW
                else:
                    seen.failures.append((start - self._began, f"{what} after {now - start:.3f} s"))
                self._stop.wait(seen.lane.pause)


class _Connections:
    """A new connection each time."""

    def __init__(self, lane: Lane) -> None:
        self._ask = Ask(lane.address, lane.port, timeout=_TIMEOUT, lasting=True)

    def request(self) -> tuple[str, bool]:
        try:
            verdict = ask(self._ask)
        except OSError as error:
            return str(error), False
        return name_of(verdict), isinstance(verdict, Answered)

    def close(self) -> None:
        pass


class _Stream:
    """One connection for all requests; when it is cut, that is one failure, and another is made."""

    def __init__(self, lane: Lane) -> None:
        self._ask = Ask(lane.address, lane.port, lasting=True)
        self._sock: socket.socket | None = None

    def request(self) -> tuple[str, bool]:
        try:
            if self._sock is None:
                self._sock = open_socket(self._ask)
                self._sock.settimeout(scaled(_TIMEOUT))
                self._sock.connect((self._ask.address, self._ask.port))
            self._sock.sendall(WHO_ARE_YOU)
            data = b""
            while not (bodies := http_bodies(data)):
                block = self._sock.recv(4096)
                if not block:
                    raise ConnectionResetError("the connection was closed by the other side")
                data += block
        except OSError as error:
            self.close()
            return f"{type(error).__name__}: {error}", False
        return bodies[0], True

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


class _Datagrams:
    """One socket, hence one source port, for all requests. A datagram is sent again after a second, as a resolver would."""

    def __init__(self, lane: Lane) -> None:
        self._sock = open_socket(Ask(lane.address, lane.port, "UDP", lasting=True))
        self._sock.connect((lane.address, lane.port))

    def request(self) -> tuple[str, bool]:
        deadline = time.monotonic() + scaled(_TIMEOUT)
        while time.monotonic() < deadline:
            self._sock.settimeout(1.0)
            try:
                self._sock.send(b"hostname")
                return self._sock.recv(2048).decode(), True
            except TimeoutError:
                continue
            except OSError as error:
                return f"{type(error).__name__}: {error}", False
        return "no answer", False

    def close(self) -> None:
        self._sock.close()


_KINDS: Final[Mapping[Kind, type[_Connections] | type[_Stream] | type[_Datagrams]]] = {
    "connection": _Connections,
    "stream": _Stream,
    "udp": _Datagrams,
}
