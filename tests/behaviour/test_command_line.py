"""Bad flags and missing tools: one clear line for each complaint, no stack trace, and never half a start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from structlog.testing import capture_logs

from nodeproxy.cli.command_line import CommandLine, Reload
from nodeproxy.configuration.agent_config import ConfigError, Mode
from tests.configuration.files import KUBEADM, write, write_text
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
        (["--while-another-runs", "pray"], "--while-another-runs"),
        (["--traffic-counters-period", "often"], "'often' is not a duration"),
        (["--iptables-sync-period", "0"], "--iptables-sync-period: 0 s is not greater than 0"),
        (["--oom-score-adj", "2000"], "--oom-score-adj: 2000 is not within -1000 and 1000"),
        (["--cleanup", "--mode", "ipvs"], "--cleanup: removes what every mode left; cannot be used together with --mode"),
        (["--cleanup", "--proxy-mode=iptables"], "--cleanup: removes what every mode left"),
        (["--config", "/nowhere"], "/nowhere: No such file or directory"),
        (["--config", "/tmp"], "/tmp: is not a file"),
        (["--write-config-to", "/nowhere/x"], "--write-config-to: /nowhere/x: No such file or directory"),
        (["--kube-api-qps", "many"], "--kube-api-qps"),
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


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_one_clear_line(unbuffered: str) -> None:
    with Path("/dev/full").open("w", encoding="ascii") as full:
        done = subprocess.run(
            [PROGRAM, "trace", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
            env={"PYTHONUNBUFFERED": unbuffered},
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "nodeproxy: the output cannot be written: No space left on device\n")


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


KUBE_PROXYS_FLAGS = (
    *(
        "--bind-address=0.0.0.0",
        "--bind-address-hard-fail",
        "--boot-id-file=/x",
        "--cleanup=false",
        "--cluster-cidr=10.0.0.0/8",
    ),
    *("--config-sync-period=15m", "--conntrack-max-per-core=1", "--conntrack-min=1", "--conntrack-tcp-be-liberal"),
    *("--conntrack-tcp-timeout-close-wait=1h", "--conntrack-tcp-timeout-established=24h", "--conntrack-udp-timeout=0s"),
    *("--conntrack-udp-timeout-stream=0s", "--detect-local-mode=NodeCIDR", "--feature-gates=A=true", "--healthz-port=10256"),
    *(
        "--healthz-bind-address=0.0.0.0:10256",
        "--hostname-override=n1",
        "--init-only=false",
        "--iptables-localhost-nodeports",
    ),
    *(
        "--iptables-masquerade-bit=14",
        "--iptables-min-sync-period=1s",
        "--iptables-sync-period=30s",
        "--ipvs-strict-arp=true",
    ),
    *("--ipvs-exclude-cidrs=10.0.0.0/8", "--ipvs-min-sync-period=1s", "--ipvs-scheduler=rr", "--ipvs-sync-period=30s"),
    *("--ipvs-tcp-timeout=0s", "--ipvs-tcpfin-timeout=0s", "--ipvs-udp-timeout=0s", "--kube-api-burst=10", "--kubeconfig="),
    *("--kube-api-content-type=application/json", "--kube-api-qps=5", "--log-flush-frequency=5s", "--logging-format=text"),
    *(
        "--log-json-info-buffer-size=0",
        "--log-json-split-stream",
        "--log-text-info-buffer-size=0",
        "--log-text-split-stream",
    ),
    *("--machine-id-file=/x", "--masquerade-all", "--master=", "--metrics-bind-address=127.0.0.1:10249", "--profiling"),
    *("--metrics-port=10249", "--nodeport-addresses=primary", "--oom-score-adj=-999", "--pod-bridge-interface=cbr0"),
    *("--pod-interface-name-prefix=veth", "--proxy-mode=iptables", "--show-hidden-metrics-for-version=", "--vmodule=a=1"),
    *("-v=2", "--config="),
)
"""All flags of kube-proxy 1.36 on Linux."""


def test_every_flag_of_kube_proxy_is_accepted_and_what_is_not_supported_is_named_once(tmp_path: Path) -> None:
    file = tmp_path / "written"
    done = run("run", *KUBE_PROXYS_FLAGS, f"--write-config-to={file}")
    assert done.returncode == 0, done.stderr
    warning, written = done.stderr.splitlines()
    for flag in ("--bind-address-hard-fail", "--feature-gates", "--kube-api-qps", "--log-json-split-stream", "--vmodule"):
        assert flag in warning
    assert "--masquerade-all" not in warning
    assert "configuration written" in written
    document = yaml.safe_load(file.read_text())
    assert document["iptables"]["masqueradeAll"] is True
    assert document["hostnameOverride"] == "n1"


def test_what_was_written_can_be_read(tmp_path: Path) -> None:
    file = tmp_path / "written"
    assert run("run", "--mode=ipvs", "--cluster_cidr=10.0.0.0/8", f"--write-config-to={file}").returncode == 0
    done = run("config", "check", str(file))
    assert done.returncode == 0
    assert {"  mode: ipvs", "  clusterCIDR: 10.0.0.0/8"} <= set(done.stdout.splitlines())
    assert "Ignored" not in done.stdout


def test_empty_flags_are_not_given(tmp_path: Path) -> None:
    empty = [f"--{name}=" for name in ("mode", "fallback", "kubeconfig", "master", "hostname-override", "iptables-variant")]
    done = run("config", "show", *empty, "--detect-local-mode", "", "--cluster-cidr", "", "--bind-address", "")
    assert done.returncode == 0, done.stderr
    assert done.stdout == run("config", "show").stdout


def test_a_configuration_file_as_kubeadm_writes_it_is_taken(tmp_path: Path) -> None:
    file = str(write_text(tmp_path, KUBEADM))
    done = run("run", "--config", file, "--hostname-override=n1", "--cluster-cidr=10.0.0.0/8", "--masquerade-all")
    warning, complaint = done.stderr.splitlines()
    assert "--cluster-cidr, --masquerade-all" in warning
    assert complaint == (
        f"nodeproxy: {file}: clientConnection.kubeconfig: /var/lib/kube-proxy/kubeconfig.conf is not a file"
    )
    shown = yaml.safe_load(run("config", "show", "--config", file, "--hostname-override=n1", "--mode=ipvs").stdout)
    assert (shown["hostnameOverride"], shown["mode"], shown["clusterCIDR"]) == ("n1", "ipvs", "10.244.0.0/16")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty; a KubeProxyConfiguration is expected"),
        ("a: [", "not YAML: line 2: did not find expected node content"),
        ("apiVersion: v1\nkind: Pod\n", "apiVersion 'v1', kind 'Pod': expected kubeproxy.config.k8s.io/v1alpha1"),
        ("#" * 10_000_000, "larger than 1 MiB; that is no KubeProxyConfiguration"),
        ("{" * 100_000, "not YAML: line 1: nested more than 100 levels deep"),
        (KUBEADM + "iptables: {syncPeriod: soon}\n", "iptables.syncPeriod: 'soon' is not a duration such as"),
        (KUBEADM.replace('mode: ""', "mode: nftables"), "mode: nftables mode is not supported; --mode iptables or"),
    ],
    ids=["empty", "not-yaml", "kind", "large", "deep", "duration", "nftables"],
)
def test_a_configuration_file_that_cannot_be_used_is_one_clear_line(tmp_path: Path, text: str, complaint: str) -> None:
    file = write_text(tmp_path, text)
    for command in (["run", "--manifests", str(tmp_path), "--config", str(file)], ["config", "show", "--config", str(file)]):
        done = run(*command)
        assert done.returncode == 1
        lines = [line for line in done.stderr.splitlines() if "clientConnection.kubeconfig" not in line]
        (line,) = lines
        assert line.startswith(f"nodeproxy: {file}: {complaint}")


def test_config_check_tells_what_is_honoured_ignored_and_wrong(tmp_path: Path) -> None:
    fields = {"mode": "ipvs", "winkernel": {"enableDSR": True}, "colour": "red", "conntrack": {"min": "few"}}
    done = run("config", "check", str(write(tmp_path, **fields)))
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "Honoured (all else has kube-proxy's defaults):",
        "  mode: ipvs",
        "Ignored:",
        "  winkernel.enableDSR: not supported in the configuration file, ignored",
        "  colour: unknown fields in the configuration file, ignored",
        "Wrong:",
        "  conntrack.min: expected a whole number, got text",
    ]
    assert done.stderr == ""


def test_a_configuration_is_read_again_with_the_same_command_line(tmp_path: Path) -> None:
    file = write(tmp_path, mode="iptables")
    line = CommandLine(file, {"node_name": "n1"}, ())
    reload = Reload(line, line.resolve().remarks)
    with capture_logs() as logs:
        assert (reload().mode, reload().node_name) == (Mode.IPTABLES, "n1")
        write(tmp_path, mode="ipvs", portRange="1-2")
        assert (reload().mode, reload().node_name) == (Mode.IPVS, "n1")
        write(tmp_path, mode="nftables")
        with pytest.raises(ConfigError, match="mode: nftables mode is not supported"):
            reload()
    assert [(entry["log_level"], entry["names"]) for entry in logs] == [("warning", "portRange")]


def test_without_a_configuration_file_no_yaml_reader_is_loaded() -> None:
    code = (
        "import sys; from nodeproxy.cli.main import main_group; from nodeproxy.configuration.resolve import resolve; "
        "resolve(); "
        "print({'yaml', 'watchfiles', 'kubernetes'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_the_agent_imports_nothing_that_is_for_people() -> None:
    """Each would cost every node megabytes, and the first sync a tenth of a second."""
    heavy = ("rich", "jinja2", "pygal", "kopf", "aiohttp", "pyroute2", "yaml")
    code = f"import sys, nodeproxy.cli.main, nodeproxy.agent.agent; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ((), "in-cluster service account: "),
        (("--kubeconfig", "/nowhere"), "kubeconfig /nowhere: No such file or directory"),
    ],
    ids=["outside of a pod", "no kubeconfig"],
)
def test_an_operator_without_credentials_ends_with_one_line(flags: tuple[str, ...], complaint: str) -> None:
    done = run("operator", "--image", "nodeproxy:dev", "--bind-address", "", *flags, path=os.environ["PATH"])
    assert done.returncode == 1
    assert done.stderr.startswith(f"nodeproxy: {complaint}"), done.stderr
    assert len(done.stderr.splitlines()) == 1
