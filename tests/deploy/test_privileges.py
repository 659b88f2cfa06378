"""An agent with the capabilities and mounts of the DaemonSet, in every mode: what it needs, and what happens without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from nodeproxy.kernel import sysctl
from nodeproxy.sandbox.agent import AgentProcess
from nodeproxy.sandbox.topology import Sandbox
from tests.behaviour.conftest import POD_A, POD_B
from tests.behaviour.test_mode_switch import Configured
from tests.behaviour.world import CLUSTER_IP, NODE_ADDRESS, World, ask, endpoint_slice, names, service
from tests.ways import IPVS_NFT, LEGACY, NFT, Way, ipvs, needs_ipvs

pytestmark = pytest.mark.kernel

DAEMON_SET = Path(__file__).parents[2] / "deploy" / "base" / "daemonset.yaml"
CLIENT = "10.1.0.9"
# As a container runtime does it: /proc/sys read-only, the volume, then the capabilities. Their limit is what root has.
CONFINED = """
set -e
mount -t tmpfs none "$1" && mkdir -p "$1/net" && mount --bind /proc/sys/net "$1/net"
mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys
capabilities=$2
shift 2
exec setpriv --no-new-privs --inh-caps=-all --bounding-set="-all$capabilities" "$@"
"""


def confined(agent: AgentProcess, box: Sandbox, *, volume: bool = True) -> None:
    """Have the agent start as in the DaemonSet's container; without the `volume` it finds /proc/sys only."""
    (container,) = yaml.safe_load(DAEMON_SET.read_text())["spec"]["template"]["spec"]["containers"]
    place = box.directory / "proc-sys"
    place.mkdir()
    capabilities = "".join(f",+{name.lower()}" for name in container["securityContext"]["capabilities"]["add"])
    agent.command[:0] = ["unshare", "--mount", "sh", "-c", CONFINED, "sh", str(place), capabilities]
    if volume:
        agent.environment["NODEPROXY_PROC_SYS"] = str(place)


@pytest.fixture
def box() -> Iterator[Sandbox]:
    with Sandbox(node_addresses=[NODE_ADDRESS, "2001:db8::2"]) as made:
        for name, address in (("a", POD_A), ("b", POD_B)):
            made.serve(made.add_pod(address), address, 8080, name=name)
        made.add_pod(CLIENT)
        yield made


def serves(world: World) -> bool:
    return names(ask(world.box.pods[CLIENT], CLUSTER_IP, 80, 12)) == {"a", "b"}


def setting(world: World, name: str) -> str:
    return world.box.node.run(sysctl.get, name)


@pytest.mark.parametrize("way", [LEGACY, NFT, ipvs(IPVS_NFT)], ids=str)
def test_it_has_what_it_needs(box: Sandbox, way: Way) -> None:
    world = World(box, way, flags=["--conntrack-tcp-timeout-close-wait", "41m", "--oom-score-adj", "0"])
    confined(world.agent, box)
    world.put("web", service(sessionAffinity="ClientIP"), service("all", cluster_ip="10.96.0.11", nodePort=30080))
    world.put("slices", endpoint_slice([POD_A, POD_B]), endpoint_slice([POD_A, POD_B], "all"))
    with world.agent:
        assert len(names(ask(box.pods[CLIENT], CLUSTER_IP, 80, 6))) == 1
        for where, port in (("10.96.0.11", 80), (NODE_ADDRESS, 30080)):
            world.settle(lambda at=(where, port): names(ask(box.pods[CLIENT], *at, 12)) == {"a", "b"}, "both answer")  # type: ignore[misc]
        assert names(ask(box.pods[POD_A], "10.96.0.11", 80, 12)) == {"a", "b"}, "also a pod itself"
        assert setting(world, "net.netfilter.nf_conntrack_tcp_timeout_close_wait") == "2460"
        world.settle(lambda: setting(world, "net.netfilter.nf_conntrack_acct") == "1", "traffic is counted", 15)
        if way.mode == "ipvs":
            assert setting(world, "net.ipv4.vs.conntrack") == "1"
        else:
            assert setting(world, "net.ipv4.conf.all.route_localnet") == "1"
    assert "[warning" not in world.agent.log_text() and "[error" not in world.agent.log_text(), world.agent.log_text()


@pytest.mark.parametrize("way", [LEGACY, NFT], ids=str)
def test_without_the_volume_it_says_so_and_serves(box: Sandbox, way: Way) -> None:
    world = World(box, way, flags=["--conntrack-tcp-timeout-close-wait", "41m"])
    confined(world.agent, box, volume=False)
    world.put("web", service(), endpoint_slice([POD_A, POD_B]))
    with world.agent:
        world.settle(lambda: serves(world), "both answer")
    log = world.agent.log_text()
    for name in ("net.ipv4.conf.all.route_localnet", "net.netfilter.nf_conntrack_tcp_timeout_close_wait"):
        assert log.count(f"sysctl {name} is read-only here") == 1, log


@needs_ipvs
def test_its_mode_is_changed_while_it_runs(box: Sandbox) -> None:
    world = Configured(box, NFT)
    confined(world.agent, box)
    world.put("web", service(), endpoint_slice([POD_A, POD_B]))
    with world.agent:
        world.settle(lambda: serves(world), "iptables mode")
        for mode in ("ipvs", "iptables"):
            world.write(mode=mode)
            world.settle(lambda mode=mode: f"mode={mode}" in world.agent.log_tail(2), f"{mode} mode")  # type: ignore[misc]
            assert serves(world)
    assert "[error" not in world.agent.log_text(), world.agent.log_text()
