"""What an operator does to a node, and what goes wrong around an agent: restart, kill, flush, refusal, a held lock."""

from __future__ import annotations

import fcntl
import subprocess
import time
from collections.abc import Sequence

import pytest

from nodeproxy.kernel.ipvs import IPVS, DeleteRealServer, RealServer, VirtualServer
from nodeproxy.sandbox.agent import METRICS, http_get
from nodeproxy.sandbox.client import Answered, Rejected
from nodeproxy.sandbox.topology import Sandbox
from tests.ways import LEGACY, NFT, Way, lacks_ipvs

from .conftest import POD_A, POD_B
from .world import CLUSTER_IP, World, ask, directory_of_wrappers, endpoint_slice, names, service

pytestmark = pytest.mark.kernel

OTHER_IP = "10.96.0.20"


def serves(world: World, cluster_ip: str = CLUSTER_IP) -> set[str]:
    """Who answers at a cluster IP, asked from a pod."""
    client = world.box.pods.get("10.1.0.9") or world.box.add_pod("10.1.0.9")
    return names(ask(client, cluster_ip, 80, 8))


def two_services(world: World) -> None:
    world.put("web", service(), endpoint_slice([POD_A]))
    world.put("other", service("other", cluster_ip=OTHER_IP), endpoint_slice([POD_B], "other"))


def test_what_is_programmed_stays_when_the_agent_stops(world: World) -> None:
    two_services(world)
    with world.agent:
        before = world.held()
    assert not world.agent.running()
    assert world.held() == before
    assert serves(world) == {"a"}


def passed(world: World) -> int:
    """Packets or connections counted where the Service web is forwarded; from 0 where that is made anew."""
    if world.way.mode == "iptables":
        chain = next(rule.split()[1] for rule in world.rules() if f"{POD_A}:8080" in rule)
        return int(world.iptables("-t", "nat", "-L", chain, "-v", "-x", "-n").splitlines()[-1].split()[0])
    return world.box.node.run(lambda: IPVS().statistics()[VirtualServer(4, "tcp", CLUSTER_IP, 80)].connections)


def test_a_restart_after_kill_touches_only_what_differs(world: World) -> None:
    two_services(world)
    with world.agent:
        world.agent.kill()
    assert serves(world) == {"a"}
    if world.way.mode == "iptables":
        chain = next(rule.split()[1] for rule in world.rules() if f"{POD_B}:8080" in rule)
        world.iptables("-t", "nat", "-F", chain)
    else:
        gone = DeleteRealServer(VirtualServer(4, "tcp", OTHER_IP, 80), RealServer(POD_B, 8080))
        assert world.box.node.run(lambda: IPVS().change([gone])) == {}
    world.settle(lambda: passed(world) > 0, "the kernel counts what passed (IPVS every two seconds)")
    with world.agent:
        assert serves(world, OTHER_IP) == {"b"}
        assert passed(world) > 0, "what was right was made anew"


@pytest.mark.parametrize(
    "damage",
    [
        ["-t", "nat", "-F"],
        ["-t", "filter", "-F", "KUBE-FORWARD"],
        ["-t", "nat", "-D", "PREROUTING", "1"],
        ["-t", "nat", "-A", "KUBE-MARK-MASQ", "-j", "ACCEPT"],
    ],
    ids=" ".join,
)
def test_rules_that_others_change_are_put_back(world: World, damage: list[str]) -> None:
    two_services(world)
    with world.agent:
        time.sleep(1.5)  # an audit has passed
        world.iptables("-A", "FORWARD", "-s", "192.0.2.77", "-j", "DROP")
        before = world.held()
        world.iptables(*damage)
        world.settle_as(before, "rules are back", timeout=4)
        assert serves(world) == {"a"}
        assert world.metric("nodeproxy_drift_repairs_total") == 1  # it may have been put right before anybody could look


def test_cleanup_removes_ours_and_nothing_else(world: World) -> None:
    affinity = {"sessionAffinity": "ClientIP"}
    theirs = ["-A FORWARD -s 192.0.2.77/32 -j DROP", ":MINE -"]
    world.iptables("-A", "FORWARD", "-s", "192.0.2.77", "-j", "DROP")
    world.iptables("-N", "MINE")
    before = {table: world.rules(table) for table in ("nat", "filter")}
    assert set(theirs) <= set(before["filter"])
    world.put("web", service(nodePort=30080, **affinity), endpoint_slice([POD_A]))
    with world.agent:
        assert serves(world) == {"a"}
    world.box.node.command([world.agent.command[0], "cleanup"])
    assert world.rules("filter") == before["filter"]
    assert [rule for rule in world.rules("nat") if "KUBE" in rule] == []
    assert [rule for rule in world.rules("nat", family=6) if "KUBE" in rule] == []
    assert world.box.node.command(["ipset", "list", "-name"]).stdout == ""
    if world.way.mode == "ipvs":
        assert world.virtual_servers() == []
        assert [rule for rule in world.rules("mangle") if "KUBE" in rule] == []
        assert "kube-ipvs0" not in world.box.node.command(["ip", "link"]).stdout


