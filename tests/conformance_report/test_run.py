"""What is asked of ginkgo and of the cluster: the command line, names of tables, and a run that leaves no report."""

import stat
from pathlib import Path

import pytest

from hack.conformance import build, runner, selection
from hack.conformance.cluster import Subject
from hack.conformance.runner import Run, RunError


def run(tmp_path: Path) -> Run:
    """A run of the group Services in four processes."""
    return Run(
        kubeconfig=tmp_path / "kubeconfig",
        kubectl=tmp_path / "kubectl",
        usable_nodes=2,
        focus=selection.pattern(["Services"]),
        exclusions=(selection.SERIAL,),
        processes=4,
        seconds=90,
        directory=tmp_path / "artifacts",
    )


def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Have this shell script for ginkgo."""
    ginkgo = tmp_path / "programs" / "ginkgo"
    ginkgo.parent.mkdir()
    ginkgo.write_text(f"#!/bin/sh\n{script}\n")
    ginkgo.chmod(ginkgo.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(build, "tests", lambda: ginkgo.parent)


def test_ginkgo_gets_its_options_before_the_tests_program_and_that_its_own_after_it(tmp_path: Path) -> None:
    command = run(tmp_path).command(tmp_path)
    middle = command.index(str(tmp_path / "e2e.test"))
    assert command[middle + 1] == "--"
    assert {"--procs=4", "--timeout=90s", r"--skip=\[Serial\]"} <= set(command[:middle])
    # Each of ginkgo's processes has to be told: else all but the first skip tests that need two nodes.
    assert {"--num-nodes=2", f"--kubeconfig={tmp_path / 'kubeconfig'}"} <= set(command[middle:])


def test_the_report_of_failed_tests_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path, monkeypatch, "echo 'Will run 1 of 2 specs'; echo '[]' >report.json; exit 1")
    assert run(tmp_path).run() == tmp_path / "artifacts" / runner.REPORT
    assert (tmp_path / "artifacts" / "ginkgo.log").read_text() == "Will run 1 of 2 specs\n"


def test_without_a_report_ginkgo_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path, monkeypatch, "echo no such flag; exit 2")
    with pytest.raises(RunError, match=r"status 2 and left no report(?s:.*)no such flag"):
        run(tmp_path).run()


def test_the_tests_are_not_led_to_another_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "/somebody/elses")
    programs(tmp_path, monkeypatch, 'echo "[$KUBECONFIG]"; echo [] >report.json')
    run(tmp_path).run()
    assert (tmp_path / "artifacts" / "ginkgo.log").read_text() == "[]\n"


@pytest.mark.parametrize(
    ("mode", "peer", "family", "label", "title"),
    [
        ("ipvs", None, "ipv4", "ipvs", "nodeproxy, ipvs mode"),
        ("iptables", "nftables", "ipv4", "kube-proxy-nftables", "kube-proxy, nftables mode"),
        ("iptables", None, "dual", "iptables-dual", "nodeproxy, iptables mode, dual stack"),
    ],
)
def test_tables_are_told_apart(mode: str, peer: str | None, family: str, label: str, title: str) -> None:
    subject = Subject("conformance", 1, True, family, mode, peer)
    assert (subject.label, subject.title, subject.usable_nodes) == (label, title, 2)
