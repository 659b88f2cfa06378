"""Bad flags and missing tools: one clear line for each complaint, no stack trace, and never half a start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.ways import lacks_ipvs

PROGRAM = str(Path(sys.executable).with_name("nodeproxy"))


def run(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path} if path else None
    return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, timeout=30, env=environment, check=False)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--mode", "nftables"], "--mode"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--cluster-cidr", "10.0.0.0/40"], "--cluster-cidr: '10.0.0.0/40' is not a CIDR"),
        (["--cluster-cidr", "10.0.0.0/8,10.1.0.0/16"], "--cluster-cidr: at most one CIDR for each IP family"),
        (["--nodeport-addresses", "primary,10.0.0.0/8"], "--nodeport-addresses: 'primary' cannot be combined"),
        (["--nodeport-addresses", "192.168.0.2"], "--nodeport-addresses: '192.168.0.2' is not a CIDR: has no prefix length"),
        (["--healthz-bind-address", "localhost"], "--healthz-bind-address: 'localhost' is not an address and port"),
        (["--iptables-min-sync-period", "fast"], "'fast' is not a duration"),
        (["--iptables-min-sync-period=-1s"], "is not a duration"),
        (["--masquerade-all=maybe"], "--masquerade-all"),
        (["--iptables-masquerade-bit", "32"], "--iptables-masquerade-bit: 32 is not within 0-31"),
        (["--detect-local-mode", "BridgeInterface"], "--pod-bridge-interface: needed with"),
        (["--hostname-override", "a node"], "--hostname-override: 'a node' cannot be the name of a Node"),
        (["--mode", "ipvs", "--ipvs-exclude-cidrs", "10.0.0.1"], "--ipvs-exclude-cidrs: '10.0.0.1' is not a CIDR"),
        (["--ipvs-scheduler", "best"], "--ipvs-scheduler"),
        (["--ipvs-udp-timeout", "10ms"], "--ipvs-udp-timeout: 0.01 s is less than a second"),
        (["--fallback", "none"], "--fallback"),
        (["--kubeconfig", "/nowhere"], "--kubeconfig: /nowhere is not a file"),
        (["--manifests", "/nowhere"], "--manifests: /nowhere is not a directory"),
        (["--master", "10.0.0.1:6443"], "--master: '10.0.0.1:6443' is not a URL"),
        (["--manifests", "/tmp", "--master", "http://x"], "--manifests: cannot be used together"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags_are_named(flags: list[str], complaint: str) -> None:
    done = run("run", *flags)
    assert done.returncode != 0
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_every_complaint_is_told_at_once() -> None:
    done = run("run", "--cluster-cidr", "x", "--kubeconfig", "/nowhere", "--iptables-masquerade-bit", "99")
    assert [line.split(":")[1].strip() for line in done.stderr.splitlines()] == [
        "--kubeconfig",
        "--cluster-cidr",
        "--iptables-masquerade-bit",
    ]


def test_without_iptables_the_missing_tool_is_named(tmp_path: Path) -> None:
    done = run("run", "--manifests", str(tmp_path), path=str(tmp_path))
    assert done.returncode == 1
    assert "iptables" in done.stderr
    assert "install" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not lacks_ipvs(), reason="this kernel has IPVS")
def test_ipvs_mode_says_what_is_missing_and_what_to_do(tmp_path: Path) -> None:
    done = run("run", "--mode", "ipvs", "--manifests", str(tmp_path))
    assert done.returncode == 1
    (complaint,) = [line for line in done.stderr.splitlines() if line.startswith("nodeproxy: ")]
    for words in ("no IPVS (module ip_vs)", "modprobe", "--mode iptables", "--fallback iptables"):
        assert words in complaint
    assert "Traceback" not in done.stderr


def test_a_kubeconfig_without_context_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config"
    file.write_text("apiVersion: v1\nkind: Config\nclusters: []\n")
    done = run("run", "--kubeconfig", str(file))
    assert done.returncode == 1
    assert str(file) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "flags", [["-v=4"], ["--v=4"], ["-v", "4"], ["--proxy-mode", "iptables"], ["--masquerade-all"]], ids=" ".join
)
def test_flags_are_written_as_for_kube_proxy(flags: list[str]) -> None:
    done = run("run", *flags, "--manifests", "/nowhere")
    assert done.stderr == "nodeproxy: --manifests: /nowhere is not a directory\n"
