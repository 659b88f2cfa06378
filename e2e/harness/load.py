"""Owns the load that is on a cluster while something is done to its nodes: a Service, and requests to it from everywhere."""

from __future__ import annotations

from e2e.harness.flow import Lane
from e2e.harness.objects import port, udp_port
from e2e.harness.stage import SERVERS
from e2e.harness.world import Service, World


def served(world: World) -> tuple[Service, list[Lane]]:
    """A Service that everybody is served by, and requests of every kind to it from everywhere."""
    stage = world.stage
    service = world.service(ports=[port(), udp_port()], type="NodePort")
    for place in stage.inside:
        world.answers(place, service.address, 80, SERVERS)
        world.answers(place, service.address, 80, SERVERS, protocol="UDP")
    lanes = world.lanes(stage.inside, service.address, 80, "connection", "stream", "udp", pause=0.03)
    for node in stage.nodes:
        world.answers(stage.outside, node.address, service.node_ports["http"], SERVERS)
        lanes += world.lanes([stage.outside], node.address, service.node_ports["http"], "connection", "stream", pause=0.03)
    return service, lanes
