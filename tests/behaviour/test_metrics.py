"""What the agent measures is what the kernel holds."""

from __future__ import annotations

import pytest

from nodeproxy.sandbox.agent import http_get
from nodeproxy.sandbox.topology import Sandbox
from tests.ways import IPVS_NFT, LEGACY, NFT, Way, ipvs

from .conftest import POD_A, POD_B
from .world import World, endpoint_slice, service

pytestmark = pytest.mark.kernel

BUILT_IN = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING", "KUBE-FIREWALL")


@pytest.mark.parametrize("way", [LEGACY, NFT, ipvs(IPVS_NFT)], ids=str)
def test_rules_are_counted_after_full_and_partial_syncs(box: Sandbox, way: Way) -> None:
    world = World(box, way)
    world.put("web", service(nodePort=30080), endpoint_slice([POD_A, POD_B]))
    world.put("other", service("other", cluster_ip="10.96.0.11"), endpoint_slice([POD_A], "other"))
    with world.agent:
        assert _counted(world) == _held(world)
        world.put("web", service(nodePort=30080), endpoint_slice([POD_A]))
        world.settle(lambda: not world.forwards_to(f"{POD_B}:8080"), "one endpoint less")
        world.settle(lambda: _counted(world) == _held(world), "counted after a change")
        world.remove("other")
        world.settle(lambda: not any("other" in line or "10.96.0.11" in line for line in world.held()), "a Service less")
        world.settle(lambda: _counted(world) == _held(world), "counted after a removal")
        assert _held(world)["nat"] > 0


def _held(world: World) -> dict[str, int]:
    tables = ("nat", "filter") if world.way.mode == "iptables" else ("mangle", "nat", "filter")
    return {
        table: sum(rule.startswith("-A ") and rule.split()[1] not in BUILT_IN for rule in world.rules(table))
        for table in tables
    }


def _counted(world: World) -> dict[str, int]:
    _, text = http_get(world.box.node, "http://127.0.0.1:10249/metrics")
    found = {}
    for line in text.splitlines():
        if line.startswith("kubeproxy_sync_proxy_rules_iptables_total{") and 'ip_family="IPv4"' in line:
            found[line.partition('table="')[2].partition('"')[0]] = int(float(line.rpartition(" ")[2]))
    return found
