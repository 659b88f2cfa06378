"""The node sandbox itself: its paths, its servers, what its probes tell apart, and that it leaves nothing behind.

Rules are written by hand here; no agent takes part.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeproxy.sandbox import sctp
from nodeproxy.sandbox.client import (
    Answered,
    Dropped,
    NoListener,
    Probe,
    Rejected,
    Unreachable,
    Verdict,
    probe,
    probe_many,
)
from nodeproxy.sandbox.namespace import NETNS_DIR, PREFIX, Namespace, NamespaceError, cleanup_stale
from nodeproxy.sandbox.sockets import host_port
from nodeproxy.sandbox.topology import BRIDGE, NODE_LINK, Sandbox

pytestmark = pytest.mark.kernel

NODE = {4: "192.168.0.2", 6: "2001:db8::1"}
POD = {4: "10.0.0.2", 6: "fd00:10::2"}
LOCAL = {4: "10.180.0.1", 6: "fd00:10:180::1"}
REMOTE = {4: "10.180.1.1", 6: "fd00:10:181::1"}
CLIENT = {4: "203.0.113.2", 6: "2600:5200::1"}
SERVICE = {4: "172.30.0.41", 6: "fd00:172:30::41"}
PROTOCOLS = ["TCP", "UDP", "SCTP"]
VARIANTS = ["legacy", "nft"]


@contextlib.contextmanager
def small(**options: bool) -> Iterator[Sandbox]:
    """A node, two pods, a client, and servers for each protocol on the pod at LOCAL and at REMOTE."""
    with Sandbox(node_addresses=list(NODE.values()), **options) as box:
        box.add_pods([list(POD.values()), list(LOCAL.values())])
        box.add_client(*CLIENT.values())
        for protocol in PROTOCOLS:
            for family in (4, 6):
                box.serve(box.pods[LOCAL[4]], LOCAL[family], 8080, protocol=protocol)
                box.serve(box.outside, REMOTE[family], 8080, protocol=protocol)
        yield box


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with small() as made:
        yield made


@pytest.fixture(params=VARIANTS)
def rules(request: pytest.FixtureRequest, box: Sandbox) -> Iterator[Rules]:
    made = Rules(box.node, request.param)
    yield made
    made.flush()


class Rules:
    """iptables of one variant in a namespace, the family picked by an address."""

    def __init__(self, node: Namespace, variant: str) -> None:
        self.node = node
        self.variant = variant

    def add(self, address: str, *words: str) -> None:
        tool = "ip6tables" if ":" in address else "iptables"
        self.node.command([f"{tool}-{self.variant}", "-w", "5", *words])

    def flush(self) -> None:
        for address in (NODE[4], NODE[6]):
            for table in ("nat", "filter"):
                self.add(address, "-t", table, "-F")
        self.node.command(["conntrack", "-F"])


def senders(box: Sandbox, family: int) -> dict[str, tuple[Namespace, str]]:
    return {
        "pod": (box.pods[POD[4]], POD[family]),
        "node": (box.node, NODE[family]),
        "outside": (box.clients[CLIENT[4]], CLIENT[family]),
    }


def only(verdicts: list[Verdict]) -> Verdict:
    assert len(set(map(type, verdicts))) == 1, verdicts
    return verdicts[0]


@pytest.mark.parametrize("bridge_netfilter", [True, False])
def test_set_up_and_tear_down_are_quick(bridge_netfilter: bool) -> None:
    times = []
    for _ in range(3):
        started = time.monotonic()
        with small(bridge_netfilter=bridge_netfilter) as made:
            up = time.monotonic() - started
            assert isinstance(probe(made.pods[POD[4]], Probe(LOCAL[4], 8080)), Answered)
            begun = time.monotonic()
        times.append((up, time.monotonic() - begun))
    assert min(up for up, _ in times) < 1.0, times
    assert min(down for _, down in times) < 0.5, times


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("sender", ["pod", "node", "outside"])
def test_every_path_shows_name_and_source(box: Sandbox, sender: str, protocol: str, family: int) -> None:
    where, source = senders(box, family)[sender]
    for destination in (LOCAL[family], REMOTE[family]):
        verdict = probe(where, Probe(destination, 8080, protocol, source, source_port=23456))
        assert verdict == Answered(host_port(destination, 8080), source, 23456)


def test_every_node_address_and_loopback_can_be_a_source(box: Sandbox) -> None:
    for address in ("127.0.0.1", "::1", *NODE.values()):
        box.serve(box.node, address, 7007, name="node")
        verdict = probe(box.node, Probe(address, 7007, source=address))
        assert isinstance(verdict, Answered)
        assert (verdict.name, verdict.source) == ("node", address)


def test_borrowed_node_address(box: Sandbox) -> None:
    one = Probe(LOCAL[4], 8080, source="1.2.3.4")
    assert isinstance(probe(box.node, one), Unreachable)
    with box.node_address("1.2.3.4"):
        verdict = probe(box.node, one)
    assert isinstance(verdict, Answered)
    assert verdict.source == "1.2.3.4"
    assert isinstance(probe(box.node, one), Unreachable)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reject_drop_and_closed_port_are_told_apart(box: Sandbox, rules: Rules, protocol: str, family: int) -> None:
    service = SERVICE[family]
    low = protocol.lower()
    for chain in ("OUTPUT", "FORWARD"):
        rules.add(service, "-A", chain, "-d", service, "-p", low, "--dport", "80", "-j", "REJECT")
        rules.add(service, "-A", chain, "-d", service, "-p", low, "--dport", "81", "-j", "DROP")
    for where, source in senders(box, family).values():
        rejected = [Probe(service, 80, protocol, source)] * 6
        dropped = [Probe(service, 81, protocol, source)] * 6
        assert only(probe_many(where, rejected)) == Rejected()
        assert only(probe_many(where, dropped)) == Dropped()
        closed = probe(where, Probe(LOCAL[family], 9999, protocol, source))
        # A closed UDP port answers with the same ICMP error as REJECT, by RFC 1122.
        assert closed == (Rejected() if protocol == "UDP" else NoListener())


def test_reset_by_a_rule_is_not_a_rejection(box: Sandbox, rules: Rules) -> None:
    reset = ["-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset"]
    rules.add(SERVICE[4], "-A", "FORWARD", "-d", SERVICE[4], *reset)
    assert probe(box.pods[POD[4]], Probe(SERVICE[4], 80)) == NoListener()


def test_other_icmp_errors_are_not_rejections(box: Sandbox, rules: Rules) -> None:
    rules.add(SERVICE[4], "-A", "FORWARD", "-d", SERVICE[4], "-j", "REJECT", "--reject-with", "icmp-host-unreachable")
    assert probe(box.pods[POD[4]], Probe(SERVICE[4], 80)) == Unreachable("ICMP type 3 code 1")


@pytest.mark.parametrize("family", [4, 6])
def test_no_icmp_rate_limit_hides_a_reject(box: Sandbox, rules: Rules, family: int) -> None:
    service = SERVICE[family]
    for chain in ("OUTPUT", "FORWARD"):
        rules.add(service, "-A", chain, "-d", service, "-j", "REJECT")
    for where, source in senders(box, family).values():
        verdicts = probe_many(where, [Probe(service, 80, "TCP", source)] * 600)
        assert verdicts.count(Rejected()) == 600


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_translated_and_masqueraded(box: Sandbox, rules: Rules, protocol: str, family: int) -> None:
    service, low = SERVICE[family], protocol.lower()
    for port, endpoint in ((80, LOCAL[family]), (81, REMOTE[family])):
        match = ["-d", service, "-p", low, "--dport", str(port)]
        for chain in ("PREROUTING", "OUTPUT"):
            to = host_port(endpoint, 8080)
            rules.add(service, "-t", "nat", "-A", chain, *match, "-j", "DNAT", "--to-destination", to)
    links = {80: BRIDGE[family == 6], 81: NODE_LINK[family == 6]}
    for masquerade in (False, True):
        if masquerade:
            rules.add(service, "-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE")
            rules.node.command(["conntrack", "-F"])
        for where, source in senders(box, family).values():
            for port, endpoint in ((80, LOCAL[family]), (81, REMOTE[family])):
                verdict = probe(where, Probe(service, port, protocol, source))
                assert isinstance(verdict, Answered), (source, port, verdict)
                assert verdict.name == host_port(endpoint, 8080)
                assert verdict.source == (links[port] if masquerade else source)


@pytest.mark.parametrize("bridge_netfilter", [True, False])
@pytest.mark.parametrize("family", [4, 6])
def test_hairpin(bridge_netfilter: bool, family: int) -> None:
    with small(bridge_netfilter=bridge_netfilter) as made:
        rules = Rules(made.node, "nft")
        service, pod = SERVICE[family], LOCAL[family]
        to = ["-j", "DNAT", "--to-destination", host_port(pod, 8080)]
        rules.add(service, "-t", "nat", "-A", "PREROUTING", "-d", service, "-p", "tcp", "--dport", "80", *to)
        one = Probe(service, 80, source=pod)
        assert probe(made.pods[pod], one) == Dropped()
        rules.add(service, "-t", "nat", "-A", "POSTROUTING", "-s", pod, "-d", pod, "-j", "MASQUERADE")
        verdict = probe(made.pods[pod], one)
        assert isinstance(verdict, Answered)
        assert verdict.source == BRIDGE[family == 6]


def test_an_open_connection_outlives_its_listener(box: Sandbox) -> None:
    pod = box.pods[LOCAL[4]]
    box.serve(pod, LOCAL[4], 8081)
    with box.pods[POD[4]].run(socket.create_connection, (LOCAL[4], 8081), 2) as connection:
        first = connection.recv(100)
        assert first.startswith(f"{LOCAL[4]}:8081 {POD[4]}:".encode())
        box.servers.remove(pod, LOCAL[4], 8081)
        assert isinstance(probe(box.pods[POD[4]], Probe(LOCAL[4], 8081)), NoListener)
        connection.sendall(b"still there?\n")
        assert connection.recv(100) == first


def test_the_servers_count_their_answers(box: Sandbox) -> None:
    before = box.servers.answers[f"{LOCAL[4]}:8080"]
    probe_many(box.pods[POD[4]], [Probe(LOCAL[4], 8080)] * 250)
    assert box.servers.answers[f"{LOCAL[4]}:8080"] == before + 250


def test_a_client_may_have_an_address_that_is_also_a_destination(box: Sandbox) -> None:
    box.add_client("1.2.3.4")
    box.serve(box.outside, "1.2.3.4", 80, name="outside")
    box.serve(box.clients["1.2.3.4"], "1.2.3.4", 80, name="the client's own")
    assert isinstance(probe(box.clients["1.2.3.4"], Probe(LOCAL[4], 8080)), Answered)
    verdict = probe(box.clients[CLIENT[4]], Probe("1.2.3.4", 80))
    assert isinstance(verdict, Answered)
    assert verdict.source == CLIENT[4]


def test_remove_pod(box: Sandbox) -> None:
    pod = box.add_pod("10.0.0.77")
    box.serve(pod, "10.0.0.77", 80)
    assert isinstance(probe(box.node, Probe("10.0.0.77", 80)), Answered)
    box.servers.remove(pod, "10.0.0.77", 80)
    box.remove_pod(pod)
    assert not isinstance(probe(box.node, Probe("10.0.0.77", 80)), Answered)
    assert "10.0.0.77" not in box.pods
    assert not pod.path.exists()


def test_pods_take_nothing_of_the_machines_neighbour_limit(box: Sandbox) -> None:
    addresses = [f"10.0.9.{number}" for number in range(1, 201)]
    pod = box.add_pod(*addresses)
    assert all(isinstance(probe(pod, Probe(LOCAL[4], 8080, source=address)), Answered) for address in addresses)
    states = box.node.command(["ip", "neigh", "show", "nud", "all"]).stdout.splitlines()
    assert [line for line in states if "PERMANENT" not in line and "NOARP" not in line] == []
    assert len(states) >= 200
    box.remove_pod(pod)
    assert "10.0.9." not in box.node.command(["ip", "neigh", "show", "nud", "all"]).stdout


def test_sandboxes_in_parallel_do_not_meet() -> None:
    with small() as one, small() as other:
        other.servers.remove(other.pods[LOCAL[4]], LOCAL[4], 8080)
        assert isinstance(probe(one.pods[POD[4]], Probe(LOCAL[4], 8080)), Answered)
        assert isinstance(probe(other.pods[POD[4]], Probe(LOCAL[4], 8080)), NoListener)
        assert one.node.environment["XTABLES_LOCKFILE"] != other.node.environment["XTABLES_LOCKFILE"]
        Rules(one.node, "legacy").add(NODE[4], "-A", "FORWARD", "-j", "DROP")
        assert "-j DROP" in one.node.command(["iptables-legacy-save"]).stdout
        assert "-j DROP" not in other.node.command(["iptables-legacy-save"]).stdout


def test_the_xtables_lock_is_the_sandboxs_own(box: Sandbox) -> None:
    box.node.command(["iptables-legacy", "-w", "-L", "-n"])
    assert (box.directory / "xtables.lock").exists()


def test_a_refused_ip_line_is_named(box: Sandbox) -> None:
    with pytest.raises(NamespaceError, match="no-such-link"):
        box.node.ip(["link set no-such-link up"])


def leftovers(of: int) -> list[str]:
    """What process `of` has left: namespaces and work directories."""
    mark = f"{PREFIX}-{of}-"
    places = (NETNS_DIR, Path(tempfile.gettempdir()))
    return [path.name for place in places if place.is_dir() for path in place.iterdir() if path.name.startswith(mark)]


def test_nothing_is_left_after_an_exception() -> None:
    before = set(leftovers(os.getpid()))
    with pytest.raises(ZeroDivisionError), small() as made:
        process = made.node.spawn(["sleep", "60"])
        assert made.directory.exists()
        assert set(leftovers(os.getpid())) > before
        try:
            raise ZeroDivisionError
        finally:
            process.kill()
            process.wait()
    assert set(leftovers(os.getpid())) == before
    assert not any(made.stem in path for path in Path("/proc/self/mountinfo").read_text().split())


def alive(process: int) -> bool:
    """Whether it runs; one that ended and was not yet collected by its parent does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


