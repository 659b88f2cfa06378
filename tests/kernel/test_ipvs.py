"""Virtual servers over packed netlink, against the real kernel, /proc/net/ip_vs and pyroute2's driver."""

import errno
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nodeproxy.kernel.errors import FeatureMissing, ItemRefused, PermissionMissing, RequestRefused
from nodeproxy.kernel.ipvs import (
    IPVS,
    AddRealServer,
    AddVirtualServer,
    DeleteRealServer,
    DeleteVirtualServer,
    EditRealServer,
    EditVirtualServer,
    FirewallMark,
    Flag,
    Operation,
    RealServer,
    RealServerState,
    Timeouts,
    VirtualServer,
    VirtualServerSettings,
)
from tests.kernel.conftest import NetworkNamespace
from tests.kernel.unprivileged import python_without_privilege

pytestmark = pytest.mark.kernel

RR = VirtualServerSettings()
A4 = VirtualServer(4, "tcp", "10.96.0.1", 80)
B4 = VirtualServer(4, "udp", "10.96.0.1", 53)
C4 = VirtualServer(4, "sctp", "10.96.0.2", 9999)
A6 = VirtualServer(6, "tcp", "fd00:96::1", 80)
ABSENT = VirtualServer(4, "tcp", "10.96.0.99", 80)
R1, R2 = RealServer("127.0.0.1", 8081), RealServer("127.0.0.1", 8082)
R6 = RealServer("::1", 8081)


@pytest.fixture
def ipvs(netns: NetworkNamespace) -> Iterator[IPVS]:
    """Skips where the kernel has no IPVS: the module loader and /proc are the judges, not the code under test."""
    netns.command("modprobe", "--quiet", "ip_vs", check=False)
    if netns.command("cat", "/proc/net/ip_vs", check=False) == "":
        pytest.skip("this kernel has no IPVS (no /proc/net/ip_vs after modprobe ip_vs)")
    with netns.run(IPVS) as ipvs:
        yield ipvs


def done(ipvs: IPVS, *operations: Operation) -> None:
    assert ipvs.change(operations) == {}


def errnos(ipvs: IPVS, *operations: Operation) -> list[int]:
    """0 for each operation that was carried out."""
    refused = ipvs.change(operations)
    return [refused[place].errno if place in refused else 0 for place in range(len(operations))]


