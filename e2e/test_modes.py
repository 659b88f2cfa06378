"""Another mode by an edit of the ConfigMap, while requests flow."""

from __future__ import annotations

import time

import pytest

from e2e.harness.agents import Agents
from e2e.harness.flow import Lane
from e2e.harness.objects import port, udp_port
from e2e.harness.stage import SERVERS
from e2e.harness.waiting import eventually
from e2e.harness.world import World

pytestmark = [pytest.mark.disruptive, pytest.mark.agent]


@pytest.mark.smoke
@pytest.mark.only("ipvs")
def test_the_mode_is_switched(world: World) -> None:
    """From IPVS to iptables and back: each agent says which mode is in force, and no request fails on the way.

    Connections that are open go on, too, as do UDP clients that keep their port.
    """
    stage = world.stage
    agents = Agents(stage.cluster, world.api)
    service = world.service(ports=[port(), udp_port()], type="NodePort")
    for place in stage.inside:
        world.answers(place, service.address, 80, SERVERS)
        world.answers(place, service.address, 80, SERVERS, protocol="UDP")
    world.answers(stage.outside, stage.b.address, service.node_ports["http"], SERVERS)
    lanes = world.lanes(stage.inside, service.address, 80, "connection", "stream", "udp", pause=0.05)
    lanes.append(Lane(stage.outside, stage.b.address, service.node_ports["http"], pause=0.05))
    with world.requests(*lanes) as requests:
        try:
            for mode in ("iptables", "ipvs", "iptables", "ipvs"):
                agents.configure(mode=mode)
                for place in (stage.node_a, stage.node_b):
                    eventually(
                        lambda: place.get("http://127.0.0.1:10249/proxyMode")[1] == mode,  # noqa: B023
                        f"{place} is in {mode} mode",
                        within=150,
                    )
                time.sleep(3)
                for place in stage.inside:
                    world.answers(place, service.address, 80, SERVERS)
        finally:
            agents.configure(mode="ipvs")
        print(requests.steady(least=100))