PROGRAM = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in a shell's background it is ignored
from nodeproxy.sandbox.topology import Sandbox
with Sandbox() as box:
    box.add_pods([["10.0.0.2"]])
    process = box.node.spawn(["sleep", "60"])
    print(process.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_after_a_signal(number: signal.Signals) -> None:
    program = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert program.stdout is not None
    child = int(program.stdout.readline())
    assert leftovers(program.pid)
    assert program.pid not in {int(name.split("-")[1]) for name in cleanup_stale()}, "a living process is left alone"
    program.send_signal(number)
    program.wait(10)
    program.stdout.close()
    if number == signal.SIGKILL:
        stale = leftovers(program.pid)
        assert stale
        assert set(stale) <= set(cleanup_stale())
    assert leftovers(program.pid) == []
    deadline = time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(child)


def test_crc32c_of_the_known_vector() -> None:
    assert sctp.crc32c(b"123456789") == 0xE3069283


def test_sctp_packets_are_read_as_written_and_checked() -> None:
    init = sctp.parse(sctp.init(1000, 2000, 77))
    assert init == sctp.Packet(1000, 2000, 0, sctp.INIT, 77, b"")
    answer = sctp.init_ack(init, 88, b"name 1.2.3.4:5\n")
    assert sctp.parse(answer) == sctp.Packet(2000, 1000, 77, sctp.INIT_ACK, 88, b"name 1.2.3.4:5\n")
    assert len(answer) % 4 == 0
    for position in range(len(answer)):
        damaged = bytearray(answer)
        damaged[position] ^= 1
        assert sctp.parse(bytes(damaged)) is None
