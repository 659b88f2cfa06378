"""Owns those who hear of what was programmed: health-check node ports, counters, metrics. They read, and never steer."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

from nodeproxy.agent.events import EventRecorder
from nodeproxy.agent.health import Health
from nodeproxy.agent.metrics import Metrics
from nodeproxy.agent.observers.health_checks import HealthCheckServers
from nodeproxy.agent.observers.no_local_endpoints import NoLocalEndpoints
from nodeproxy.agent.observers.traffic import TrafficCounters
from nodeproxy.agent.sync import Observer
from nodeproxy.configuration.agent_config import AgentConfig
from nodeproxy.kernel.addresses import LocalAddress
from nodeproxy.programmer.base import ProgrammerConfig


class Observers:
    """All observers of one agent."""

    def __init__(
        self, config: AgentConfig, programmer: ProgrammerConfig, *, health: Health, metrics: Metrics, events: EventRecorder
    ) -> None:
        self._addresses: tuple[LocalAddress, ...] = ()
        self._health_checks = HealthCheckServers(
            healthy=lambda: health.alive, events=events, metrics=metrics, allowed=programmer.node_port_addresses
        )
        self._traffic = TrafficCounters(metrics.registry, self._local_addresses, config.traffic_counters_period)
        self._no_local_endpoints = NoLocalEndpoints(metrics.set_no_local_endpoints)

    @property
    def all(self) -> Sequence[Observer]:
        """For the sync loop to tell."""
        return (self._health_checks, self._traffic, self._no_local_endpoints)

    def configure(self, config: AgentConfig, programmer: ProgrammerConfig) -> None:
        """Take a changed configuration."""
        self._health_checks.configure(programmer.node_port_addresses)
        self._traffic.change_period(config.traffic_counters_period)

    def take_addresses(self, addresses: Sequence[LocalAddress]) -> None:
        """The node's own addresses are these now."""
        self._addresses = tuple(addresses)
        self._health_checks.take_addresses(addresses)

    async def run(self) -> None:
        """Serve and count, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._health_checks.run())
            group.create_task(self._traffic.run())

    def _local_addresses(self) -> Collection[str]:
        return [address.address for address in self._addresses]
