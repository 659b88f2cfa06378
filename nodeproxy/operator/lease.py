"""Owns which replica acts: a Lease of coordination.k8s.io, held and renewed by one at a time.

As client-go's leader election: whoever sees the Lease unchanged for as long as it says takes it over; clocks of different
machines are never compared. Source: k8s.io/client-go/tools/leaderelection.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

import msgspec
import structlog

from nodeproxy.api.proxy_node import ApiObjectBase, ObjectMeta
from nodeproxy.operator.api import timestamp
from nodeproxy.operator.cluster import Cluster, decode
from nodeproxy.source.apiserver.connection import RequestError, StatusError
from nodeproxy.source.events import SourceError

_log = structlog.get_logger(__name__)

NAME: Final = "nodeproxy-operator"


class _Spec(ApiObjectBase, frozen=True):
    holder_identity: str | None = None
    lease_duration_seconds: int | None = None
    acquire_time: str | None = None
    renew_time: str | None = None
    lease_transitions: int | None = None


class _Lease(ApiObjectBase, frozen=True):
    metadata: ObjectMeta
    spec: _Spec = _Spec()

    def body(self) -> dict[str, Any]:
        """As it is sent."""
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", **msgspec.to_builtins(self)}


class LeaseLost(Exception):
    """Another replica acts, or the Lease could not be renewed in time."""


class Lease:
    """One replica's view of the Lease.

    `seconds`: after which an unrenewed Lease is taken over; the holder gives up after two thirds of it, tries each fifth.
    """

    def __init__(self, cluster: Cluster, namespace: str, identity: str, *, seconds: float = 15.0) -> None:
        self._cluster = cluster
        self._collection = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._namespace = namespace
        self._identity = identity
        self._seconds = seconds
        self._seen: tuple[str | None, str | None] | None = None
        self._seen_at = 0.0
        self._renewed_at = float("-inf")
        self.holder: str | None = None
        """Who has it, as last seen."""

    @property
    def held(self) -> bool:
        """Whether this replica may act: it renewed the Lease not long ago."""
        return time.monotonic() - self._renewed_at < self._seconds * 2 / 3

    async def acquire(self) -> None:
        """Wait until this replica has the Lease. Failures are logged, and it is tried again."""
        said: str | None = None
        while True:
            try:
                if await self._try():
                    return
                if self.holder != said:
                    said = self.holder
                    _log.info("another replica acts; waiting", holder=said)
            except (RequestError, SourceError) as error:
                _log.warning("cannot get the Lease; trying again", error=str(error))
            await asyncio.sleep(self._seconds / 5)

    async def keep(self) -> None:
        """Renew it again and again. Raises `LeaseLost`."""
        while True:
            await asyncio.sleep(self._seconds / 5)
            try:
                if not await self._try():
                    self._renewed_at = float("-inf")
                    raise LeaseLost(f"{self.holder} has the Lease")
            except (RequestError, SourceError) as error:
                _log.warning("cannot renew the Lease; trying again", error=str(error))
            if not self.held:
                raise LeaseLost("the Lease could not be renewed in time")

    async def release(self) -> None:
        """Let another replica act at once. Failures are no matter: the Lease runs out."""
        if not self.held:
            return
        self._renewed_at = float("-inf")
        try:
            lease = await self._get()
            if lease is not None and lease.spec.holder_identity == self._identity:
                spec = msgspec.structs.replace(lease.spec, holder_identity="", lease_duration_seconds=1)
                await self._put(lease, spec)
        except (RequestError, SourceError) as error:
            _log.info("the Lease is not released; it runs out", error=str(error))

    async def _try(self) -> bool:
        """Take or renew it, if it is ours to take. False: another one has it."""
        began = time.monotonic()
        lease = await self._get()
        now = timestamp(time.time())[:-1] + "000Z"  # the API wants microseconds
        fresh = _Spec(
            holder_identity=self._identity,
            lease_duration_seconds=max(1, round(self._seconds)),
            acquire_time=now,
            renew_time=now,
            lease_transitions=0,
        )
        try:
            if lease is None:
                meta = ObjectMeta(name=NAME)
                await self._cluster.send("POST", self._collection, _Lease(metadata=meta, spec=fresh).body())
            else:
                if not self._may_take(lease.spec):
                    return False
                mine = lease.spec.holder_identity == self._identity
                transitions = (lease.spec.lease_transitions or 0) + (not mine)
                acquired = lease.spec.acquire_time if mine else now
                spec = msgspec.structs.replace(fresh, acquire_time=acquired, lease_transitions=transitions)
                await self._put(lease, spec)
        except StatusError as error:
            if error.status == 409:  # another one was faster
                return False
            raise
        self.holder, self._renewed_at = self._identity, began
        return True

    def _may_take(self, spec: _Spec) -> bool:
        self.holder = spec.holder_identity or None
        if self.holder in (None, self._identity):
            return True
        seen = (spec.holder_identity, spec.renew_time)
        if seen != self._seen:
            self._seen, self._seen_at = seen, time.monotonic()
        return time.monotonic() - self._seen_at > (spec.lease_duration_seconds or self._seconds)

    async def _get(self) -> _Lease | None:
        raw = await self._cluster.get(f"{self._collection}/{NAME}")
        return None if raw is None else decode(raw, _Lease)

    async def _put(self, lease: _Lease, spec: _Spec) -> None:
        meta = ObjectMeta(name=NAME, resource_version=lease.metadata.resource_version)
        await self._cluster.send("PUT", f"{self._collection}/{NAME}", _Lease(metadata=meta, spec=spec).body())
