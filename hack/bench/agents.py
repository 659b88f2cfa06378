"""Owns starting what is compared, nodeproxy and kube-proxy by path, and telling when each says that it is done."""

from __future__ import annotations

import http.client
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from hack.bench.feeds import SERVERS, SOURCES, Feed
from hack.bench.objects import NODE
from nodeproxy.sandbox.agent import (
    HEALTHZ,
    METRICS,
    AgentError,
    AgentFlags,
    AgentProcess,
    Variant,
    http_get,
    variant_environment,
)
from nodeproxy.sandbox.pace import scaled
from nodeproxy.sandbox.topology import Sandbox

_LAST_SYNC: Final = "kubeproxy_sync_proxy_rules_last_timestamp_seconds"
_RARELY = "24h"
_HTTP_TIMEOUT = 5.0
_LEAST_PAUSE, _PAUSE_SHARE = 0.02, 0.01
_STOP_TIMEOUT = 20.0


class Contender(ABC):
    """A program to be measured, as it is started on a node, in one mode.

    `periodic`: it syncs every now and then as by default. Else it does so too rarely to be seen: what it then uses would be
    taken for that of a change.
    """

    name: str
    program: str
    sources: Sequence[str]

    def __init__(self, mode: str, *, periodic: bool = False) -> None:
        self.mode = mode
        self.periodic = periodic

    @abstractmethod
    def command(self, feed: Feed, variant: Variant) -> list[str]:
        """Its command line."""

    @abstractmethod
    def ready_at(self, agent: AgentProcess) -> float | None:
        """When (Unix seconds) it was done with its first sync; None if it is not yet."""

    def environment(self, box: Sandbox, variant: Variant) -> dict[str, str]:
        """What it finds in its environment: `iptables` is of the variant."""
        return variant_environment(box, variant)

    def flags(self, feed: Feed) -> list[str]:
        """What nodeproxy and kube-proxy have in common."""
        rare = [] if self.periodic else [f"--{mode}-sync-period={_RARELY}" for mode in ("iptables", "ipvs")]
        return [*feed.flags(), *AgentFlags(hostname=NODE, mode=self.mode).arguments(), *rare]


class Nodeproxy(Contender):
    """Ours, of this Python's environment. `profile`: the file that gets its profile when it ends."""

    name = "nodeproxy"
    sources = SOURCES

    def __init__(self, mode: str, *, periodic: bool = False, profile: Path | None = None) -> None:
        super().__init__(mode, periodic=periodic)
        self.program = str(Path(sys.executable).with_name("nodeproxy"))
        self._start = [self.program]
        if profile is not None:
            self._start = [sys.executable, "-m", "hack.bench.profiled", str(profile)]

    def command(self, feed: Feed, variant: Variant) -> list[str]:
        return [*self._start, "run", "--mode", self.mode, "--iptables-variant", variant, *self.flags(feed)]

    def environment(self, box: Sandbox, variant: Variant) -> dict[str, str]:
        """Bytecode is kept from the first start on, as with every installed program, whatever our own environment says."""
        return {**super().environment(box, variant), "PYTHONDONTWRITEBYTECODE": ""}

    def ready_at(self, agent: AgentProcess) -> float | None:
        """Healthz is 200: everything that was wanted when it looked is in the kernel, in both families."""
        status, _ = http_get(agent.node, f"http://{HEALTHZ}/healthz", timeout=scaled(_HTTP_TIMEOUT))
        return time.time() if status == 200 else None


class KubeProxy(Contender):
    """kube-proxy, by path."""

    sources = SERVERS

    def __init__(self, mode: str, program: Path, *, periodic: bool = False) -> None:
        super().__init__(mode, periodic=periodic)
        self.program = str(program)
        self.name = _version(program)

    def command(self, feed: Feed, variant: Variant) -> list[str]:
        json = ["--kube-api-content-type", "application/json"] if feed.json_only else []
        return [self.program, "--proxy-mode", self.mode, *json, *self.flags(feed)]

    def ready_at(self, agent: AgentProcess) -> float | None:
        """Its healthz is 200 too early; its metric has the time of the last sync of each family."""
        _, text = http_get(agent.node, f"http://{METRICS}/metrics", timeout=scaled(_HTTP_TIMEOUT))
        lines = [line for line in text.splitlines() if line.partition(" ")[0].partition("{")[0] == _LAST_SYNC]
        times = [float(line.rpartition(" ")[2]) for line in lines]
        return max(times) if times and min(times) > 0 else None


def _version(program: Path) -> str:
    """As `kube-proxy v1.36.2`."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    words = done.stdout.split()
    return f"kube-proxy {words[-1]}" if done.returncode == 0 and words else program.name


class Running(AbstractContextManager["Running"]):
    """A contender at work on a node, started on entering the block and ended with it; its rules stay.

    `started` and `started_wall` are when, monotonic and in Unix seconds.
    """

    def __init__(self, contender: Contender, box: Sandbox, feed: Feed, variant: Variant) -> None:
        self.contender = contender
        command = contender.command(feed, variant)
        self._agent = AgentProcess(box, command, environment=contender.environment(box, variant), name=variant)

    def __enter__(self) -> Self:
        self.started_wall = time.time()
        self._agent.start()
        self.started = self._agent.started
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._agent.stop(scaled(_STOP_TIMEOUT))

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._agent.process is not None
        return self._agent.process.pid

    def check(self) -> None:
        """Raise AgentError if it ended."""
        if not self._agent.running():
            status = self._agent.process.returncode if self._agent.process else None
            raise AgentError(f"{self.contender.name} ended with status {status}\n{self._agent.log_tail()}")

    def log_tail(self) -> str:
        """The end of what it has written."""
        return self._agent.log_tail(5)

    def wait_ready(self, deadline: float, waiting: Callable[[], None]) -> float | None:
        """Seconds from the start until it said that it is done; None if not before the (monotonic) deadline.

        Raises AgentError if it ends. `waiting` is called in between. Asking costs the agent time: the longer it takes, the
        more rarely it is asked.
        """
        while time.monotonic() < deadline:
            self.check()
            waiting()
            with suppress(OSError, http.client.HTTPException):
                if (done := self.contender.ready_at(self._agent)) is not None:
                    return done - self.started_wall
            time.sleep(max(_LEAST_PAUSE, (time.monotonic() - self.started) * _PAUSE_SHARE))
        return None