def listed(netns: NetworkNamespace) -> dict[str, list[str]]:
    """Virtual servers, each with its real servers, as /proc/net/ip_vs has them: words, addresses in hexadecimal. Without
    the persistence time, which is in ticks of the kernel; the IPv6 prefix length has its bytes in wrong order."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in netns.command("cat", "/proc/net/ip_vs").splitlines()[3:]:
        words = line.split()
        if words[0] == "->":
            current.append(" ".join(words[1:4]))
        else:
            current = found.setdefault(" ".join(word for at, word in enumerate(words) if words[at - 1] != "persistent"), [])
    return found


def test_kernel_without_ipvs_is_told(netns: NetworkNamespace) -> None:
    with netns.run(IPVS) as ipvs:
        try:
            ipvs.require()
        except FeatureMissing as error:
            assert "module ip_vs" in str(error)
            assert netns.command("cat", "/proc/net/ip_vs", check=False) == ""
        else:
            assert netns.command("cat", "/proc/net/ip_vs").startswith("IP Virtual Server")


def test_what_is_programmed_is_what_proc_shows(netns: NetworkNamespace, ipvs: IPVS) -> None:
    done(
        ipvs,
        AddVirtualServer(A4, RR),
        AddRealServer(A4, R1),
        AddRealServer(A4, R2, 0),
        AddVirtualServer(B4, VirtualServerSettings("wlc", 10800)),
        AddVirtualServer(C4, VirtualServerSettings("sh", 0, persistence_prefix=24)),
        AddVirtualServer(A6, VirtualServerSettings("rr", 60)),
        AddRealServer(A6, R6, 5),
    )
    assert listed(netns) == {
        "TCP 0A600001:0050 rr": ["7F000001:1F92 Masq 0", "7F000001:1F91 Masq 1"],
        "UDP 0A600001:0035 wlc persistent FFFFFFFF": [],
        "SCTP 0A600002:270F sh persistent FFFFFF00": [],
        "TCP [fd00:0096:0000:0000:0000:0000:0000:0001]:0050 rr persistent 80000000": [
            "[0000:0000:0000:0000:0000:0000:0000:0001]:1F91 Masq 5"
        ],
    }
    assert ipvs.virtual_servers() == {
        A4: RR,
        B4: VirtualServerSettings("wlc", 10800),
        C4: VirtualServerSettings("sh", 0, persistence_prefix=24),
        A6: VirtualServerSettings("rr", 60),
    }
    assert sorted(ipvs.real_servers(A4), key=lambda state: state.weight) == [
        RealServerState(R2, 0, 0, 0, 0),
        RealServerState(R1, 1, 0, 0, 0),
    ]
    assert ipvs.all_real_servers([A6, B4, ABSENT]) == {A6: [RealServerState(R6, 5, 0, 0, 0)], B4: [], ABSENT: []}


@pytest.mark.parametrize(
    "wanted",
    [
        RR,
        VirtualServerSettings("sh", flags=Flag.SH_FALLBACK | Flag.SH_PORT),
        VirtualServerSettings("mh", flags=Flag.MH_PORT),
        VirtualServerSettings("rr", 300, Flag.ONE_PACKET),
        VirtualServerSettings("rr", flags=Flag(1 << 30)),  # means nothing to the kernel, which keeps it
        VirtualServerSettings("wrr", 1, Flag.SCHEDULER_3, 16),
    ],
)
@pytest.mark.parametrize("server", [VirtualServer(4, "udp", "10.96.0.1", 53), VirtualServer(6, "udp", "fd00:96::1", 53)])
def test_settings_are_kept_by_adding_and_by_editing(
    ipvs: IPVS, server: VirtualServer, wanted: VirtualServerSettings
) -> None:
    done(ipvs, AddVirtualServer(server, wanted))
    assert ipvs.virtual_servers() == {server: wanted}
    for settings_ in (VirtualServerSettings("lc", 5), wanted, RR, wanted):
        done(ipvs, EditVirtualServer(server, settings_))
        assert ipvs.virtual_servers() == {server: settings_}


def test_editing_keeps_real_servers_and_deleting_takes_them_along(ipvs: IPVS) -> None:
    done(ipvs, AddVirtualServer(A4, RR), AddRealServer(A4, R1), AddRealServer(A4, R2))
    done(ipvs, EditVirtualServer(A4, VirtualServerSettings("sh", 9)), EditRealServer(A4, R1, 7))
    assert {state.server: state.weight for state in ipvs.real_servers(A4)} == {R1: 7, R2: 1}
    done(ipvs, DeleteRealServer(A4, R1), DeleteVirtualServer(A4), AddVirtualServer(A4, RR), AddRealServer(A4, R1, 3))
    assert [(state.server, state.weight) for state in ipvs.real_servers(A4)] == [(R1, 3)]
    ipvs.flush()
    assert ipvs.virtual_servers() == {}


def test_refusals_have_their_number_and_words_and_all_else_is_done(ipvs: IPVS) -> None:
    done(ipvs, AddVirtualServer(A4, RR), AddRealServer(A4, R1))
    cases: list[tuple[Operation, int, str]] = [
        (AddVirtualServer(A4, RR), errno.EEXIST, "add virtual server tcp 10.96.0.1:80: the virtual server is there already"),
        (AddVirtualServer(B4, VirtualServerSettings("absent")), errno.ENOENT, "does not have its scheduler"),
        (EditVirtualServer(A4, VirtualServerSettings("absent")), errno.ENOENT, "does not have its scheduler"),
        (EditVirtualServer(ABSENT, RR), errno.ESRCH, "no such virtual server"),
        (DeleteVirtualServer(ABSENT), errno.ESRCH, "delete virtual server tcp 10.96.0.99:80: there is no such"),
        (AddRealServer(A4, R1), errno.EEXIST, "add real server of tcp 10.96.0.1:80 127.0.0.1:8081: the real server is"),
        (AddRealServer(ABSENT, R1), errno.ESRCH, "no such virtual server"),
        (EditRealServer(A4, R2, 1), errno.ENOENT, "no such real server"),
        (EditRealServer(ABSENT, R2, 1), errno.ESRCH, "no such virtual server"),
        (DeleteRealServer(A4, R2), errno.ENOENT, "no such real server"),
        (DeleteRealServer(ABSENT, R2), errno.ESRCH, "no such virtual server"),
        (AddRealServer(A4, R2, 1 << 31), errno.ERANGE, "ERANGE"),
        (AddRealServer(A4, RealServer("255.255.255.255", 1)), errno.EINVAL, "not the address of one host"),
        (AddRealServer(A4, RealServer("224.0.0.1", 1)), errno.EINVAL, "not the address of one host"),
        (AddRealServer(A4, RealServer("fd00::1", 1)), errno.EINVAL, "cannot be encoded"),
        (AddVirtualServer(VirtualServer(4, "tcp", "x", 1), RR), errno.EINVAL, "cannot be encoded"),
        (AddVirtualServer(B4, VirtualServerSettings("x" * 16)), errno.EINVAL, "not the name of a scheduler"),
    ]
    good = [AddRealServer(A4, RealServer("127.0.0.1", 9000 + i)) for i in range(len(cases))]
    mixed = [operation for pair in zip((case[0] for case in cases), good, strict=True) for operation in pair]
    refused = ipvs.change(mixed)
    assert {place: error.errno for place, error in refused.items()} == {2 * i: case[1] for i, case in enumerate(cases)}
    for i, (_, _, words) in enumerate(cases):
        assert words in str(refused[2 * i])
    assert {state.server for state in ipvs.real_servers(A4)} == {R1, *(operation.real for operation in good)}
    assert ipvs.virtual_servers() == {A4: RR}


def test_what_the_kernel_takes_though_it_makes_no_sense(ipvs: IPVS) -> None:
    """Facts that a caller must know: nothing of this is refused."""
    any_port = VirtualServer(4, "tcp", "10.96.0.7", 0)
    nowhere = VirtualServer(4, "tcp", "0.0.0.0", 80)
    odd = VirtualServer(4, "1", "10.96.0.7", 80)
    everything = [any_port, nowhere, odd]
    assert errnos(ipvs, *(AddVirtualServer(server, RR) for server in everything)) == [0, 0, 0]
    assert errnos(ipvs, *(AddRealServer(any_port, real) for real in (RealServer("127.0.0.1", 0), R1))) == [0, 0]
    assert set(ipvs.virtual_servers()) == set(everything)


def test_ipv6_prefix_of_zero_is_refused(ipvs: IPVS) -> None:
    zero = VirtualServerSettings(persistence_seconds=1, persistence_prefix=0)
    assert errnos(ipvs, AddVirtualServer(A6, zero), AddVirtualServer(A4, zero)) == [errno.EINVAL, 0]
    assert ipvs.virtual_servers() == {A4: zero}


def test_more_refusals_than_one_datagram_holds_are_all_mapped(ipvs: IPVS) -> None:
    done(ipvs, AddVirtualServer(A4, RR))
    operations = [
        AddRealServer(A4, RealServer(f"127.1.{i >> 8}.{i & 255}", 80)) if i % 16 == 0 else DeleteRealServer(A4, R1)
        for i in range(8000)
    ]
    refused = ipvs.change(operations)
    assert set(refused) == {i for i in range(8000) if i % 16}
    assert {error.errno for error in refused.values()} == {errno.ENOENT}
    assert len(ipvs.real_servers(A4)) == 500


def test_thousands_are_listed_counted_and_flushed(netns: NetworkNamespace, ipvs: IPVS) -> None:
    reals = [RealServer(f"127.0.1.{i}", 80) for i in range(3)]
    fours = [VirtualServer(4, "tcp", f"10.96.{i >> 8}.{i & 255}", 80) for i in range(2000)]
    sixes = [VirtualServer(6, "tcp", f"fd00:96::{i:x}", 80) for i in range(1, 501)]
    done(ipvs, *(operation for server in fours for operation in (
        AddVirtualServer(server, RR), *(AddRealServer(server, real) for real in reals))))  # fmt: skip
    done(ipvs, *(AddVirtualServer(server, RR) for server in sixes))
    # Lists have gaps while virtual servers of other namespaces (of tests beside this one) come and go.
    assert any(set(ipvs.virtual_servers()) == {*fours, *sixes} for _ in range(5))
    assert any(set(ipvs.statistics()) == {*fours, *sixes} for _ in range(5))
    assert ipvs.count_ipv4() == 2000  # IPv6 ones are not counted
    found = ipvs.all_real_servers(fours)
    assert {frozenset(state.server for state in states) for states in found.values()} == {frozenset(reals)}
    ipvs.flush()
    assert (ipvs.virtual_servers(), ipvs.count_ipv4()) == ({}, 0)


def test_namespaces_do_not_see_each_other(netns: NetworkNamespace, ipvs: IPVS) -> None:
    name = f"{netns.name}-b"
    import subprocess

    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        done(ipvs, AddVirtualServer(A4, RR), AddVirtualServer(B4, RR))
        with NetworkNamespace(name).run(IPVS) as other:
            assert (other.virtual_servers(), other.count_ipv4()) == ({}, 0)
            done(other, AddVirtualServer(A4, VirtualServerSettings("wlc")))
            assert other.count_ipv4() == 1
            other.set_timeouts(udp=77)
            other.flush()
        assert (len(ipvs.virtual_servers()), ipvs.count_ipv4()) == (2, 2)
        assert ipvs.timeouts().udp != 77
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def test_virtual_servers_by_mark_are_programmed_but_not_listed(netns: NetworkNamespace, ipvs: IPVS) -> None:
    mark = FirewallMark(4, 0x1234)
    done(ipvs, AddVirtualServer(mark, RR), AddRealServer(mark, R1), AddVirtualServer(A4, RR))
    assert "FWM 00001234 rr" in listed(netns)
    assert set(ipvs.virtual_servers()) == set(ipvs.statistics()) == {A4}
    assert [state.server for state in ipvs.real_servers(mark)] == [R1]
    assert ipvs.count_ipv4() == 2
    assert errnos(ipvs, AddVirtualServer(mark, RR), DeleteVirtualServer(mark)) == [errno.EEXIST, 0]


def test_schedulers_are_probed_without_a_trace(ipvs: IPVS) -> None:
    assert ipvs.has_scheduler("rr")
    assert not ipvs.has_scheduler("absent")
    taken = FirewallMark(4, 0xFFFFFFFF)
    done(ipvs, AddVirtualServer(taken, VirtualServerSettings("wlc")))
    assert ipvs.has_scheduler("rr")
    assert ipvs.count_ipv4() == 1
    with pytest.raises(ItemRefused, match="not the name of a scheduler"):
        ipvs.has_scheduler("x" * 16)


def test_timeouts(ipvs: IPVS) -> None:
    before = ipvs.timeouts()
    assert before == Timeouts(900, 120, 300)
    ipvs.set_timeouts(udp=30)
    assert ipvs.timeouts() == Timeouts(900, 120, 30)
    ipvs.set_timeouts(tcp=7200, tcp_fin=10)
    assert ipvs.timeouts() == Timeouts(7200, 10, 30)
    with pytest.raises(RequestRefused) as refused:
        ipvs.set_timeouts(tcp=0x7FFFFFFF)
    assert refused.value.errno == errno.EINVAL
    assert ipvs.timeouts() == Timeouts(7200, 10, 30)


@pytest.mark.parametrize(("server", "real"), [(A4, RealServer("10.1.0.1", 8081)), (A6, RealServer("fd00:1::1", 8081))])
def test_connections_are_counted(netns: NetworkNamespace, ipvs: IPVS, server: VirtualServer, real: RealServer) -> None:
    for address in (server.address, real.address):
        netns.command("ip", "address", "add", address, "dev", "lo", *(["nodad"] if server.family == 6 else []))
    done(ipvs, AddVirtualServer(server, VirtualServerSettings("rr", 60)), AddRealServer(server, real))
    family = socket.AF_INET6 if server.family == 6 else socket.AF_INET

    def converse() -> tuple[list[RealServerState], list[RealServerState]]:
        with socket.create_server((real.address, real.port), family=family) as listener:
            with socket.create_connection((server.address, server.port), timeout=5) as client:
                client.sendall(b"x" * 1000)
                with listener.accept()[0] as accepted:
                    assert accepted.recv(1000)
                    accepted.sendall(b"y" * 2000)
                    assert client.recv(2000)
                    during = ipvs.real_servers(server)
            return during, ipvs.real_servers(server)

    [during], [after] = netns.run(converse)
    assert during == RealServerState(real, 1, 1, 0, 1)
    assert (after.active_connections, after.inactive_connections) == (0, 1)
    counters = ipvs.statistics()[server]
    for _ in range(50):  # the kernel sums them up every two seconds
        if counters.connections:
            break
        time.sleep(0.1)
        counters = ipvs.statistics()[server]
    assert counters.connections == 1
    assert counters.in_bytes > 1000 and counters.out_bytes > 2000
    assert counters.in_packets > 2 and counters.out_packets > 2


def reference(netns: NetworkNamespace, work: Any) -> Any:
    """Runs work(ipvs) with pyroute2's driver inside the namespace."""

    def inside() -> Any:
        from pyroute2 import IPVS as Reference

        with Reference() as driver:
            return work(driver)

    return netns.run(inside)


