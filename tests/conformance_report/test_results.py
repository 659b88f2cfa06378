"""Ginkgo's JSON report, read; several runs as one; when a run counts as failed."""

import json
from pathlib import Path
from typing import Any

import pytest

from hack.conformance import results, selection
from hack.conformance.results import Result, Results, State


def spec(text: str, state: str, *, message: str = "", kind: str = "It") -> dict[str, Any]:
    """A SpecReport of ginkgo's, of which text is `[sig-network] GROUP name`."""
    return {
        "ContainerHierarchyTexts": ["[sig-network] Services"] if text.startswith("[sig-network] Services") else None,
        "LeafNodeText": text.removeprefix("[sig-network] Services "),
        "LeafNodeType": kind,
        "LeafNodeLocation": {"FileName": "k8s.io/kubernetes@v1.36.2/test/e2e/network/service.go", "LineNumber": 7},
        "State": state,
        "RunTime": 2_500_000_000,
        "Failure": {"Message": message} if message else None,
    }


def read(tmp_path: Path, *specs: dict[str, Any], reasons: list[str] | None = None) -> Results:
    """What `results.read` makes of a report of these specs."""
    path = tmp_path / "report.json"
    path.write_text(json.dumps([{"SpecialSuiteFailureReasons": reasons, "SpecReports": specs}]))
    return results.read(path, ["Services", "DNS"], selection.EXCLUSIONS)


def test_a_test_is_read_with_its_name_place_and_time(tmp_path: Path) -> None:
    (test,) = read(tmp_path, spec("[sig-network] Services should work", "passed")).tests
    assert test == Result("Services", "should work", State.PASSED, "", 2.5, "test/e2e/network/service.go:7")


@pytest.mark.parametrize("state", ["failed", "panicked", "interrupted", "aborted", "timedout"])
def test_every_other_end_is_a_failure(tmp_path: Path, state: str) -> None:
    outcome = read(tmp_path, spec("[sig-network] Services a", "passed"), spec("[sig-network] Services b", state))
    assert outcome.counts()[State.FAILED] == 1
    assert outcome.failed
    assert outcome.tests[1].reason == state


def test_messages_are_one_short_line(tmp_path: Path) -> None:
    (test,) = read(tmp_path, spec("[sig-network] Services a", "failed", message="timed\n  out " + "x" * 999)).tests
    assert test.reason.startswith("timed out xxx")
    assert len(test.reason) < 400


def test_a_skip_has_a_reason_the_tests_own_or_ours(tmp_path: Path) -> None:
    outcome = read(
        tmp_path,
        spec("[sig-network] Services a [Disruptive]", "skipped"),
        spec("[sig-network] Services b", "skipped", message="Only supported for providers [gce]"),
        spec("[sig-network] Services c", "skipped"),
        spec("[sig-network] Services d", "pending"),
    )
    ssh, provider, neither, pending = (test.reason for test in outcome.tests)
    assert "ssh" in ssh
    assert provider == "Only supported for providers [gce]"
    assert "not reached" in neither
    assert "pending" in pending


def test_other_groups_are_not_counted(tmp_path: Path) -> None:
    assert not read(tmp_path, spec("[sig-storage] Volumes work", "passed")).tests


def test_nothing_that_passed_is_a_failure(tmp_path: Path) -> None:
    assert read(tmp_path, spec("[sig-network] Services a", "skipped")).failed


def test_trouble_around_the_tests_is_a_failure(tmp_path: Path) -> None:
    passed = spec("[sig-network] Services a", "passed")
    assert not read(tmp_path, passed).failed
    before = read(tmp_path, passed, spec("", "failed", message="nodes not ready", kind="SynchronizedBeforeSuite"))
    assert before.trouble == ("SynchronizedBeforeSuite: nodes not ready",)
    assert before.failed
    assert read(tmp_path, passed, reasons=["Suite Timeout Elapsed"]).failed


def test_runs_are_merged_by_what_a_test_came_to_where_it_ran() -> None:
    def result(name: str, state: State) -> Result:
        return Result("DNS", name, state, "", 1, "")

    parallel = Results((result("a", State.PASSED), result("b", State.SKIPPED), result("c", State.SKIPPED)))
    alone = Results((result("a", State.SKIPPED), result("b", State.FAILED), result("c", State.SKIPPED)), ("late",))
    merged = results.merge([parallel, alone])
    assert [test.state for test in merged.tests] == [State.PASSED, State.FAILED, State.SKIPPED]
    assert merged.trouble == ("late",)
