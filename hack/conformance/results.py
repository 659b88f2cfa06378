"""Owns what came of a run: ginkgo's JSON report, read into one result for each test of the chosen groups."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from hack.conformance.selection import Exclusion, group_of, reason

_LONGEST: Final = 300
_PASSED: Final = "passed"
_NOT_RUN: Final = ("skipped", "pending")


class State(StrEnum):
    """What came of a test; what is neither passed nor skipped has failed (panic, time-out, interruption)."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Result:
    """One test: its name without the group, how it ended and why, seconds, where it is in Kubernetes' sources."""

    group: str
    name: str
    state: State
    reason: str
    seconds: float
    place: str


@dataclass(frozen=True)
class Results:
    """The tests of the chosen groups, and what went wrong outside of them (in the suite's set-up, by a time-out)."""

    tests: tuple[Result, ...]
    trouble: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether a test failed, something went wrong around them, or none ran at all."""
        counts = self.counts()
        return bool(counts[State.FAILED] or self.trouble or not counts[State.PASSED])

    def counts(self, group: str | None = None) -> Counter[State]:
        """How many passed, failed, were skipped; in one group or in all."""
        return Counter(test.state for test in self.tests if group in (None, test.group))


def read(report: Path, groups: Sequence[str], exclusions: Iterable[Exclusion]) -> Results:
    """The results in ginkgo's JSON report. Raises OSError or ValueError where there is no such report."""
    exclusions = tuple(exclusions)
    tests: list[Result] = []
    trouble: list[str] = []
    for suite in json.loads(report.read_text()):
        trouble += suite.get("SpecialSuiteFailureReasons") or []
        for spec in suite.get("SpecReports") or []:
            if spec["LeafNodeType"] != "It":
                if spec["State"] not in (_PASSED, *_NOT_RUN):
                    trouble.append(f"{spec['LeafNodeType']}: {_message(spec) or spec['State']}")
                continue
            result = _result(spec, groups, exclusions)
            if result is not None:
                tests.append(result)
    order = {group: position for position, group in enumerate(groups)}
    return Results(tuple(sorted(tests, key=lambda test: (order[test.group], test.name))), tuple(trouble))


def merge(runs: Iterable[Results]) -> Results:
    """Several runs as one, such as the parallel and the serial one: what a test came to where it was not skipped."""
    found: dict[tuple[str, str], Result] = {}
    trouble: list[str] = []
    for run in runs:
        trouble += run.trouble
        for test in run.tests:
            known = found.get((test.group, test.name))
            if known is None or known.state is State.SKIPPED:
                found[test.group, test.name] = test
    return Results(tuple(found.values()), tuple(trouble))


def _result(spec: dict[str, Any], groups: Sequence[str], exclusions: tuple[Exclusion, ...]) -> Result | None:
    full = " ".join([*(spec["ContainerHierarchyTexts"] or []), spec["LeafNodeText"]])
    group = group_of(full, groups)
    if group is None:
        return None
    message = _message(spec)
    if spec["State"] == _PASSED:
        state, why = State.PASSED, ""
    elif spec["State"] in _NOT_RUN:
        state, why = State.SKIPPED, message or reason(full, exclusions) or _unexplained(spec)
    else:
        state, why = State.FAILED, message or spec["State"]
    location = spec.get("LeafNodeLocation") or {}
    return Result(
        group=group,
        name=full.removeprefix(f"[sig-network] {group} "),
        state=state,
        reason=why,
        seconds=(spec.get("RunTime") or 0) / 1e9,
        place=f"{re.sub(r'^.*?/(?=test/e2e/)', '', location.get('FileName', ''))}:{location.get('LineNumber', 0)}",
    )


def _unexplained(spec: dict[str, Any]) -> str:
    return "marked as pending" if spec["State"] == "pending" else "not reached: the run ended before, or --focus left it out"


def _message(spec: dict[str, Any]) -> str:
    """The failure's message on one line, shortened."""
    text = " ".join(str((spec.get("Failure") or {}).get("Message", "")).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