def test_pyroute2_reads_what_we_program(netns: NetworkNamespace, ipvs: IPVS) -> None:
    from pyroute2 import IPVSService

    done(ipvs, AddVirtualServer(A4, VirtualServerSettings("sh", 60, Flag.SH_PORT)), AddRealServer(A4, R1, 7))
    done(ipvs, AddVirtualServer(A6, RR), AddRealServer(A6, R6, 8))

    def read(driver: Any) -> dict[str, Any]:
        found = {}
        for message in driver.service("dump"):
            reals = driver.dest("dump", service=IPVSService.from_message(message))
            service = message.get("IPVS_CMD_ATTR_SERVICE")
            found[service.get("ADDR")] = (service, [real.get("IPVS_CMD_ATTR_DEST") for real in reals])
        return found

    found = reference(netns, read)
    service, [real] = found["10.96.0.1"]
    assert [service.get(key) for key in ("AF", "PROTOCOL", "PORT", "SCHED_NAME", "TIMEOUT", "NETMASK")] == [
        socket.AF_INET, 6, 80, "sh", 60, "255.255.255.255",
    ]  # fmt: skip
    assert service.get("FLAGS")["flags"] == 0x10 | 0x2 | 0x1
    assert [real.get(key) for key in ("ADDR", "PORT", "WEIGHT", "FWD_METHOD")] == ["127.0.0.1", 8081, 7, 0]
    service, [real] = found["fd00:96::1"]
    assert [service.get(key) for key in ("AF", "PROTOCOL", "PORT", "SCHED_NAME")] == [socket.AF_INET6, 6, 80, "rr"]
    assert [real.get(key) for key in ("ADDR", "PORT", "WEIGHT", "FWD_METHOD")] == ["::1", 8081, 8, 0]


