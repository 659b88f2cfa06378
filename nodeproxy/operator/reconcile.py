"""Owns passes over all roll-outs: observe, plan, write the status, act."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

import msgspec
import structlog
from msgspec import Struct

from nodeproxy.agent.backoff import Backoff
from nodeproxy.operator.act import Actor
from nodeproxy.operator.api import FINALIZER, PROXY_ROLLOUTS, ProxyRollout, RolloutStatus
from nodeproxy.operator.cluster import Cluster, name_of
from nodeproxy.operator.lease import Lease
from nodeproxy.operator.limits import shortened
from nodeproxy.operator.metrics import Metrics
from nodeproxy.operator.observe import Common, Observer
from nodeproxy.operator.plan import plan
from nodeproxy.operator.world import Action, Tell
from nodeproxy.source.apiserver.connection import RequestError, StatusError
from nodeproxy.source.events import SourceError

_log = structlog.get_logger(__name__)
IDLE_SECONDS: Final = 30.0
"""Between passes while nothing is rolled out and nothing is heard of."""
_FAILED_SECONDS: Final = 1.0
"""Between passes at least, after one that failed."""


class _Item(Struct):
    """A roll-out as it was read: the whole of it is sent back with another status."""

    raw: dict[str, Any]
    rollout: ProxyRollout

    @property
    def name(self) -> str:
        """Its name."""
        return self.rollout.metadata.name

    @property
    def at_rest(self) -> bool:
        """Whether it is finished, and nothing of it is left to clear away."""
        return self.rollout.finished and FINALIZER not in (self.rollout.metadata.finalizers or [])


class Reconciler:
    """Passes over all roll-outs, one at a time, while this replica has the Lease."""

    def __init__(
        self, cluster: Cluster, observer: Observer, actor: Actor, lease: Lease, metrics: Metrics, *, interval: float
    ) -> None:
        self._cluster = cluster
        self._observer = observer
        self._actor = actor
        self._lease = lease
        self._metrics = metrics
        self._interval = interval
        self._wake = asyncio.Event()
        self._unreadable: set[str] = set()
        self._troubles: dict[str, str] = {}

    def wake(self) -> None:
        """Something has changed: a pass is due."""
        self._wake.set()

    async def run(self) -> None:
        """Pass after pass, until cancelled."""
        backoff = Backoff(1.0, 30.0)
        while True:
            self._wake.clear()
            pause = min(self._interval / 4, 0.2)  # changes that come together are one pass
            try:
                active = await self.once()
                backoff.reset()
                self._metrics.passes.labels(result="ok").inc()
                delay = self._interval if active else IDLE_SECONDS
            except (RequestError, SourceError) as error:
                delay, pause = backoff.next(), _FAILED_SECONDS
                self._metrics.passes.labels(result="failed").inc()
                _log.warning("cannot look at the roll-outs; trying again", error=str(error))
            await asyncio.sleep(pause)
            try:
                async with asyncio.timeout(delay):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def once(self) -> bool:
        """One pass. Whether a roll-out is under way, or its remains are. Raises `RequestError` or `CredentialsError`."""
        items = await self._read()
        self._metrics.rollouts(item.rollout for item in items)
        due = [item for item in items if not item.at_rest]
        if not due:
            return False
        common = await self._observer.common()
        for id, seen in common.probes.items():
            self._metrics.probes(id, seen)
        self._metrics.forget_probes(common.probes)
        for item in due:
            await self._reconcile_apart(item, items, common)
        self._metrics.rollouts(item.rollout for item in items)
        return True

    async def _read(self) -> list[_Item]:
        """All roll-outs, the oldest first: it is the younger one that is refused where two overlap."""
        items = []
        for raw in await self._cluster.list_raw(PROXY_ROLLOUTS):
            try:
                items.append(_Item(msgspec.json.decode(raw), msgspec.json.decode(raw, type=ProxyRollout)))
            except msgspec.DecodeError as error:
                text = str(error)
                if text not in self._unreadable:
                    self._unreadable.add(text)
                    _log.warning("a ProxyRollout is not of the form that its definition demands", error=text)
        items.sort(key=lambda item: (item.rollout.metadata.creation_timestamp or "", item.rollout.metadata.name))
        return items

    async def _reconcile_apart(self, item: _Item, items: list[_Item], common: Common) -> None:
        """One roll-out; what is wrong with it stops no other one. Raises `CredentialsError`."""
        try:
            await self._reconcile(item, items, common)
            self._troubles.pop(item.name, None)
        except SourceError:
            raise  # nothing can be asked, whichever roll-out it is about
        except Exception as error:  # a fault of ours, too: the others go on
            if isinstance(error, StatusError) and error.status in (404, 409):
                _log.debug("changed meanwhile; looking again", rollout=item.name)
                return
            fault = not isinstance(error, RequestError)
            self._metrics.failures.labels(kind="fault" if fault else "request").inc()
            text = f"{type(error).__name__}: {error}" if fault else str(error)
            if self._troubles.get(item.name) != text:
                self._troubles[item.name] = text
                say = _log.error if fault else _log.warning
                say("a roll-out does not come forward; trying again", rollout=item.name, error=text, exc_info=fault)

    async def _reconcile(self, item: _Item, items: list[_Item], common: Common) -> None:
        rollout = item.rollout
        others = [one.rollout for one in items if one is not item and one.rollout.status.nodes and not one.rollout.finished]
        world = await self._observer.world(rollout, others, common)
        if not self._lease.held:
            return
        result = plan(rollout, world, time.time())
        status = shortened(result.status)
        if msgspec.to_builtins(status) != msgspec.to_builtins(rollout.status):
            await self._write(item, status)
        for action in result.actions:
            if not self._lease.held:
                return
            self._observer.forget()  # whatever comes of it
            await self._act(action, item.rollout)

    async def _write(self, item: _Item, status: RolloutStatus) -> None:
        """Write the status, if the roll-out has not changed meanwhile. Raises `StatusError` 409 then."""
        old = item.rollout
        body = {**item.raw, "status": msgspec.to_builtins(status)}
        path = f"{PROXY_ROLLOUTS}/{name_of(old.metadata.name)}/status"
        meta = await self._cluster.send("PUT", path, body)
        body["metadata"] = {**item.raw["metadata"], "resourceVersion": meta.resource_version}
        item.raw, item.rollout = body, msgspec.structs.replace(old, metadata=meta, status=status)
        self._metrics.changed(old.status, item.rollout.status)
        new = item.rollout.status
        if (old.status.phase, old.status.step) != (new.phase, new.step):
            _log.info("roll-out", name=old.metadata.name, phase=new.phase, step=new.step_text, message=new.message)
        phases = {line.name: line.phase for line in old.status.nodes}
        for line in new.nodes:
            if phases.get(line.name, line.phase) is not line.phase:
                _log.info("node", rollout=old.metadata.name, node=line.name, phase=line.phase.value, reason=line.reason)

    async def _act(self, action: Action, rollout: ProxyRollout) -> None:
        kind = type(action).__name__
        try:
            await self._actor.carry_out(action, rollout)
        except RequestError as error:
            self._metrics.actions.labels(action=kind, result="failed").inc()
            text = "an Event is lost" if isinstance(action, Tell) else "an action failed; trying again"
            _log.warning(text, rollout=rollout.metadata.name, action=str(action), error=str(error))
            return
        self._metrics.actions.labels(action=kind, result="ok").inc()
        if not isinstance(action, Tell):
            _log.debug("done", rollout=rollout.metadata.name, action=str(action))
