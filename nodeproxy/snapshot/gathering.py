"""Owns gathering what a source delivers, until there is a state to take a snapshot of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from nodeproxy.api.objects import ApiObject, Kind, ObjectKey
from nodeproxy.cluster.state import ClusterState
from nodeproxy.configuration.agent_config import AgentConfig
from nodeproxy.forwarding.table import Family
from nodeproxy.snapshot.model import BOTH_FAMILIES, Snapshot
from nodeproxy.source.apiserver.observer import NoObserver
from nodeproxy.source.events import Deleted, Event, ListComplete, Refused, Upserted


class Gathering(NoObserver):
    """The present state of everything that a source delivers. Objects whose names cannot be trusted are refused."""

    def __init__(self, node_name: str) -> None:
        self._state = ClusterState(node_name)
        self._objects: dict[ObjectKey, ApiObject] = {}
        self._refused: dict[tuple[ObjectKey | None, str], Refused] = {}
        self.last_error: str | None = None  # what the source complained of last
        self.lists = asyncio.Event()  # those of Services and EndpointSlices are complete
        self.node = asyncio.Event()  # whether there is a Node is known

    @property
    def node_addresses(self) -> tuple[str, ...]:
        """Those of the Node object; none without one."""
        node = self._state.node
        return () if node is None else tuple(address.text for address in node.addresses)

    def deliver(self, events: Sequence[Event]) -> None:
        """Take events, as `source.events.Deliver`."""
        for event in events:
            match event:
                case Upserted():
                    self._objects[event.object.key] = event.object
                case Deleted():
                    self._objects.pop(event.key, None)
                case ListComplete(kind=Kind.NODE):
                    self.node.set()
        changes = self._state.apply(events)
        came = {id(event) for event in events}
        for refused in changes.refused:
            self._refused[refused.key, refused.reason] = refused
            self.last_error = refused.reason
            if refused.key is not None and id(refused) not in came:  # not by the source, which keeps what it had
                self._objects.pop(refused.key, None)
        if changes.lists_complete:
            self.lists.set()

    def request_failed(self, kind: Kind, error: str) -> None:
        """The API server does not answer, or refuses (`source.apiserver.observer`)."""
        self.last_error = error

    def snapshot(
        self,
        config: AgentConfig,
        origin: str,
        *,
        node_addresses: Sequence[str] = (),
        families: Sequence[Family] = BOTH_FAMILIES,
        taken: str | None = None,
    ) -> Snapshot:
        """What was gathered so far; taken now, if not said otherwise."""
        return Snapshot(
            objects=tuple(self._objects[key] for key in sorted(self._objects)),
            refused=tuple(self._refused.values()),
            config=config,
            node_addresses=tuple(node_addresses),
            taken=taken or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            origin=origin,
            families=tuple(families),
        )
