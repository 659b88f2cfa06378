"""Owns the API server as a source: one reflector for each kind, on one connection."""

from __future__ import annotations

import asyncio

from nodeproxy.api.objects import Kind
from nodeproxy.source.apiserver.connection import Connection
from nodeproxy.source.apiserver.credentials import Credentials
from nodeproxy.source.apiserver.observer import NoObserver, Observer
from nodeproxy.source.apiserver.reflector import Reflector
from nodeproxy.source.apiserver.wire import Resource
from nodeproxy.source.decoding import Selection
from nodeproxy.source.events import Deliver


class ApiServerSource:
    """Delivers Services, EndpointSlices and the node's own Node from the API server."""

    def __init__(
        self,
        credentials: Credentials,
        node_name: str,
        service_proxy_name: str | None = None,
        *,
        observer: Observer | None = None,
        streamed_list: bool = True,
    ) -> None:
        """`streamed_list`: whether to ask for lists as a watch (WatchList) first; without, lists are read in pages."""
        self._credentials = credentials
        self._selection = Selection(node_name, service_proxy_name)
        self._observer = observer or NoObserver()
        self._streamed_list = streamed_list

    async def run(self, deliver: Deliver) -> None:
        """Deliver events in batches until cancelled. Raises CredentialsError if there are none to begin with."""
        connection = Connection(self._credentials)
        await asyncio.to_thread(connection.connect)
        async with asyncio.TaskGroup() as group:
            for kind in Kind:
                resource = Resource(kind, self._selection)
                reflector = Reflector(resource, connection, deliver, self._observer, streamed_list=self._streamed_list)
                group.create_task(reflector.run(), name=f"reflector-{kind}")
