"""Owns running e2e.test with ginkgo in several processes, a line for each test that ends, and the time that it may take."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

from hack.conformance import build
from hack.conformance.selection import Exclusion
from hack.controlplane.build import say

REPORT: Final = "report.json"
_ENDED: Final = re.compile(r"^(?P<mark>[•S])(?: \[(?P<state>[A-Z ]+)\])? \[(?P<seconds>[\d.]+) seconds\]$")
_WILL_RUN: Final = re.compile(r"^Will run (\d+) of \d+ specs$")
_NAME: Final = "[sig-network] "
_DECORATION: Final = re.compile(r"^\[sig-network\] | \[It\]| \[sig-network[^][]*\]$")
_GRACE: Final = 120.0


class RunError(Exception):
    """The tests could not be run; the message says what to do."""


@dataclass(frozen=True)
class Run:
    """One call of ginkgo: the tests whose name `focus` finds and no exclusion does, in so many processes."""

    kubeconfig: Path
    kubectl: Path
    usable_nodes: int
    focus: str
    exclusions: tuple[Exclusion, ...]
    processes: int
    seconds: float
    directory: Path

    def command(self, programs: Path) -> list[str]:
        """Of ginkgo; `programs` is the directory of ginkgo and e2e.test."""
        skips = [f"--skip={each.pattern}" for each in self.exclusions]
        return [
            *(str(programs / "ginkgo"), "run", "-v", "--no-color", f"--procs={self.processes}"),
            *(f"--timeout={self.seconds:.0f}s", "--grace-period=60s", f"--focus={self.focus}", *skips),
            *(f"--json-report={REPORT}", "--junit-report=junit.xml", f"--output-dir={self.directory}"),
            *(str(programs / "e2e.test"), "--", f"--kubeconfig={self.kubeconfig}", f"--kubectl-path={self.kubectl}"),
            # The number of nodes too: only the first process of ginkgo's would find it out, and tests elsewhere be skipped.
            *("--provider=skeleton", "--node-os-distro=debian", f"--num-nodes={self.usable_nodes}"),
        ]

    def run(self) -> Path:
        """Run the tests, whatever comes of them, and return the report. Raises RunError where there is none."""
        programs = build.tests()
        self.directory.mkdir(parents=True, exist_ok=True)
        report, log = self.directory / REPORT, self.directory / "ginkgo.log"
        report.unlink(missing_ok=True)
        # Tests call kubectl by its path; the rest of the environment must not lead them to another cluster.
        env = {name: value for name, value in os.environ.items() if name != "KUBECONFIG"}
        command = self.command(programs)
        process = subprocess.Popen(
            command,
            env=env,
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        try:
            with log.open("w") as file:
                progress = Progress(limit=self.seconds)
                for line in _lines(process.stdout, file):
                    if text := progress.line(line):
                        say(text)
            process.wait(_GRACE)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(_GRACE)
        if not report.exists():
            last = "\n".join(log.read_text().splitlines()[-30:])
            raise RunError(f"ginkgo ended with status {process.returncode} and left no report (all of it: {log}):\n{last}")
        return report


@dataclass
class Progress:
    """Reads what ginkgo prints (-v), and makes a line of each test that ended."""

    limit: float
    total: int = 0
    done: int = 0
    failed: int = 0
    _ended: str | None = None
    _seconds: str = ""
    _latest: str = ""
    _begin: float = field(default_factory=time.monotonic)

    def line(self, line: str) -> str | None:
        """The line of progress, if one is due after this line of ginkgo's."""
        if match := _WILL_RUN.match(line):
            self.total = int(match[1])
            return f"{self.total} tests, at most {self.limit / 60:.0f} minutes"
        if match := _ENDED.match(line):
            self._ended = match["state"] or "passed"
            self._seconds = match["seconds"]
            # In one process the name came before, with what the test printed; in several it comes after.
            return self._tell(self._latest) if self._latest else None
        if line.startswith(_NAME):
            if self._ended is not None:
                return self._tell(line)
            self._latest = line
        return None

    def _tell(self, name: str) -> str:
        state, self._ended, self._latest = (self._ended or "").lower(), None, ""
        self.done += 1
        self.failed += state not in ("passed", "skipped")
        shown = state if state in ("passed", "skipped") else state.upper()
        failures = f", {self.failed} failed" if self.failed else ""
        took = time.monotonic() - self._begin
        return (
            f"{took:5.0f} s: {self.done} of {self.total}{failures}: {shown} in {float(self._seconds):.0f} s: "
            f"{_DECORATION.sub('', name)}"
        )


def _lines(stream: IO[str], copy: IO[str]) -> Iterator[str]:
    for line in stream:
        copy.write(line)
        copy.flush()
        yield line.rstrip("\n")