def test_cleanup_beside_an_agent_is_refused_and_changes_nothing(world: World) -> None:
    world.put("web", service(), endpoint_slice([POD_A]))
    with world.agent:
        before = world.held()
        done = world.box.node.command([world.agent.command[0], "cleanup"], check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("nodeproxy: an agent runs on this node"), done.stderr
        assert world.held() == before
        assert world.metric("nodeproxy_drift_repairs_total") == 0


def cleanup_with(world: World, programs: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """`nodeproxy cleanup` with a PATH on which there are these programs alone."""
    path = world.box.directory / "path"
    path.mkdir()
    for program in programs:
        (path / program).symlink_to(f"/usr/sbin/{program}")
    return world.box.node.command(["env", f"PATH={path}", world.agent.command[0], "cleanup"], check=False)


def test_cleanup_with_the_programs_of_one_variant_is_whole(world: World) -> None:
    world.put("web", service(), endpoint_slice([POD_A]))
    with world.agent:
        assert serves(world) == {"a"}
    stems = (f"{name}-{world.way.variant}" for name in ("iptables", "ip6tables"))
    done = cleanup_with(world, [f"{stem}-{verb}" for stem in stems for verb in ("restore", "save")])
    assert (done.returncode, "cleaned up" in done.stderr) == (0, True), done.stderr
    assert [rule for family in (4, 6) for rule in world.rules(family=family) if "KUBE" in rule] == []


@pytest.mark.parametrize("found", [(), (4,)], ids=["none", "only IPv4"])
def test_cleanup_says_which_rules_it_has_no_programs_to_look_at(world: World, found: Sequence[int]) -> None:
    """As in a shell whose PATH lacks /usr/sbin. Rules that stay keep the ipsets that they look into."""
    world.put("web", service(sessionAffinity="ClientIP"), endpoint_slice([POD_A]))
    with world.agent:
        assert serves(world) == {"a"}
    done = cleanup_with(world, [f"iptables-{world.way.variant}-{verb}" for _ in found for verb in ("restore", "save")])
    assert done.returncode == 1
    assert "cleaned up" not in done.stderr and "Traceback" not in done.stderr
    for family in (4, 6):
        assert (f"rules of IPv{family} were not looked at: " in done.stderr) == (family not in found), done.stderr
        assert any("KUBE" in rule for rule in world.rules(family=family)) == (family not in found)


def refusing(box: Sandbox, way: Way, marker: str) -> dict[str, str]:
    """An environment whose iptables-restore refuses every transaction that holds `marker`, as a kernel may.

    A wrapper around the real tool: there is no rule of ours that this kernel refuses.
    """
    script = f"""case "$1" in --version) exec $REAL "$@";; esac
input=$(mktemp); cat >$input
if grep -qe '{marker}' $input; then echo "iptables-restore: refused for the test" >&2; exit 1; fi
exec $REAL "$@" <$input"""
    tools = {f"{name}-{way.variant}-restore": script for name in ("iptables", "ip6tables")}
    return {"PATH": directory_of_wrappers(box.directory / "wrappers", tools)}


@pytest.mark.parametrize("way", [LEGACY, NFT], ids=str)
def test_a_refused_service_port_holds_up_no_other(box: Sandbox, way: Way) -> None:
    world = World(box, way, environment=refusing(box, way, f"{POD_B}:8080"))
    two_services(world)
    for number in range(30):
        world.put(f"more{number}", service(f"more{number}", cluster_ip=f"10.96.1.{number + 1}"))
    with world.agent:
        assert serves(world) == {"a"}
        assert serves(world, OTHER_IP) != {"b"}
        assert serves(world, "10.96.1.30") == {str(Rejected())}
        assert "test/other:p" in world.agent.log_text()
        assert world.metric("nodeproxy_refused_service_ports") == 1
        # it is tried again, and programmed once the kernel takes it; others change meanwhile
        world.put("web", service(), endpoint_slice([POD_A], port=8080), service("new", cluster_ip="10.96.2.1"))
        world.settle(lambda: serves(world, "10.96.2.1") == {str(Rejected())}, "the new Service is programmed")
        for wrapper in (box.directory / "wrappers").iterdir():
            wrapper.write_text(f'#!/bin/bash\nexec /usr/sbin/{wrapper.name} "$@"\n')
        world.settle(lambda: serves(world, OTHER_IP) == {"b"}, "the refused Service is programmed", timeout=15)
        world.settle(lambda: world.metric("nodeproxy_refused_service_ports") == 0, "nothing is refused any more")


@pytest.mark.parametrize("way", [LEGACY, NFT], ids=str)
def test_a_refused_change_leaves_what_was_programmed(box: Sandbox, way: Way) -> None:
    world = World(box, way, environment=refusing(box, way, f"{POD_B}:8080"))
    world.put("web", service(), endpoint_slice([POD_A]))
    with world.agent:
        assert serves(world) == {"a"}
        world.put("web", service(), endpoint_slice([POD_B]), service("new", cluster_ip=OTHER_IP))
        world.settle(lambda: serves(world, OTHER_IP) == {str(Rejected())}, "the new Service is programmed")
        assert serves(world) == {"a"}
        assert "test/web:p" in world.agent.log_text()


def test_a_family_without_its_tools_does_not_hold_up_the_other(box: Sandbox, way: Way) -> None:
    script = 'case "$1" in --version) exec $REAL "$@";; esac; echo "ip6tables: no such table" >&2; exit 3'
    path = directory_of_wrappers(box.directory / "wrappers", {f"ip6tables-{way.variant}-restore": script})
    world = World(box, way, environment={"PATH": path})
    two_services(world)
    with world.agent:
        assert serves(world) == {"a"}
        world.put("web", service(), endpoint_slice([POD_B]))
        world.settle(lambda: serves(world) == {"b"}, "changes are programmed")
        assert "IPv6: " in world.agent.log_text()


def test_a_kernel_without_bpf_matches_serves_hairpins_too(box: Sandbox, way: Way) -> None:
    world = World(box, way, environment=refusing(box, way, "-m bpf"))
    world.put("web", service(), endpoint_slice([POD_A]))
    affinity = {"sessionAffinity": "ClientIP"}
    world.put("other", service("other", cluster_ip=OTHER_IP, **affinity), endpoint_slice([POD_B], "other"))
    with world.agent:
        assert serves(world) == {"a"}
        for pod, cluster_ip, name in ((POD_A, CLUSTER_IP, "a"), (POD_B, OTHER_IP, "b")):
            (verdict,) = ask(box.pods[pod], cluster_ip, 80)
            assert isinstance(verdict, Answered)
            assert (verdict.name, verdict.source == pod) == (name, False)
        assert not any("-m bpf" in rule for rule in world.rules())


def test_a_held_lock_is_waited_for(box: Sandbox) -> None:
    world = World(box, LEGACY)
    world.put("web", service(), endpoint_slice([POD_A]))
    with world.agent:
        assert serves(world) == {"a"}
        with (box.directory / "xtables.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            world.put("web", service(), endpoint_slice([POD_B]))
            world.settle(lambda: "xtables lock" in world.agent.log_text(), "the held lock is named", timeout=20)
            assert serves(world) == {"a"}
        world.settle(lambda: serves(world) == {"b"}, "the change is programmed once the lock is free", timeout=40)


def test_a_lock_that_is_held_at_the_start_is_waited_for(box: Sandbox) -> None:
    world = World(box, LEGACY)
    world.put("web", service(), endpoint_slice([POD_A]))
    with (box.directory / "xtables.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        world.agent.start()
        world.settle(lambda: "xtables lock" in world.agent.log_text(), "the held lock is named", timeout=20)
    try:
        world.agent.wait_ready(40)
        assert serves(world) == {"a"}
        assert world.rules(family=6) != []
    finally:
        world.agent.stop()


def test_a_hostile_object_harms_nobody(world: World) -> None:
    two_services(world)
    with world.agent:
        bad = service("bad", cluster_ip="10.96.0.30", externalIPs=['1.2.3.4" -j ACCEPT'])
        worse = service("worse", cluster_ip="10.96.0.31")
        worse["spec"]["ports"][0]["port"] = "eighty"
        clash = service("clash", cluster_ip=CLUSTER_IP)
        clash["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"  # the younger one loses
        many = service("many", cluster_ip="10.96.0.32")
        many["spec"]["ports"] = [{"name": f"p{number}", "port": number, "protocol": "TCP"} for number in range(1, 1001)]
        world.put("zz", bad, worse, clash, many)
        world.settle(lambda: serves(world, "10.96.0.30") == {str(Rejected())}, "the rest of a bad object is programmed")
        log = world.agent.log_text()
        assert "test/bad" in log
        assert "externalIPs[0]" in log
        assert "test/worse" in log
        assert "spec.ports[0].port" in log
        assert "test/clash" in log
        client = world.box.pods["10.1.0.9"]
        assert set(ask(client, "10.96.0.32", 1) + ask(client, "10.96.0.32", 1000)) == {Rejected()}
        assert serves(world) == {"a"}
        assert serves(world, OTHER_IP) == {"b"}


@pytest.mark.parametrize("way", [LEGACY, NFT], ids=str)
def test_the_node_gets_what_localhost_node_ports_need(world: World) -> None:
    world.put("web", service(nodePort=30080), endpoint_slice([POD_A]))
    with world.agent:
        assert world.box.node.read_sysctl("net.ipv4.conf.all.route_localnet") == "1"
        assert names(ask(world.box.node, "127.0.0.1", 30080, 3)) == {"a"}


@pytest.mark.skipif(not lacks_ipvs(), reason="this kernel has IPVS")
def test_without_ipvs_the_agent_falls_back_where_it_may(box: Sandbox) -> None:
    world = World(box, Way("ipvs", "nft"), flags=["--fallback", "iptables"])
    world.put("web", service(), endpoint_slice([POD_A]))
    with world.agent:
        assert serves(world) == {"a"}
        assert "falling back to another mode" in world.agent.log_text()
        assert http_get(box.node, f"http://{METRICS}/proxyMode") == (200, "iptables")
