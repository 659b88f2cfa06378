"""Owns the operator as a whole: it waits for the Lease, then watches and makes passes until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

import structlog
from msgspec import Struct

from nodeproxy.agent.http import Routes, serving
from nodeproxy.agent.http_server import TEXT, Answer
from nodeproxy.operator.act import Actor
from nodeproxy.operator.cluster import Cluster, name_of
from nodeproxy.operator.lease import Lease, LeaseLost
from nodeproxy.operator.metrics import Metrics
from nodeproxy.operator.objects import Pod
from nodeproxy.operator.observe import Observer
from nodeproxy.operator.pod_probes import PodProber
from nodeproxy.operator.reconcile import Reconciler
from nodeproxy.source.apiserver.connection import RequestError
from nodeproxy.source.apiserver.credentials import Credentials, CredentialsError

_log = structlog.get_logger(__name__)
_METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class OperatorConfig(Struct, frozen=True, kw_only=True):
    """What an operator is told. `pod`: its own, of which it takes the image of pods it makes where `image` is not given.

    `interval`: seconds between passes while something is rolled out; `lease_seconds`: see `Lease`.
    """

    identity: str
    kubeconfig: Path | None = None
    master: str | None = None
    namespace: str = "kube-system"
    pod: str | None = None
    image: str | None = None
    http_address: str = "0.0.0.0:10258"
    interval: float = 1.0
    lease_seconds: float = 15.0


class OperatorError(Exception):
    """The operator cannot go on; one line says why."""


class Operator:
    """One replica."""

    def __init__(self, config: OperatorConfig) -> None:
        self._config = config
        self._image = config.image or ""
        self._stop = asyncio.Event()
        self._metrics = Metrics()

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT. Raises `OperatorError` where it cannot go on; the Lease is let go in any case."""
        self._take_signals()
        config = self._config
        cluster = Cluster(Credentials(config.kubeconfig, config.master))
        lease = Lease(cluster, config.namespace, config.identity, seconds=config.lease_seconds)
        routes: Routes = {
            "/healthz": lambda: Answer(200, TEXT, b"ok"),
            "/metrics": lambda: lambda: Answer(200, _METRICS_TYPE, self._metrics.text()),
        }
        try:
            await asyncio.to_thread(cluster.credentials.load)  # an API server that is away is waited for, these are not
        except CredentialsError as error:
            raise OperatorError(str(error)) from error
        _log.info("starting", identity=config.identity, namespace=config.namespace)
        async with serving("operator", config.http_address, routes):
            try:
                if await self._unless_stopped(lease.acquire()):
                    await self._lead(cluster, lease)
            except LeaseLost as error:
                # What was begun is in the status; another replica goes on, and this one starts anew.
                raise OperatorError(str(error)) from error
            finally:
                self._metrics.leader.set(0)
                await lease.release()
        _log.info("stopped")

    async def _lead(self, cluster: Cluster, lease: Lease) -> None:
        from nodeproxy.operator.watch import watch  # noqa: PLC0415 - kopf only in the replica that acts

        _log.info("this replica acts", identity=self._config.identity)
        self._metrics.leader.set(1)
        prober = PodProber(cluster, self._config.namespace, lambda: self._image)
        observer = Observer(cluster, prober, self._config.namespace)
        actor = Actor(cluster, prober, self._config.namespace, self._config.identity, lambda: self._image)
        reconciler = Reconciler(cluster, observer, actor, lease, self._metrics, interval=self._config.interval)
        ready = asyncio.Event()
        tasks = [
            asyncio.create_task(watch(cluster, reconciler.wake, ready), name="watch"),
            asyncio.create_task(lease.keep(), name="lease"),
            asyncio.create_task(self._reconcile(reconciler, cluster), name="reconcile"),
            asyncio.create_task(self._stop.wait(), name="stop"),
            asyncio.create_task(self._signals_after(ready), name="signals"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                error = task.exception()
                if isinstance(error, LeaseLost | OperatorError) or error is None:
                    task.result()
                else:  # a fault of ours, or kopf's: the kubelet starts the operator anew, and what was begun goes on
                    _log.error("a task has failed", task=task.get_name(), exc_info=error)
                    raise OperatorError(f"{task.get_name()}: {type(error).__name__}: {error}") from error
        finally:
            for task in tasks:
                task.cancel()
            # Of a pass that is cancelled one request at most is under way: another replica need not wait for kopf's end.
            await asyncio.gather(*tasks[1:], return_exceptions=True)
            await lease.release()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _signals_after(self, ready: asyncio.Event) -> None:
        """Take back the signals that kopf has taken: ending is ours."""
        await ready.wait()
        self._take_signals()
        await asyncio.Event().wait()

    async def _reconcile(self, reconciler: Reconciler, cluster: Cluster) -> None:
        await self._find_image(cluster)
        await reconciler.run()

    async def _find_image(self, cluster: Cluster) -> None:
        """The image of this pod is that of the pods it makes."""
        config = self._config
        while not self._image and config.pod is not None:
            try:
                pod = await cluster.get_as(f"/api/v1/namespaces/{config.namespace}/pods/{name_of(config.pod)}", Pod)
            except RequestError as error:
                _log.warning("cannot read this pod; trying again", error=str(error))
                await asyncio.sleep(2.0)
                continue
            if pod is None:
                raise OperatorError(f"--pod: there is no pod {config.pod} in namespace {config.namespace}")
            self._image = pod.seen().image

    async def _unless_stopped(self, waiting: Coroutine[Any, Any, None]) -> bool:
        """Wait for it. False: told to stop meanwhile."""
        task = asyncio.create_task(waiting)
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
                return True
            return False
        finally:
            task.cancel()
            stopped.cancel()
            await asyncio.gather(task, stopped, return_exceptions=True)

    def _take_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for one in (signal.SIGTERM, signal.SIGINT):
            try:
                loop.add_signal_handler(one, self._stop.set)
            except (RuntimeError, ValueError):
                return  # not in the main thread
