"""A real VM: its kernel has IPVS, commands run there as they would here, and it is gone afterwards."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hack.vm import choice
from hack.vm.places import REPOSITORY, states

pytestmark = [pytest.mark.vm, pytest.mark.kernel, pytest.mark.slow, pytest.mark.timeout(1800)]

SCRIPT = """
set -e
uname -r; pwd
head -1 /proc/net/ip_vs
grep -c ip_vs_rr /proc/modules
python -c 'import nodeproxy.kernel.ipvs'
ip netns add inside
for variant in legacy nft; do ip netns exec inside iptables-$variant -t nat -A POSTROUTING -j MASQUERADE; done
ip netns exec inside ipset create some hash:ip,port
ip link add kube-ipvs0 type dummy
sysctl -q -w net.ipv4.vs.conntrack=1
echo written >/tmp/file
echo said >&2
exit 42
"""


def vm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hack.vm", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "HACK_VM": "vm"},
        capture_output=True,
        text=True,
        check=False,
    )


def leftovers() -> list[str]:
    """State of VMs whose `run` is over."""
    folders = states().glob("run-*")
    return [folder.name for folder in folders if not Path("/proc", folder.name.removeprefix("run-")).exists()]


def test_a_command_runs_on_a_kernel_with_ipvs() -> None:
    done = vm("run", "--fresh", "--", "sh", "-c", SCRIPT)
    lines = done.stdout.splitlines()
    assert done.returncode == 42, done.stdout + done.stderr
    assert lines[0] != os.uname().release
    assert lines[1] == str(REPOSITORY)
    assert lines[2].startswith("IP Virtual Server version")
    assert "said" in done.stderr.splitlines()
    assert not Path("/tmp/file").exists()
    assert leftovers() == []


def test_the_kernel_takes_faults_for_what_they_are_and_leaves_registers_alone() -> None:
    """User Mode Linux is changed in this for speed; and it tells the time without a system call."""
    if choice.kinds()[0] != "uml":
        pytest.skip(f"about User Mode Linux, and {choice.kinds()[0]} is what this machine takes")
    script = "gcc -O1 -pthread -o /tmp/memory tests/vm/memory.c && /tmp/memory"
    done = vm("run", "--fresh", "--", "sh", "-c", script)
    assert done.stdout == "all is well\n", done.stdout + done.stderr


def test_a_vm_that_dies_is_reported_at_once() -> None:
    begin = time.monotonic()
    done = vm("run", "--fresh", "--", "sh", "-c", "echo o >/proc/sysrq-trigger || poweroff -f; exec sleep 600")
    assert done.returncode == 125
    assert "the VM died while the command ran" in done.stderr
    assert time.monotonic() - begin < 300
    assert leftovers() == []


def test_nothing_is_left_of_a_run_that_is_killed() -> None:
    command = [sys.executable, "-m", "hack.vm", "run", "--fresh", "--", "sh", "-c", "echo ready; exec sleep 600"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env={**os.environ, "HACK_VM": "vm"}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
        process.kill()
        process.wait()
    state = states() / f"run-{process.pid}"
    until = time.monotonic() + 10
    while time.monotonic() < until and processes_of(state):
        time.sleep(0.05)
    assert processes_of(state) == []
    assert vm("run", "--fresh", "--", "true").returncode == 0
    assert leftovers() == []


def processes_of(state: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(state).encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            pass
    return found
