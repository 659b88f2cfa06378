"""What `compare` says of a mode that does as it should, and of one whose rules somebody has broken, on a real kernel."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from states import every_sort, snapshot

from nodeproxy.compare.comparison import Options, compare
from nodeproxy.compare.node import ThrowAwayNode
from nodeproxy.compare.one_mode import ModeRun, Work, run_mode
from nodeproxy.compare.probing import Progress
from nodeproxy.compare.results import Comparison, Difference, FrontendResult
from nodeproxy.configuration.agent_config import Mode
from nodeproxy.kernel.ipset import IPSets
from nodeproxy.kernel.ipvs import IPVS, EditRealServer
from nodeproxy.sandbox.agent import AgentProcess, Variant
from nodeproxy.snapshot.model import Snapshot
from tests.ways import IPVS_NFT, LEGACY, NFT, Way, ipvs

pytestmark = pytest.mark.kernel

Break = Callable[[ThrowAwayNode], None]


def compared(
    directory: Path, *ways: Way, broken: tuple[str, Break] | None = None, changes: int = 0, only: str | None = None
) -> Comparison:
    """Compare in this process, all of `every_sort` or only one Service of it.

    `broken`: a mode, and what happens to its kernel once all is programmed and the agent is gone.
    """
    objects = [one for one in every_sort() if one["kind"] == "Node" or only in (None, one["metadata"]["name"])]

    def run_one(work: Work, taken: Snapshot, progress: Progress) -> ModeRun:
        def tamper(node: ThrowAwayNode, agent: AgentProcess) -> None:
            if broken is not None and work.mode == broken[0]:
                agent.stop()  # it would put back what is broken
                broken[1](node)

        return run_mode(taken, work, progress, tamper)

    modes = list(dict.fromkeys(Mode(way.mode) for way in ways))
    variants = list(dict.fromkeys(way.variant for way in ways))
    options = Options(modes=modes, variants=variants, changes=changes, connects=changes * 10)
    return compare(snapshot(objects, directory), options, lambda *_: None, run_one)


def disagreements_at(comparison: Comparison, service: str) -> list[Difference]:
    return [one for one in comparison.disagreements if one.service_port.startswith(f"shop/{service}:")]


def frontends(comparison: Comparison, service: str) -> list[FrontendResult]:
    (mode,) = comparison.modes
    return [one for one in mode.frontends if one.service_port.startswith(f"shop/{service}:")]


def outcomes(frontend: FrontendResult) -> dict[str, str]:
    return {str(probe.sender.kind): probe.expected.outcome for probe in frontend.probes}


@pytest.mark.parametrize("way", [LEGACY, NFT, ipvs(IPVS_NFT)], ids=str)
def test_a_mode_that_does_as_it_should(way: Way, tmp_path: Path) -> None:
    comparison = compared(tmp_path, way, changes=5)
    (mode,) = comparison.modes
    assert mode.error is None
    assert not comparison.disagreements, "\n".join(map(str, comparison.disagreements))
    assert not comparison.failed
    assert comparison.scope.complete
    by_design = {one.reason.partition(",")[0].partition(":")[0] for one in comparison.by_design}
    assert by_design == (
        set()
        if way.mode == "iptables"
        else {"IPVS mode serves no node ports on loopback", "IPVS mode has service addresses on the node"}
    )

    (web,) = [one for one in frontends(comparison, "web") if one.kind == "cluster IP"]
    assert web.balance is not None
    assert web.balance.even
    assert set(web.balance.counts) == {"10.1.0.1:8080", "10.1.0.2:8080", "10.2.0.1:8080", "10.2.0.2:8080"}
    assert web.balance.exact == (way.mode == "ipvs")
    assert outcomes(web) == dict.fromkeys(("pod", "node", "outside", "endpoint"), "forward")
    (hairpin,) = [probe for probe in web.probes if probe.sender.kind == "endpoint"]
    assert hairpin.expected.hairpins == ("10.1.0.1:8080",)

    (shielded,) = [one for one in frontends(comparison, "shielded") if one.kind == "load balancer IP"]
    assert outcomes(shielded) == {
        "pod": "drop",
        "node": "drop",
        "outside": "drop",
        "endpoint": "drop",
        "allowed source": "forward",
    }
    (sticky,) = frontends(comparison, "sticky")
    assert sticky.affinity is not None
    assert (sticky.affinity.kept, sticky.affinity.clients, sticky.affinity.spread) == (32, 32, True)
    assert {outcome for one in frontends(comparison, "nobody") for outcome in outcomes(one).values()} == {"reject"}
    (far,) = [one for one in frontends(comparison, "far") if one.kind == "load balancer IP"]
    assert outcomes(far) == {"pod": "forward", "node": "forward", "outside": "drop"}

    figures = mode.figures
    assert figures.first_sync and figures.cpu_own and figures.rss and figures.change
    assert figures.change.count == 5
    assert [one.position for one in figures.connects] == ["first", "last", "random"]
    counts = {one.what: one.number for one in figures.counts}
    assert counts["rules"] > 0
    assert ("virtual servers" in counts) == (way.mode == "ipvs")


def nat_rules(node: ThrowAwayNode, variant: Variant) -> list[str]:
    return node.box.node.command([f"iptables-{variant}-save", "-t", "nat"]).stdout.splitlines()


def delete_rules(node: ThrowAwayNode, variant: Variant, pattern: str) -> None:
    rules = [line for line in nat_rules(node, variant) if re.search(pattern, line)]
    assert rules
    text = "\n".join(["*nat", *(f"-D{rule[2:]}" for rule in rules), "COMMIT\n"])
    node.box.node.command([f"iptables-{variant}-restore", "--noflush"], input=text)


@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_a_deleted_dnat_rule_is_named(variant: Variant, tmp_path: Path) -> None:
    def break_it(node: ThrowAwayNode) -> None:
        delete_rules(node, variant, r"^-A KUBE-SVC-.* --to-destination 10\.2\.0\.1:8080")

    comparison = compared(tmp_path, Way("iptables", variant), broken=("iptables", break_it))
    assert comparison.failed
    assert disagreements_at(comparison, "web") == list(comparison.disagreements)
    reasons = {one.reason for one in comparison.disagreements if one.frontend == "10.96.0.10:80/TCP (cluster IP)"}
    assert any("never forwarded to 10.2.0.1:8080" in reason for reason in reasons), reasons


def test_shares_that_are_not_equal_are_named(tmp_path: Path) -> None:
    def weigh(node: ThrowAwayNode) -> None:
        text = "\n".join(nat_rules(node, "nft"))
        assert "--probability 0.5" in text
        node.box.node.command(
            ["iptables-nft-restore"], input=text.replace("--probability 0.50", "--probability 0.85") + "\n"
        )

    comparison = compared(tmp_path, NFT, broken=("iptables", weigh), only="names")
    assert {one.reason.partition(":")[0] for one in disagreements_at(comparison, "names")} == {"uneven"}
    assert {one.reason.partition(":")[0] for one in comparison.disagreements} == {"uneven"}


def test_missing_masquerading_is_named(tmp_path: Path) -> None:
    comparison = compared(
        tmp_path, NFT, broken=("iptables", lambda node: delete_rules(node, "nft", "^-A KUBE-POSTROUTING .*-j MASQUERADE"))
    )
    assert comparison.failed
    found = [one for one in disagreements_at(comparison, "web") if one.sender.startswith("outside")]
    assert found
    assert all("should be masqueraded, but its own source" in one.reason for one in found)
    assert not any(one.sender.startswith("pod") for one in disagreements_at(comparison, "names"))


def test_a_missing_reject_rule_is_named(tmp_path: Path) -> None:
    def flush(node: ThrowAwayNode) -> None:
        node.box.node.command(["iptables-nft", "-F", "KUBE-SERVICES"])  # of table filter

    comparison = compared(tmp_path, NFT, broken=("iptables", flush))
    reasons = {one.reason for one in disagreements_at(comparison, "nobody")}
    assert reasons == {"should be rejected (no usable endpoint), but was left alone (no rule matched)"}
    assert not disagreements_at(comparison, "web")


@pytest.mark.parametrize("way", [ipvs(IPVS_NFT)], ids=str)
def test_a_real_server_of_weight_0_is_named(way: Way, tmp_path: Path) -> None:
    def quieten() -> None:
        with IPVS() as kernel:
            server = next(one for one in kernel.virtual_servers() if (one.address, one.port) == ("10.96.0.10", 80))
            real = next(one for one in kernel.real_servers(server) if one.server.address == "10.2.0.1")
            assert not kernel.change([EditRealServer(server, real.server, 0)])

    comparison = compared(tmp_path, way, broken=("ipvs", lambda node: node.box.node.run(quieten)), only="web")
    assert comparison.failed
    found = disagreements_at(comparison, "web")
    assert found == list(comparison.disagreements)
    assert {one.frontend for one in found} == {"10.96.0.10:80/TCP (cluster IP)"}
    assert any("never forwarded to 10.2.0.1:8080" in one.reason for one in found)
    assert any("the scheduler takes endpoints in turn, but" in one.reason for one in found)


@pytest.mark.parametrize("way", [ipvs(IPVS_NFT)], ids=str)
def test_a_lost_set_entry_is_named(way: Way, tmp_path: Path) -> None:
    def lose() -> None:
        assert not list(IPSets().remove("KUBE-LOAD-BALANCER-SOURCE", ["1.2.3.4,tcp:443,203.0.113.0/24"]))

    comparison = compared(tmp_path, way, broken=("ipvs", lambda node: node.box.node.run(lose)), only="shielded")
    assert comparison.failed
    (found,) = comparison.disagreements
    assert found.service_port == "shop/shielded:main"
    assert found.sender.startswith("allowed source 203.0.113.")
    assert found.reason == "should be forwarded, but was dropped"


@pytest.mark.parametrize("ways", [ipvs((NFT, IPVS_NFT))], ids=["both modes"])
def test_the_other_mode_is_told_beside_a_disagreement(ways: tuple[Way, Way], tmp_path: Path) -> None:
    def break_it(node: ThrowAwayNode) -> None:
        delete_rules(node, "nft", r"^-A KUBE-SVC-.* --to-destination 10\.2\.0\.6:5353")

    comparison = compared(tmp_path, *ways, broken=("iptables", break_it), only="names")
    assert {one.mode for one in comparison.disagreements} == {"iptables (nft)"}
    told = [one.other_modes["ipvs (nft)"] for one in disagreements_at(comparison, "names")]
    assert told
    assert all(text.startswith("as expected: ") for text in told)


def test_a_mode_that_cannot_be_run_is_said(tmp_path: Path) -> None:
    def stop(_: ThrowAwayNode) -> None:
        raise OSError("the machine is gone")

    comparison = compared(tmp_path, NFT, broken=("iptables", stop))
    assert comparison.failed
    assert comparison.modes[0].error == "first sync: the machine is gone"
