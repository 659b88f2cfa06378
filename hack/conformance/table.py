"""Owns the kept table of a run: what was run on what, numbers by group, failures and skips with their reasons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby

from hack.conformance.results import Result, Results, State


@dataclass(frozen=True)
class Setting:
    """What was run where: the title, and facts (versions, date, command) in the order in which they are told."""

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)


def markdown(setting: Setting, results: Results) -> str:
    """The whole table, as Markdown."""
    groups = list(dict.fromkeys(test.group for test in results.tests))
    blocks = [
        f"# {setting.title}",
        "Kubernetes' own end-to-end tests, run by `make conformance` and written by it. What they are: see README.md here.",
        _table(("fact", "value"), setting.facts.items()),
        "## Numbers",
        _table(
            ("`[sig-network]`", "passed", "failed", "skipped"),
            [*(_numbers(results, group, group) for group in groups), _numbers(results, None, "**all**")],
        ),
    ]
    if results.trouble:
        blocks += ["## Trouble around the tests", "\n".join(f"- {each}" for each in results.trouble)]
    failed = [test for test in results.tests if test.state is State.FAILED]
    if failed:
        blocks += [
            "## Failed",
            _table(("test", "where", "why"), ((_full(test), test.place, test.reason) for test in failed)),
        ]
    skipped = sorted((test for test in results.tests if test.state is State.SKIPPED), key=lambda test: test.reason)
    if skipped:
        blocks.append("## Skipped, by reason")
        for reason, tests in groupby(skipped, key=lambda test: test.reason):
            blocks.append(f"{_cell(reason)}:\n\n" + "\n".join(f"- {_full(test)}" for test in tests))
    passed = [test for test in results.tests if test.state is State.PASSED]
    if passed:
        rows = ((_full(test), test.place, f"{test.seconds:.0f}") for test in passed)
        blocks += ["## Passed", _table(("test", "where", "seconds"), rows)]
    return "\n\n".join(blocks) + "\n"


def summary(results: Results) -> str:
    """One line: how many passed, failed, were skipped, by group."""
    groups = list(dict.fromkeys(test.group for test in results.tests))
    parts = []
    for group in groups:
        counts = results.counts(group)
        run = counts[State.PASSED] + counts[State.FAILED]
        if run:
            parts.append(f"{group} {counts[State.PASSED]} of {run}")
    skipped = results.counts()[State.SKIPPED]
    return f"{', '.join(parts) or 'no test'} passed; {skipped} skipped"


def _numbers(results: Results, group: str | None, title: str) -> tuple[str, ...]:
    counts = results.counts(group)
    return (title, *(str(counts[state]) for state in (State.PASSED, State.FAILED, State.SKIPPED)))


def _full(test: Result) -> str:
    return f"{test.group} {test.name}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text that Markdown does not take for a table's border or for HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;")
