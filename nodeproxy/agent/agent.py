"""Owns the wiring of one agent: which source, which programmer, what serves beside them, and how it starts and stops."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path

import msgspec
import structlog
from msgspec.structs import replace

from nodeproxy.agent.backoff import Backoff
from nodeproxy.agent.events import (
    ANOTHER_PROXY_RUNS,
    CONFIG_REFUSED,
    FELL_BACK,
    HEALTHZ_FAILED,
    METRICS_FAILED,
    MODE_SWITCH_FAILED,
    MODE_SWITCHED,
    STARTING,
)
from nodeproxy.agent.health import Health
from nodeproxy.agent.http import Routes, health_routes, metrics_routes, serving
from nodeproxy.agent.local_socket import answering
from nodeproxy.agent.metrics import Metrics
from nodeproxy.agent.modes import Modes
from nodeproxy.agent.node import NOT_THE_NODES, available_families, own_addresses, usable_addresses
from nodeproxy.agent.node_claim import NodeClaim
from nodeproxy.agent.observers import Observers
from nodeproxy.agent.other_proxies import AnotherProxyRuns, wait_until_alone
from nodeproxy.agent.outside import Outside, StartError, reach_outside
from nodeproxy.agent.record import Record
from nodeproxy.agent.reload import follow
from nodeproxy.agent.reporter import Reporter
from nodeproxy.agent.sync import SyncLoop
from nodeproxy.agent.system import apply_settings
from nodeproxy.agent.waiting import wait_at_most
from nodeproxy.api.proxy_node import ProxyNodeSpec
from nodeproxy.cluster.state import ClusterState
from nodeproxy.configuration.agent_config import AgentConfig, ConfigError
from nodeproxy.configuration.changes import restart_needed, with_fixed_part
from nodeproxy.configuration.effective import as_document
from nodeproxy.configuration.overlay import overlaid
from nodeproxy.configuration.watch import process_start, watch_file
from nodeproxy.forwarding.node import NodeFacts
from nodeproxy.forwarding.table import Family
from nodeproxy.forwarding.tracker import ForwardingTracker
from nodeproxy.kernel.addresses import LocalAddress, NodeAddresses
from nodeproxy.kernel.errors import KernelError
from nodeproxy.programmer.base import DetectLocalMode, ProgrammingError
from nodeproxy.source.apiserver.connection import RequestError
from nodeproxy.source.events import Source, SourceError

_log = structlog.get_logger(__name__)

_COLLECTOR_HELD_SECONDS = 60.0
_TOLD_BEFORE_SECONDS = 5.0


class Agent:
    """One agent on one node. `reload` reads the configuration again (it raises `ConfigError`), from `config_path` if any."""

    def __init__(
        self, config: AgentConfig, reload: Callable[[], AgentConfig] | None = None, config_path: Path | None = None
    ) -> None:
        self._own = config  # what `_config`, which is in force, is without what the ProxyNode says
        self._config = config
        self._spec = ProxyNodeSpec()
        self._configuring = asyncio.Lock()
        self._reload = reload
        self._config_path = config_path
        self._reload_asked = asyncio.Event()
        self._config_changed = asyncio.Event()
        self._families: Sequence[Family] = available_families()
        self._metrics = Metrics(self._families)
        self._health = Health(config.sync_period_of(config.mode))
        self._local_addresses = own_addresses()
        self._state = ClusterState(config.node_name)
        self._modes = Modes(config, self._families, lambda: self._state.node)
        facts = NodeFacts(
            name=config.node_name,
            families=tuple(self._families),
            addresses=tuple(self._local_addresses),
            masquerade_all=config.masquerade_all,
        )
        self._tracker = ForwardingTracker(facts)
        self._record = Record()
        self._sync: SyncLoop | None = None

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT. What is programmed stays in place. Raises `StartError` where it cannot start."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload_asked.set)
        outside = reach_outside(self._config, self._metrics, self._record)
        self._events = outside.events
        async with answering(self._make_reporter().routes()):
            with NodeClaim() as claim:
                if await self._may_program(claim, stop, outside):
                    await self._start(await self._told_before(outside))
                    self._sync = self._make_sync_loop()
                    await self._until(stop, outside, self._sync)
        _log.info("stopped; what is programmed stays in place")

    async def _may_program(self, claim: NodeClaim, stop: asyncio.Event, outside: Outside) -> bool:
        """Wait until no other proxy runs here, or do as else told. False where the agent is stopped meanwhile."""
        ports = (self._config.healthz_bind_address, self._config.metrics_bind_address)
        alone = wait_until_alone(self._config.while_another_runs, claim, ports, tell=self._say_another_runs)
        waiting = asyncio.create_task(alone)
        stopping = asyncio.create_task(stop.wait())
        telling = asyncio.create_task(outside.write_events())
        try:
            await asyncio.wait((waiting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                return False
            await waiting
        except AnotherProxyRuns as error:
            raise StartError(str(error)) from error
        finally:
            for task in (waiting, stopping, telling):
                task.cancel()
        self._record.waiting_for = None
        return True

    def _say_another_runs(self, note: str) -> None:
        self._record.waiting_for = note
        self._events.node(ANOTHER_PROXY_RUNS, note, warning=True)

    async def _told_before(self, outside: Outside) -> ProxyNodeSpec:
        """What the ProxyNode says already, if that can be had at once: else the agent would begin with another mode."""
        if outside.proxy_nodes is None:
            return ProxyNodeSpec()
        try:
            async with asyncio.timeout(_TOLD_BEFORE_SECONDS):
                found = await outside.proxy_nodes.look()
        except (TimeoutError, SourceError, OSError, RequestError) as error:
            _log.info("the ProxyNode is not known yet", error=str(error))
            return ProxyNodeSpec()
        return found.spec if found is not None else ProxyNodeSpec()

    async def _start(self, spec: ProxyNodeSpec) -> None:
        """Make ready what programs the kernel: as the spec says if that can be, else as this agent's own configuration."""
        try:
            try:
                await self._prepare(spec)
            except (ConfigError, ProgrammingError) as error:
                if spec == ProxyNodeSpec():
                    raise
                _log.warning("not started as the ProxyNode says, but by the agent's own configuration", reason=str(error))
                await self._prepare(ProxyNodeSpec())
        except ProgrammingError as error:
            raise StartError(str(error)) from error
        if self._modes.mode is not self._config.mode:
            self._events.node(
                FELL_BACK, f"{self._config.mode} mode cannot be had on this node: {self._modes.mode} mode serves"
            )
        self._metrics.set_mode(str(self._modes.mode))
        self._metrics.draining_real_servers.set_function(lambda: self._modes.draining)
        await asyncio.to_thread(apply_settings, self._config, self._modes.in_force)
        if self._config.detect_local_mode is DetectLocalMode.CLUSTER_CIDR and not self._config.cluster_cidrs:
            _log.warning("no --cluster-cidr: traffic of local pods cannot be told apart, cluster IPs are not masqueraded")
        self._observers = Observers(
            self._config, self._modes.in_force, health=self._health, metrics=self._metrics, events=self._events
        )

    async def _prepare(self, spec: ProxyNodeSpec) -> None:
        config = overlaid(self._own, spec).config
        await self._modes.start(config)
        self._spec = spec
        self._take(config)

    def _make_sync_loop(self) -> SyncLoop:
        return SyncLoop(
            state=self._state,
            tracker=self._tracker,
            programmer=self._modes.programmer,
            health=self._health,
            metrics=self._metrics,
            min_sync_period=self._config.min_sync_period_of(self._modes.mode),
            on_node_change=self._node_changed,
            events=self._events,
            observers=self._observers.all,
            record=self._record,
        )

    def _make_reporter(self) -> Reporter:
        return Reporter(
            config=lambda: self._config,
            sync=lambda: self._sync,
            modes=self._modes,
            state=self._state,
            tracker=self._tracker,
            health=self._health,
            record=self._record,
            addresses=lambda: self._local_addresses,
        )

    async def _until(self, stop: asyncio.Event, outside: Outside, sync: SyncLoop) -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(work)
                for work in (
                    *self._serving(),
                    sync.run(),
                    self._run_source(outside.source, sync),
                    outside.write_events(),
                    self._observers.run(),
                    self._follow_addresses(sync),
                    self._hold_collector(sync),
                    self._say_started(sync),
                    self._modes.clear_up(sync),
                    *self._reloading(sync),
                    *self._following(outside, sync),
                )
            ]
            await stop.wait()
            for task in tasks:
                task.cancel()

    def _serving(self) -> Iterator[Coroutine[None, None, None]]:
        """What answers on the two HTTP addresses."""
        health = health_routes(self._health, self._metrics)
        metrics = metrics_routes(
            self._metrics, lambda: str(self._modes.mode), lambda: msgspec.json.encode(as_document(self._config))
        )
        yield self._serve("healthz", lambda config: config.healthz_bind_address, health, HEALTHZ_FAILED)
        yield self._serve("metrics", lambda config: config.metrics_bind_address, metrics, METRICS_FAILED)

    async def _serve(self, name: str, address_of: Callable[[AgentConfig], str], routes: Routes, failure: str) -> None:
        """Serve routes where the configuration says, also after that changes."""
        while True:
            address = address_of(self._config)
            async with serving(name, address, routes, failed=lambda note: self._events.node(failure, note, warning=True)):
                while address_of(self._config) == address:
                    await self._config_changed.wait()

    def _reloading(self, sync: SyncLoop) -> Iterator[Coroutine[None, None, None]]:
        """What keeps the configuration current, where there is something to read it from."""
        if self._reload is not None:
            yield follow(self._read_again, self._reload_asked, lambda own: self._configure(own, sync), self._note_reload)
            if self._config_path is not None:
                yield self._watch(self._config_path)

    def _following(self, outside: Outside, sync: SyncLoop) -> Iterator[Coroutine[None, None, None]]:
        """What does as the roll-out operator says, where there can be one."""
        if outside.proxy_nodes is not None:
            from nodeproxy.agent.proxy_node import ProxyNodeFollower  # noqa: PLC0415 - not with manifests

            yield ProxyNodeFollower(
                outside.proxy_nodes,
                sync,
                self._metrics,
                obey=lambda spec: self._obey(spec, sync),
                mode=lambda: str(self._modes.mode),
            ).run()

    def _read_again(self) -> AgentConfig:
        """Read the configuration. In a thread. Raises `ConfigError`."""
        assert self._reload is not None
        try:
            return self._reload()
        except ConfigError as error:
            for complaint in error.complaints:
                self._record.trouble("config", complaint)
            raise

    async def _watch(self, path: Path) -> None:
        async for _ in watch_file(path, since=process_start()):
            self._reload_asked.set()

    async def _configure(self, own: AgentConfig, sync: SyncLoop) -> bool:
        """The agent's own configuration changed: put it into force, with what the ProxyNode says. False: that cannot be."""
        async with self._configuring:
            try:
                config = overlaid(own, self._spec).config
            except ConfigError as error:
                _log.error(
                    "the configuration does not go with what the ProxyNode says; the one in force stays", reason=str(error)
                )
                return False
            if await self._apply(config, sync):
                return False
            self._own = with_fixed_part(own, self._own)
            return True

    async def _obey(self, spec: ProxyNodeSpec, sync: SyncLoop) -> str:
        """Put what the ProxyNode says into force. Why that cannot be, "" where it is."""
        async with self._configuring:
            try:
                made = overlaid(self._own, spec)
            except ConfigError as error:
                return "; ".join(error.complaints)
            if why_not := await self._apply(made.config, sync):
                return why_not
            self._spec = spec
            return made.remark

    async def _apply(self, config: AgentConfig, sync: SyncLoop) -> str:
        """Put a changed configuration into force while the agent runs. Why that cannot be, "" where it is."""
        before = self._config
        if waiting := restart_needed(before, config):
            _log.warning("changed, but not in force before a restart", settings=waiting)
        config = with_fixed_part(config, before)
        if config == before:
            return ""
        if why_not := await self._change_mode(config, sync):
            return why_not
        self._take(config)
        await asyncio.to_thread(apply_settings, config, self._modes.in_force)
        self._observers.configure(config, self._modes.in_force)
        sync.request()
        self._config_changed.set()
        self._config_changed = asyncio.Event()
        _log.info("configuration applied", mode=str(self._modes.mode))
        return ""

    def _take(self, config: AgentConfig) -> None:
        """This configuration is in force."""
        self._config = config
        self._health.change_sync_period(config.sync_period_of(self._modes.mode))
        self._tracker.facts = replace(self._tracker.facts, masquerade_all=config.masquerade_all)

    async def _change_mode(self, config: AgentConfig, sync: SyncLoop) -> str:
        """Why that cannot be, "" where it is."""
        before, switches = self._modes.mode, self._metrics.mode_switches
        try:
            await self._modes.change(config, sync)
        except ProgrammingError as error:
            _log.error("configuration not applied; the one in force stays", mode=str(before), error=str(error))
            switches.labels(to=str(config.mode), result="failed").inc()
            self._record.trouble("mode", f"switch to {config.mode} failed; {before} goes on: {error}")
            self._events.node(MODE_SWITCH_FAILED, f"to {config.mode}; {before} goes on: {error}", warning=True)
            return str(error)
        if self._modes.mode is not before:
            _log.info("mode switched", before=str(before), mode=str(self._modes.mode))
            switches.labels(to=str(self._modes.mode), result="done").inc()
            self._metrics.set_mode(str(self._modes.mode))
            self._events.node(MODE_SWITCHED, f"from {before} to {self._modes.mode}")
        return ""

    def _note_reload(self, worked: bool) -> None:
        self._metrics.config_reloads.labels(result="applied" if worked else "refused").inc()
        if not worked:
            self._events.node(CONFIG_REFUSED, "the changed configuration is not applied: see the agent's log", warning=True)

    async def _run_source(self, source: Source, sync: SyncLoop) -> None:
        """Keep the source going: one that ends or fails is started again, and what is programmed stays."""
        backoff = Backoff(1.0, 30.0)
        while True:
            try:
                await source.run(sync.deliver)
            except (SourceError, OSError) as error:
                _log.error("source failed", error=str(error))
                self._record.trouble("source", str(error))
            await asyncio.sleep(backoff.next())

    async def _hold_collector(self, sync: SyncLoop) -> None:
        """Until the first sync there is no garbage, only state: collecting would cost a fifth of the time to get there."""
        gc.disable()
        await wait_at_most(sync.first_sync, _COLLECTOR_HELD_SECONDS)
        gc.freeze()
        gc.enable()

    async def _say_started(self, sync: SyncLoop) -> None:
        await sync.first_sync.wait()
        self._events.node(STARTING, "")

    async def _follow_addresses(self, sync: SyncLoop) -> None:
        """Take note when the node's own addresses change. They matter where no Node object tells them."""
        backoff = Backoff(1.0, 30.0)
        while True:
            try:
                with NodeAddresses(excluding=NOT_THE_NODES) as monitor:
                    backoff.reset()
                    self._take_addresses(tuple(monitor.current), sync)
                    async for news in monitor.changes():
                        if news.node_changed:
                            self._take_addresses(tuple(monitor.current), sync)
            except KernelError as error:
                _log.warning("cannot follow local addresses", error=str(error))
            await asyncio.sleep(backoff.next())

    def _take_addresses(self, found: Sequence[LocalAddress], sync: SyncLoop) -> None:
        self._observers.take_addresses(found)
        addresses = usable_addresses(address.address for address in found)
        if addresses != self._local_addresses:
            self._local_addresses = addresses
            self._tracker.facts = replace(self._tracker.facts, addresses=tuple(addresses))
            sync.request()

    def _node_changed(self) -> None:
        """The Node object came, changed or went: some rules depend on its CIDRs and addresses."""
        node = self._state.node
        self._health.node_eligible = node is None or node.eligible
        if self._modes.refresh():
            self._observers.configure(self._config, self._modes.in_force)
