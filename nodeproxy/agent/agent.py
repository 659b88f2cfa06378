"""Owns the wiring of one agent: which source, which programmer, what serves beside them, and how it starts and stops."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import signal
from collections.abc import Iterable, Sequence

import structlog
from msgspec.structs import replace

from nodeproxy.agent.backoff import Backoff
from nodeproxy.agent.cleanup import remove_other_mode
from nodeproxy.agent.config import AgentConfig, Mode
from nodeproxy.agent.health import Health
from nodeproxy.agent.http import health_routes, metrics_routes, serving
from nodeproxy.agent.metrics import Metrics
from nodeproxy.agent.modes import prepared_programmer
from nodeproxy.agent.node import available_families, programmer_config
from nodeproxy.agent.sync import SyncLoop
from nodeproxy.agent.system import apply_settings
from nodeproxy.cluster.state import ClusterState
from nodeproxy.forwarding.node import NodeFacts
from nodeproxy.forwarding.table import Family
from nodeproxy.forwarding.tracker import ForwardingTracker
from nodeproxy.kernel.addresses import LocalAddress, NodeAddresses, local_addresses
from nodeproxy.kernel.errors import KernelError
from nodeproxy.programmer.base import DetectLocalMode, Programmer, ProgrammerConfig, ProgrammingError
from nodeproxy.programmer.ipvs.names import DEVICE
from nodeproxy.source.events import Source, SourceError

_log = structlog.get_logger(__name__)

_COLLECTOR_HELD_SECONDS = 60.0
_NOT_THE_NODES = (DEVICE,)  # interfaces whose addresses are not the node's own


class StartError(Exception):
    """The agent cannot start; the message is one line that says what is missing and what to do."""


class Agent:
    """One agent on one node."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._metrics = Metrics()
        self._health = Health(config.sync_period_of(config.mode))
        self._families: Sequence[Family] = available_families()
        self._local_addresses = _node_addresses()
        self._state = ClusterState(config.node_name)
        facts = NodeFacts(
            name=config.node_name,
            families=tuple(self._families),
            addresses=tuple(self._local_addresses),
            masquerade_all=config.masquerade_all,
        )
        self._programmer_config = self._make_programmer_config(config.mode)
        self._mode = config.mode
        self._programmer: Programmer | None = None
        self._tracker = ForwardingTracker(facts)

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT. What is programmed stays in place. Raises `StartError` where it cannot start."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        source = make_source(self._config)
        try:
            self._mode, programmer = await prepared_programmer(self._config, self._make_programmer_config)
        except ProgrammingError as error:
            raise StartError(str(error)) from error
        self._programmer_config = self._make_programmer_config(self._mode)
        self._programmer = programmer
        await asyncio.to_thread(apply_settings, self._config, self._programmer_config)
        if self._config.detect_local_mode is DetectLocalMode.CLUSTER_CIDR and not self._config.cluster_cidrs:
            _log.warning("no --cluster-cidr: traffic of local pods cannot be told apart, cluster IPs are not masqueraded")
        sync = SyncLoop(
            state=self._state,
            tracker=self._tracker,
            programmer=programmer,
            health=self._health,
            metrics=self._metrics,
            min_sync_period=self._config.min_sync_period_of(self._mode),
            on_node_change=self._node_changed,
        )
        health = health_routes(self._health, self._metrics)
        metrics = metrics_routes(self._metrics, self._mode)
        async with (
            serving("healthz", self._config.healthz_bind_address, health),
            serving("metrics", self._config.metrics_bind_address, metrics),
        ):
            await self._until(stop, source, sync)
        _log.info("stopped; what is programmed stays in place")

    async def _until(self, stop: asyncio.Event, source: Source, sync: SyncLoop) -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(work)
                for work in (
                    sync.run(),
                    self._run_source(source, sync),
                    self._follow_addresses(sync),
                    self._hold_collector(sync),
                    self._remove_other_mode(sync),
                )
            ]
            await stop.wait()
            for task in tasks:
                task.cancel()

    async def _run_source(self, source: Source, sync: SyncLoop) -> None:
        """Keep the source going: one that ends or fails is started again, and what is programmed stays."""
        backoff = Backoff(1.0, 30.0)
        while True:
            try:
                await source.run(sync.deliver)
            except (SourceError, OSError) as error:
                _log.error("source failed", error=str(error))
            await asyncio.sleep(backoff.next())

    async def _remove_other_mode(self, sync: SyncLoop) -> None:
        """Make before break: what another mode left stays until this one is programmed."""
        await sync.first_sync.wait()
        await remove_other_mode(self._mode)

    async def _hold_collector(self, sync: SyncLoop) -> None:
        """Until the first sync there is no garbage, only state: collecting would cost a fifth of the time to get there."""
        gc.disable()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(sync.first_sync.wait(), _COLLECTOR_HELD_SECONDS)
        gc.freeze()
        gc.enable()

    async def _follow_addresses(self, sync: SyncLoop) -> None:
        """Take note when the node's own addresses change. They matter where no Node object tells them."""
        backoff = Backoff(1.0, 30.0)
        while True:
            try:
                with NodeAddresses(excluding=_NOT_THE_NODES) as monitor:
                    backoff.reset()
                    self._take_addresses(monitor.current, sync)
                    async for news in monitor.changes():
                        if news.node_changed:
                            self._take_addresses(monitor.current, sync)
            except KernelError as error:
                _log.warning("cannot follow local addresses", error=str(error))
            await asyncio.sleep(backoff.next())

    def _take_addresses(self, found: Iterable[LocalAddress], sync: SyncLoop) -> None:
        addresses = _usable(address.address for address in found)
        if addresses != self._local_addresses:
            self._local_addresses = addresses
            self._tracker.facts = replace(self._tracker.facts, addresses=tuple(addresses))
            sync.request()

    def _make_programmer_config(self, mode: Mode) -> ProgrammerConfig:
        return programmer_config(self._config, mode, self._families, self._state.node)

    def _node_changed(self) -> None:
        """The Node object came, changed or went: some rules depend on its CIDRs and addresses."""
        node = self._state.node
        self._health.node_eligible = node is None or node.eligible
        fresh = self._make_programmer_config(self._mode)
        if fresh != self._programmer_config and self._programmer is not None:
            self._programmer_config = fresh
            self._programmer.configure(fresh)


def make_source(config: AgentConfig) -> Source:
    """The source that the configuration names. Raises `StartError`. Imports only what that source needs."""
    if config.manifests is not None:
        from nodeproxy.source.manifests import ManifestSource  # noqa: PLC0415

        return ManifestSource(config.manifests, config.node_name, config.service_proxy_name)
    from nodeproxy.source.apiserver.credentials import Credentials  # noqa: PLC0415
    from nodeproxy.source.apiserver.source import ApiServerSource  # noqa: PLC0415

    credentials = Credentials(config.kubeconfig, config.master)
    try:
        credentials.load()
    except SourceError as error:
        raise StartError(str(error)) from error
    return ApiServerSource(credentials, config.node_name, config.service_proxy_name)


def _node_addresses() -> list[str]:
    try:
        return _usable(local_addresses(excluding=_NOT_THE_NODES))
    except KernelError as error:
        _log.warning("cannot read local addresses", error=str(error))
        return []


def _usable(addresses: Iterable[str]) -> list[str]:
    """Sorted, and without loopback and link-local ones (those come and go with every pod)."""
    return sorted({address for address in addresses if not _is_loopback_or_link_local(address)})


def _is_loopback_or_link_local(text: str) -> bool:
    address = ipaddress.ip_address(text)
    return address.is_loopback or address.is_link_local
