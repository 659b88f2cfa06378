"""Owns which conntrack entries are stale after a change: UDP flows to a frontend whose backend is gone, or that had none.

Conntrack keeps a UDP flow on its old path as long as packets come: a client that keeps its source port would talk into the
void. TCP flows are left alone: they end by themselves, and established ones must survive (SPEC section 3).

An answer that the former backend sends late, when the entry is gone, makes one the other way round, from the backend to the
client. Where IPVS still knows the connection, it has the frontend in it, and the client's packets follow it to the backend
that is gone. So former backends are looked for once more, for some seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable

import structlog
from msgspec import Struct, field

from nodeproxy.forwarding.table import (
    Action,
    Delta,
    Family,
    ForwardingTable,
    FrontendKind,
    IPProtocol,
    RowChange,
    ServicePort,
)
from nodeproxy.kernel.addresses import local_addresses
from nodeproxy.kernel.conntrack import UDP, Flow, delete, dump
from nodeproxy.kernel.errors import KernelError
from nodeproxy.programmer.base import StaleFlowCount
from nodeproxy.programmer.ipvs.names import DEVICE

_log = structlog.get_logger(__name__)

_LATE_SECONDS = 4.0

Endpoints = frozenset[tuple[str, int]]


class Scope(Struct):
    """UDP frontends whose flows may be stale, each with the endpoints that flows to it may go to. For one family."""

    frontends: dict[tuple[str, int], Endpoints] = field(default_factory=dict)
    node_ports: dict[int, Endpoints] = field(default_factory=dict)
    former: set[tuple[str, int]] = field(default_factory=set)
    """Endpoints that were backends, and are not any more."""

    def __bool__(self) -> bool:
        return bool(self.frontends or self.node_ports)

    def add(self, row: ServicePort, serves: bool) -> None:
        """Add the frontends of a row. With `serves` false the row is gone, and no flow to it is right."""
        for frontend in row.frontends:
            forwards = serves and (frontend.action is Action.FORWARD or frontend.short_cuts)
            allowed = frozenset((backend.address, backend.port) for backend in row.all_backends) if forwards else frozenset()
            if frontend.kind is FrontendKind.NODE_PORT:
                self.node_ports[frontend.port] = allowed
            elif frontend.address is not None:
                self.frontends[frontend.address, frontend.port] = allowed

    def is_stale(self, flow: Flow, local: frozenset[str]) -> bool:
        """Whether a flow goes to one of the frontends, but not to an endpoint that it may go to."""
        allowed = self.frontends.get((flow.destination, flow.destination_port))
        if allowed is None and flow.destination in local:
            allowed = self.node_ports.get(flow.destination_port)
        if allowed is not None:
            return (flow.reply_source, flow.reply_source_port) not in allowed
        return (flow.source, flow.source_port) in self.former and (
            (flow.reply_destination, flow.reply_destination_port) in self.frontends
            or (flow.reply_destination_port in self.node_ports and flow.reply_destination in local)
        )


class StaleFlows:
    """Deletes stale UDP flows from conntrack."""

    def __init__(self) -> None:
        self._late: list[tuple[float, Family, Scope]] = []

    async def look_again(self) -> None:
        """Delete flows that late answers of former backends made. Costs nothing but for seconds after a backend went."""
        self._late = [late for late in self._late if late[0] > time.monotonic()]
        for _, family, scope in self._late:
            with contextlib.suppress(KernelError):
                if deleted := await asyncio.to_thread(_remove, family, scope):
                    _log.info("stale UDP flows deleted", flows=deleted, family=int(family), late=True)

    async def remove(self, table: ForwardingTable, delta: Delta, everything: bool) -> dict[Family, StaleFlowCount]:
        """Delete flows that `delta` made stale (or any that are, with `everything`). Never raises.

        Returns how many, for families that were looked at.
        """
        removed: dict[Family, StaleFlowCount] = {}
        for family in Family:
            scope = scope_of_table(table, family) if everything else scope_of_delta(table, delta, family)
            if not scope:
                continue
            start = time.monotonic()
            try:
                deleted = await asyncio.to_thread(_remove, family, scope)
            except KernelError as error:
                _log.error("stale UDP flows not deleted", family=int(family), error=str(error))
                continue
            if scope.former:
                self._late.append((time.monotonic() + _LATE_SECONDS, family, scope))
            removed[family] = StaleFlowCount(deleted, time.monotonic() - start)
            if deleted:
                _log.info("stale UDP flows deleted", flows=deleted, family=int(family))
        return removed


def scope_of_table(table: ForwardingTable, family: Family) -> Scope:
    """Every UDP frontend of the table."""
    scope = Scope()
    for key, row in table.rows.items():
        if key.protocol is IPProtocol.UDP and key.family is family:
            scope.add(row, serves=True)
    return scope


def scope_of_delta(table: ForwardingTable, delta: Delta, family: Family) -> Scope:
    """Frontends of UDP rows that lost a backend or a frontend, or got their first backend."""
    scope = Scope()
    changed = [
        (key, change)
        for key, change in delta.rows.items()
        if key.protocol is IPProtocol.UDP and key.family is family and _may_leave_stale_flows(change)
    ]
    for _, change in changed:
        if change.before is not None:
            scope.add(change.before, serves=False)
            scope.former |= _endpoints(change.before) - _endpoints(change.after)
    for key, _ in changed:
        if (row := table.rows.get(key)) is not None:
            scope.add(row, serves=True)
    return scope


def _may_leave_stale_flows(change: RowChange) -> bool:
    before = _endpoints(change.before)
    after = _endpoints(change.after)
    if before - after or (after and not before):
        return True
    frontends = {(front.kind, front.address, front.port) for front in change.before.frontends} if change.before else set()
    kept = {(front.kind, front.address, front.port) for front in change.after.frontends} if change.after else set()
    return bool(frontends - kept)


def _endpoints(row: ServicePort | None) -> set[tuple[str, int]]:
    return {(backend.address, backend.port) for backend in row.all_backends} if row is not None else set()


def _remove(family: Family, scope: Scope) -> int:
    local = frozenset(local_addresses(excluding=(DEVICE,))) if scope.node_ports else frozenset()
    stale: Iterable[Flow] = [flow for flow in dump(int(family), UDP) if scope.is_stale(flow, local)]
    return delete(stale)