def test_we_read_what_pyroute2_programs(netns: NetworkNamespace, ipvs: IPVS) -> None:
    from pyroute2 import IPVSDest, IPVSService

    def program(driver: Any) -> None:
        four = IPVSService(addr="10.96.0.1", port=80, protocol=6, sched_name="wrr", timeout=9, flags={"flags": 1, "mask": 1})
        driver.service("add", service=four)
        driver.dest("add", service=four, dest=IPVSDest(addr="10.1.0.1", port=81, weight=3, fwd_method=0))
        driver.dest("add", service=four, dest=IPVSDest(addr="10.1.0.2", port=82, weight=4, fwd_method=3))

    netns.command("ip", "address", "add", "10.1.0.9/24", "dev", "lo")
    reference(netns, program)
    assert ipvs.virtual_servers() == {A4: VirtualServerSettings("wrr", 9)}
    assert sorted(ipvs.real_servers(A4), key=str) == [
        RealServerState(RealServer("10.1.0.1", 81), 3, 0, 0, 0),
        RealServerState(RealServer("10.1.0.2", 82), 4, 0, 0, 0, masquerade=False),
    ]


servers_drawn = st.sampled_from([A4, B4, C4, A6])
steps_drawn = st.lists(
    st.tuples(
        st.sampled_from(["add", "edit", "delete", "add real", "edit real", "delete real"]),
        servers_drawn,
        st.sampled_from([8081, 8082, 8083]),
        st.integers(0, 3),
        st.sampled_from([RR, VirtualServerSettings("wrr", 5), VirtualServerSettings("sh", flags=Flag.SH_PORT)]),
    ),
    max_size=25,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps_drawn)
