"""Owns the wiring of one agent: which source, which programmer, what serves beside them, and how it starts and stops."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import signal
from collections.abc import Sequence

import structlog
from msgspec.structs import replace

from nodeproxy.agent.backoff import Backoff
from nodeproxy.agent.config import AgentConfig, Mode
from nodeproxy.agent.health import Health
from nodeproxy.agent.http import health_routes, metrics_routes, serving
from nodeproxy.agent.metrics import Metrics
from nodeproxy.agent.node import available_families, programmer_config
from nodeproxy.agent.sync import SyncLoop
from nodeproxy.agent.system import apply_settings
from nodeproxy.cluster.state import ClusterState
from nodeproxy.forwarding.node import NodeFacts
from nodeproxy.forwarding.table import Family
from nodeproxy.forwarding.tracker import ForwardingTracker
from nodeproxy.kernel.addresses import AddressMonitor, local_addresses
from nodeproxy.kernel.errors import KernelError
from nodeproxy.kernel.variant import detect_variant
from nodeproxy.kernel.xtables_tools import Variant
from nodeproxy.programmer.base import DetectLocalMode, ProgrammerConfig, ProgrammingError
from nodeproxy.programmer.iptables.programmer import IptablesProgrammer
from nodeproxy.source.events import Source, SourceError

_log = structlog.get_logger(__name__)

_COLLECTOR_HELD_SECONDS = 60.0


class StartError(Exception):
    """The agent cannot start; the message is one line that says what is missing and what to do."""


class Agent:
    """One agent on one node."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._metrics = Metrics()
        self._health = Health(config.sync_period)
        self._families: Sequence[Family] = available_families()
        self._local_addresses = _node_addresses()
        self._state = ClusterState(config.node_name)
        facts = NodeFacts(
            name=config.node_name,
            families=tuple(self._families),
            addresses=tuple(self._local_addresses),
            masquerade_all=config.masquerade_all,
        )
        self._programmer_config = self._make_programmer_config()
        self._programmer = _make_programmer(config, self._programmer_config)
        self._tracker = ForwardingTracker(facts)
        self._loop = SyncLoop(
            state=self._state,
            tracker=self._tracker,
            programmer=self._programmer,
            health=self._health,
            metrics=self._metrics,
            min_sync_period=config.min_sync_period,
            on_node_change=self._node_changed,
        )

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT. Rules stay in place. Raises `StartError` where it cannot start."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        source = make_source(self._config)
        try:
            await self._programmer.prepare()
        except ProgrammingError as error:
            raise StartError(str(error)) from error
        await asyncio.to_thread(apply_settings, self._config, self._programmer_config)
        if self._config.detect_local_mode is DetectLocalMode.CLUSTER_CIDR and not self._config.cluster_cidrs:
            _log.warning("no --cluster-cidr: traffic of local pods cannot be told apart, cluster IPs are not masqueraded")
        health = health_routes(self._health, self._metrics)
        metrics = metrics_routes(self._metrics, self._config.mode)
        async with (
            serving("healthz", self._config.healthz_bind_address, health),
            serving("metrics", self._config.metrics_bind_address, metrics),
        ):
            await self._until(stop, source)
        _log.info("stopped; rules stay in place")

    async def _until(self, stop: asyncio.Event, source: Source) -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(work)
                for work in (self._loop.run(), self._run_source(source), self._follow_addresses(), self._hold_collector())
            ]
            await stop.wait()
            for task in tasks:
                task.cancel()

    async def _run_source(self, source: Source) -> None:
        """Keep the source going: one that ends or fails is started again, and what is programmed stays."""
        backoff = Backoff(1.0, 30.0)
        while True:
            try:
                await source.run(self._loop.deliver)
            except (SourceError, OSError) as error:
                _log.error("source failed", error=str(error))
            await asyncio.sleep(backoff.next())

    async def _hold_collector(self) -> None:
        """Until the first sync there is no garbage, only state: collecting would cost a fifth of the time to get there."""
        gc.disable()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._loop.first_sync.wait(), _COLLECTOR_HELD_SECONDS)
        gc.freeze()
        gc.enable()

    async def _follow_addresses(self) -> None:
        """Take note when the node's own addresses change. They matter where no Node object tells them."""
        with AddressMonitor() as monitor:
            async for _ in monitor.changes():
                addresses = _node_addresses()
                if addresses != self._local_addresses:
                    self._local_addresses = addresses
                    self._tracker.facts = replace(self._tracker.facts, addresses=tuple(addresses))
                    self._loop.request()

    def _make_programmer_config(self) -> ProgrammerConfig:
        return programmer_config(self._config, self._families, self._state.node)

    def _node_changed(self) -> None:
        """The Node object came, changed or went: some rules depend on its CIDRs and addresses."""
        node = self._state.node
        self._health.node_eligible = node is None or node.eligible
        fresh = self._make_programmer_config()
        if fresh != self._programmer_config:
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


def _make_programmer(config: AgentConfig, programmer: ProgrammerConfig) -> IptablesProgrammer:
    if config.mode is Mode.IPVS:
        raise StartError("--mode ipvs is not available in this version of nodeproxy: use --mode iptables")
    return IptablesProgrammer(programmer, choose_variant(config))


def choose_variant(config: AgentConfig) -> Variant:
    """The variant of iptables to program, as told or as found on the node. Raises `StartError`."""
    if config.iptables_variant is not None:
        return Variant(config.iptables_variant)
    try:
        variant, reason = detect_variant()
    except KernelError as error:
        raise StartError(str(error)) from error
    _log.info("iptables variant", variant=str(variant), reason=reason)
    return variant


def _node_addresses() -> list[str]:
    """Addresses of the node's interfaces, but loopback and link-local ones (those come and go with every pod)."""
    try:
        return [address for address in local_addresses() if not _is_loopback_or_link_local(address)]
    except KernelError as error:
        _log.warning("cannot read local addresses", error=str(error))
        return []


def _is_loopback_or_link_local(text: str) -> bool:
    address = ipaddress.ip_address(text)
    return address.is_loopback or address.is_link_local
