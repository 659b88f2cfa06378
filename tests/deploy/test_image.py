"""The image, run by Docker with no more rights than the DaemonSet gives."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hack.kind import engine
from hack.kind.agent_image import agent_image
from nodeproxy.sandbox.pace import scaled

pytestmark = pytest.mark.kernel

DEPLOY = Path(__file__).parents[2] / "deploy"
SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec: {clusterIP: 10.96.0.5, clusterIPs: [10.96.0.5], ports: [{port: 80, protocol: TCP}], selector: {app: web}}
"""


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def image() -> str:
    if engine.answering() is None:
        pytest.skip("no Docker engine answers (`python -m hack.kind engine` starts one)")
    return agent_image()


@pytest.fixture(params=["nft", "legacy"])
def agent(image: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A container that programs a network namespace of its own."""
    (container,) = yaml.safe_load((DEPLOY / "base" / "daemonset.yaml").read_text())["spec"]["template"]["spec"]["containers"]
    security = container["securityContext"]
    manifests, lock = tmp_path / "manifests", tmp_path / "xtables.lock"
    manifests.mkdir()
    (manifests / "web.yaml").write_text(SERVICE)
    lock.touch()
    options = ["--read-only", "--security-opt", "no-new-privileges", "--network", "none"]
    assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"] and not security["privileged"]
    options += [word for name in security["capabilities"]["drop"] for word in ("--cap-drop", name)]
    options += [word for name in security["capabilities"]["add"] for word in ("--cap-add", name)]
    for source, target in (
        (manifests, "/manifests:ro"),
        (lock, "/run/xtables.lock"),
        ("/proc/sys/net", "/host/proc/sys/net"),
    ):
        options += ["--volume", f"{source}:{target}"]
    (root,) = (one["value"] for one in container["env"] if one["name"] == "NODEPROXY_PROC_SYS")
    command = ["run", "--manifests", "/manifests", "--hostname-override", "n1", "--cluster-cidr", "10.244.0.0/16"]
    command += ["--iptables-variant", request.param, "--conntrack-tcp-timeout-close-wait", "41m", "--oom-score-adj", "0"]
    name = docker("run", "--detach", *options, "--env", f"NODEPROXY_PROC_SYS={root}", image, *command).strip()
    try:
        yield name
    finally:
        docker("rm", "--force", name)


def state(container: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(docker("inspect", container))[0]["State"]
    return found


def log(container: str) -> str:
    done = subprocess.run(["docker", "logs", container], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def test_it_works_with_two_capabilities_and_nothing_to_write_to(agent: str) -> None:
    deadline = time.monotonic() + scaled(20)
    while "first sync done" not in log(agent):
        assert time.monotonic() < deadline and state(agent)["Running"], log(agent)
        time.sleep(0.2)
    status = dict(
        line.split(":\t") for line in Path(f"/proc/{state(agent)['Pid']}/status").read_text().splitlines() if ":\t" in line
    )
    assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd")} == {1 << 12 | 1 << 13}  # NET_ADMIN, NET_RAW
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")

    said = log(agent)
    assert "[warning" not in said and "[error" not in said, said
    assert "BPF" not in said, said  # that matches are there is not a matter of privileges, but of a seccomp profile
    rules = docker("exec", agent, "iptables-nft-save") + docker("exec", agent, "iptables-legacy-save")
    assert "-d 10.96.0.5/32" in rules
    for name, value in (("nf_conntrack_tcp_timeout_close_wait", "2460"), ("nf_conntrack_acct", "1")):
        read = f"print(open('/host/proc/sys/net/netfilter/{name}').read().strip())"
        deadline = time.monotonic() + scaled(15)
        while docker("exec", agent, "python3", "-c", read).strip() != value:
            assert time.monotonic() < deadline, f"{name} is not {value}\n{log(agent)}"
            time.sleep(0.5)


def test_it_is_small_and_tells_what_it_is(image: str) -> None:
    found = json.loads(docker("image", "inspect", image))[0]
    assert found["Size"] < 120e6
    labels = found["Config"]["Labels"]
    assert labels["org.opencontainers.image.title"] == "nodeproxy"
    assert {
        f"org.opencontainers.image.{name}" for name in ("version", "revision", "licenses", "description")
    } <= labels.keys()


def test_there_is_no_shell_in_it(image: str) -> None:
    name = docker("create", image).strip()
    try:
        export = subprocess.Popen(["docker", "export", name], stdout=subprocess.PIPE)
        files = set(
            subprocess.run(["tar", "t"], stdin=export.stdout, capture_output=True, text=True, check=True).stdout.split()
        )
        assert export.wait() == 0
    finally:
        docker("rm", name)
    assert {"usr/bin/nodeproxy", "usr/sbin/iptables-nft-restore", "usr/sbin/ip6tables-legacy-restore"} <= files
    assert not {f"usr/bin/{shell}" for shell in ("sh", "bash", "dash", "apt", "dpkg", "pip")} & files
    assert "var/lib/dpkg/status.d/libc6" in files
    compiled = {file for file in files if file.endswith(".pyc")}
    sources = {file for file in files if file.endswith(".py")}
    assert len(compiled) >= len(sources) > 500