def test_any_batch_ends_as_a_model_says(ipvs: IPVS, steps: list[tuple[str, VirtualServer, int, int, Any]]) -> None:
    ipvs.flush()
    model: dict[VirtualServer, tuple[VirtualServerSettings, dict[RealServer, int]]] = {}
    operations: list[Operation] = []
    expected: list[int] = []
    for what, server, port, weight, wanted in steps:
        real = RealServer("::1" if server.family == 6 else "127.0.0.1", port)
        have = model.get(server)
        number = 0 if have is not None else errno.ESRCH
        if what == "add":
            operations.append(AddVirtualServer(server, wanted))
            number = errno.EEXIST if have is not None else 0
            model.setdefault(server, (wanted, {}))
        elif what == "edit":
            operations.append(EditVirtualServer(server, wanted))
            if have is not None:
                model[server] = (wanted, have[1])
        elif what == "delete":
            operations.append(DeleteVirtualServer(server))
            model.pop(server, None)
        elif what == "add real":
            operations.append(AddRealServer(server, real, weight))
            if have is not None:
                number = errno.EEXIST if real in have[1] else 0
                have[1].setdefault(real, weight)
        elif what == "edit real":
            operations.append(EditRealServer(server, real, weight))
            if have is not None:
                number = 0 if real in have[1] else errno.ENOENT
                have[1].update({real: weight} if real in have[1] else {})
        else:
            operations.append(DeleteRealServer(server, real))
            if have is not None:
                number = 0 if real in have[1] else errno.ENOENT
                have[1].pop(real, None)
        expected.append(number)
    assert errnos(ipvs, *operations) == expected
    assert ipvs.virtual_servers() == {server: wanted for server, (wanted, _) in model.items()}
    found = {
        server: {state.server: state.weight for state in states} for server, states in ipvs.all_real_servers(model).items()
    }
    assert found == {server: reals for server, (_, reals) in model.items()}


def test_threads_take_turns(ipvs: IPVS) -> None:
    failures: list[object] = []

    def fill(server: VirtualServer) -> None:
        reals = [RealServer(f"127.2.{i >> 8}.{i & 255}", server.port) for i in range(300)]
        failures.extend(ipvs.change([AddVirtualServer(server, RR), *(AddRealServer(server, real) for real in reals)]))
        if {state.server for state in ipvs.real_servers(server)} != set(reals):
            failures.append(server)

    threads = [threading.Thread(target=fill, args=(VirtualServer(4, "tcp", "10.96.0.1", port),)) for port in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_everything_needs_the_privilege(netns: NetworkNamespace, ipvs: IPVS) -> None:
    code = """
from nodeproxy.kernel.ipvs import IPVS
ipvs = IPVS()
ipvs.require()
for call in (ipvs.virtual_servers, ipvs.count_ipv4, ipvs.timeouts, ipvs.flush, lambda: ipvs.has_scheduler("rr")):
    try:
        call()
    except Exception as error:
        print(type(error).__name__)
"""
    assert python_without_privilege(netns, code).split() == [PermissionMissing.__name__] * 5
