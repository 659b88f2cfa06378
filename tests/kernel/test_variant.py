"""Choosing the iptables variant by what is in the kernel, against the real kernel."""

import shutil
from pathlib import Path

import pytest

from nodeproxy.kernel.errors import ToolMissing
from nodeproxy.kernel.variant import detect_variant
from nodeproxy.kernel.xtables import Variant
from nodeproxy.kernel.xtables_stamp import legacy_tables
from tests.kernel.conftest import NetworkNamespace

pytestmark = pytest.mark.kernel

BOTH = pytest.mark.parametrize(("variant", "other"), [("nft", "legacy"), ("legacy", "nft")])


def restore(netns: NetworkNamespace, variant: str, text: str, family: int = 4) -> None:
    netns.command(f"{'iptables' if family == 4 else 'ip6tables'}-{variant}-restore", "--noflush", "-w", "5", stdin=text)


def many_rules(count: int) -> str:
    return "*nat\n:KUBE-SERVICES - [0:0]\n" + "-A KUBE-SERVICES -j RETURN\n" * count + "COMMIT\n"


@BOTH
@pytest.mark.parametrize("chain", ["KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"])
@pytest.mark.parametrize("family", [4, 6])
def test_hint_chain_of_kubelet_decides_over_more_rules(
    netns: NetworkNamespace, variant: str, other: str, chain: str, family: int
) -> None:
    restore(netns, variant, f"*mangle\n:{chain} - [0:0]\nCOMMIT\n", family)
    restore(netns, other, many_rules(20))
    choice = netns.run(detect_variant)
    assert choice.variant == variant
    assert chain in choice.reason
    assert variant in choice.reason


@BOTH
def test_more_rules_decide(netns: NetworkNamespace, variant: str, other: str) -> None:
    restore(netns, variant, many_rules(20))
    restore(netns, other, many_rules(5))
    choice = netns.run(detect_variant)
    assert choice.variant == variant
    assert "20 rules" in choice.reason and "5 in" in choice.reason


def test_rules_of_others_do_not_count(netns: NetworkNamespace) -> None:
    restore(netns, "legacy", many_rules(3))
    restore(netns, "nft", "*nat\n:DOCKER - [0:0]\n" + "-A DOCKER -j RETURN\n" * 50 + "COMMIT\n")
    netns.command("nft", "-f", "-", stdin="table ip kube-proxy {\nchain KUBE-X {\n" + "accept\n" * 9 + "}\n}\n")
    assert netns.run(detect_variant).variant is Variant.LEGACY


def programs(directory: Path, variant: str, plain: str | None) -> None:
    """A PATH with the programs of one variant, and a plain iptables of another."""
    for stem in ("iptables", "ip6tables"):
        for suffix in ("-restore", "-save", ""):
            (directory / f"{stem}-{variant}{suffix}").symlink_to(shutil.which(f"{stem}-{variant}{suffix}") or "")
            if plain:
                (directory / f"{stem}{suffix}").symlink_to(shutil.which(f"{stem}-{plain}{suffix}") or "")


@pytest.mark.parametrize("plain", ["nft", "legacy"])
def test_without_rules_the_iptables_on_path_decides(
    netns: NetworkNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: str
) -> None:
    programs(tmp_path, "nft" if plain == "legacy" else "legacy", plain)
    monkeypatch.setenv("PATH", str(tmp_path))
    choice = netns.run(detect_variant)
    assert choice.variant == plain
    assert str(tmp_path / "iptables") in choice.reason
    assert netns.run(legacy_tables, 4) == ()  # looking did not create any


def test_without_plain_iptables_nft_is_the_default(
    netns: NetworkNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(tmp_path, "nft", None)
    programs(tmp_path, "legacy", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert netns.run(detect_variant).variant is Variant.NFT


@BOTH
def test_only_installed_variant_is_taken(
    netns: NetworkNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, other: str
) -> None:
    restore(netns, other, "*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n")
    programs(tmp_path, variant, None)
    monkeypatch.setenv("PATH", str(tmp_path))
    choice = netns.run(detect_variant)
    assert (choice.variant, choice.reason) == (variant, f"only the {variant} variant of iptables is installed")


def test_no_iptables_at_all(netns: NetworkNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolMissing, match="install the iptables package"):
        netns.run(detect_variant)
