"""What the benchmark reads from the kernel and from /proc: rules, virtual servers, CPU time of children."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hack.bench import idle, rules, virtual_servers
from hack.bench.results import Idle
from nodeproxy.kernel.ipvs import RealServer, RealServerState, VirtualServer

RULES = """*nat
:KUBE-SERVICES - [0:0]
:KUBE-SVC-A - [0:0]
-A KUBE-SERVICES -d 10.96.0.2/32 -p tcp -m comment --comment "b" -m tcp --dport 80 -j KUBE-SVC-B
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m comment --comment "a" -m tcp --dport 80 -j KUBE-SVC-A
-A KUBE-SVC-A ! -s 10.0.0.0/8 -d 10.96.0.1/32 -p tcp -m tcp --dport 80 -j KUBE-MARK-MASQ
COMMIT
"""


def test_services_are_found_in_the_order_of_the_rules() -> None:
    assert rules.in_order(RULES, ["10.96.0.1", "10.96.0.2", "10.96.0.3"]) == ["10.96.0.2", "10.96.0.1"]
    assert (rules.count(RULES).rules, rules.count(RULES).chains) == (3, 2)


def test_a_service_that_the_kernel_lacks_is_named() -> None:
    rules.check_all_there(RULES, ["10.96.0.1", "10.96.0.2"])
    with pytest.raises(rules.NotProgrammed, match=r"1 of 2 .* 10\.96\.0\.3"):
        rules.check_all_there(RULES, ["10.96.0.1", "10.96.0.3"])


def state(address: str, weight: int) -> RealServerState:
    return RealServerState(RealServer(address, 8080), weight, 3, 1, 0)


def test_virtual_servers_count_with_those_real_servers_that_serve() -> None:
    found = virtual_servers.summed_up(
        {
            VirtualServer(4, "tcp", "10.96.0.1", 80): [state("10.244.0.12", 1), state("10.244.0.11", 0)],
            VirtualServer(4, "udp", "10.96.0.2", 53): [],
            VirtualServer(6, "tcp", "fd00:10:96::1", 80): [state("fd00:10:244::1", 1)],
        }
    )
    assert (found.virtual_servers, found.real_servers) == (3, 3)
    assert found.serving == {"10.96.0.1": 1, "10.96.0.2": 0, "fd00:10:96::1": 1}
    virtual_servers.check_all_there(found, 1, ["10.96.0.1", "fd00:10:96::1"])
    with pytest.raises(rules.NotProgrammed, match=r"2 of 3 .* 10\.96\.0\.2 for one has 0 of 1"):
        virtual_servers.check_all_there(found, 1, ["10.96.0.1", "10.96.0.2", "10.96.0.3"])


BUSY = "import time\nwhile time.process_time() < 0.25: pass"
WORKS_WHEN_TOLD = f"""
import subprocess, sys, time
print("ready", flush=True)
while command := sys.stdin.readline().strip():
    if command == "rest":
        for _ in range(20):
            time.sleep(0.001)
    elif command == "wait for a child":
        subprocess.run([sys.executable, "-c", {BUSY!r}], check=True)
    elif command == "leave a child alone":
        busy = {BUSY!r} + "\\nprint(flush=True)\\ntime.sleep(60)"
        child = subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE)
        child.stdout.readline()
    elif command == "end the child":
        child.kill()
        child.wait()
    print("done", flush=True)
"""


def used_for(process: subprocess.Popen[str], command: str) -> Idle:
    """What that process and its children use to carry out a command."""
    assert process.stdin and process.stdout
    before = idle.usage(process.pid)
    process.stdin.write(f"{command}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n"
    return idle.between(before, idle.usage(process.pid))


def test_what_children_use_counts_once() -> None:
    command = [sys.executable, "-c", WORKS_WHEN_TOLD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        resting = used_for(process, "rest")
        assert resting.switches_per_second * resting.seconds >= 20
        assert resting.cpu.total < 0.2
        assert used_for(process, "wait for a child").cpu.children >= 0.24
        left = used_for(process, "leave a child alone")
        assert left.cpu.children >= 0.24
        assert left.cpu_ms_per_minute == pytest.approx(left.cpu.total * 60_000 / left.seconds)
        assert left.core_percent == pytest.approx(left.cpu.total * 100 / left.seconds)
        assert left.rss_before_kib > 0
        assert used_for(process, "end the child").cpu.children < 0.2
        assert process.stdin
        process.stdin.close()
