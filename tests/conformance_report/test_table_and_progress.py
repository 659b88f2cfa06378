"""What a reader sees: the kept table, its one-line summary, and the lines of progress made of what ginkgo prints."""

from hack.conformance.results import Result, Results, State
from hack.conformance.runner import Progress
from hack.conformance.table import Setting, markdown, summary

OUTCOME = Results(
    (
        Result("Services", "should serve", State.PASSED, "", 12.4, "test/e2e/network/service.go:1"),
        Result("Services", "should a|b", State.FAILED, "expected <nil> | got x", 3, "test/e2e/network/service.go:2"),
        Result("DNS", "on GCE", State.SKIPPED, "Only for [gce]", 0, "test/e2e/network/dns.go:3"),
    ),
    ("Suite Timeout Elapsed",),
)


def test_the_table_has_numbers_failures_and_reasons() -> None:
    text = markdown(Setting("A title", {"kernel": "6.1"}), OUTCOME)
    assert text.startswith("# A title\n")
    assert "| kernel | 6.1 |" in text
    assert "| Services | 1 | 1 | 0 |" in text
    assert "| **all** | 1 | 1 | 1 |" in text
    assert "- Suite Timeout Elapsed" in text
    assert "| Services should a\\|b | test/e2e/network/service.go:2 | expected &lt;nil> \\| got x |" in text
    assert "Only for [gce]:\n\n- DNS on GCE" in text
    assert "| Services should serve | test/e2e/network/service.go:1 | 12 |" in text


def test_the_table_of_a_clean_run_has_no_failures() -> None:
    text = markdown(Setting("A title"), Results(OUTCOME.tests[:1]))
    assert "## Failed" not in text
    assert "## Trouble" not in text
    assert "## Skipped" not in text


def test_the_summary_counts_what_ran() -> None:
    assert summary(OUTCOME) == "Services 1 of 2 passed; 1 skipped"
    assert summary(Results(())) == "no test passed; 0 skipped"


def test_progress_of_tests_in_several_processes() -> None:
    progress = Progress(limit=600)
    said = [
        progress.line(line)
        for line in (
            "Will run 3 of 7000 specs",
            "------------------------------",
            "• [12.600 seconds]",
            "[sig-network] Services should work [Conformance]",
            "k8s.io/kubernetes/test/e2e/network/service.go:7",
            "  STEP: something [sig-network]",
            "S [SKIPPED] [0.012 seconds]",
            "[sig-network] DNS on GCE",
            "• [FAILED] [60.000 seconds]",
            "[sig-network] Services should fail",
        )
    ]
    heard = [text for text in said if text]
    assert heard[0] == "3 tests, at most 10 minutes"
    assert heard[1].endswith("1 of 3: passed in 13 s: Services should work [Conformance]")
    assert heard[2].endswith("2 of 3: skipped in 0 s: DNS on GCE")
    assert heard[3].endswith("3 of 3, 1 failed: FAILED in 60 s: Services should fail")
    assert len(heard) == 4


def test_progress_of_tests_in_one_process() -> None:
    progress = Progress(limit=600)
    lines = (
        "[sig-network] DNS alone [Serial]",
        "k8s.io/x.go:1",
        "  STEP: first",
        "• [2.000 seconds]",
        "[sig-network] DNS next",
    )
    said = [text for line in lines if (text := progress.line(line))]
    assert len(said) == 1
    assert said[0].endswith("passed in 2 s: DNS alone [Serial]")
