"""Owns kopf: it watches ProxyRollouts and ProxyNodes, and each change makes a pass due at once instead of soon."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

import kopf
import structlog
from msgspec import Struct

from nodeproxy.agent.backoff import Backoff
from nodeproxy.api.proxy_node import API_VERSION, GROUP, VERSION
from nodeproxy.operator.cluster import Cluster, decode
from nodeproxy.source.apiserver.connection import RequestError
from nodeproxy.source.apiserver.credentials import Credentials
from nodeproxy.source.events import SourceError

_log = structlog.get_logger(__name__)
_PLURALS: Final = ("proxyrollouts", "proxynodes")
_IDENTITY: Any = "nodeproxy-operator"


class _Named(Struct):
    name: str


class _Groups(Struct):
    groups: list[_Named]


class _Resources(Struct):
    resources: list[_Named]


async def watch(cluster: Cluster, changed: Callable[[], None], ready: asyncio.Event) -> None:
    """Run kopf until cancelled. `ready` is set when it has begun, with its own handlers of signals in the place of ours.

    Handlers of events keep nothing on the objects (no annotation, no finalizer of kopf's), and which replica acts is not for
    kopf to say: it runs where the Lease is held. What is missed while a watch is broken is seen by the next pass.
    """
    await served(cluster)
    changed()
    registry = kopf.OperatorRegistry()
    settings = kopf.OperatorSettings()
    settings.scanning.disabled = True  # what is watched is known; to see it come and go would need more rights
    settings.posting.enabled = False
    settings.watching.server_timeout = 290
    settings.watching.client_timeout = 300
    settings.networking.connect_timeout = 10
    settings.queueing.exit_timeout = 0.1  # handlers only say that something has changed: nothing is worth waiting for
    logging.getLogger("kopf").setLevel(logging.WARNING)

    async def login(**_: Any) -> kopf.ConnectionInfo:
        return await asyncio.to_thread(connection_info, cluster.credentials)

    async def on_event(**_: Any) -> None:
        changed()

    kopf.on.login(registry=registry, id="login")(login)
    for plural in _PLURALS:
        kopf.on.event(GROUP, VERSION, plural, registry=registry, id=plural)(on_event)
    # kopf would make an identity of the user's name, which a container's user need not have; without peers it is not used.
    await kopf.operator(
        registry=registry, settings=settings, clusterwide=True, standalone=True, ready_flag=ready, identity=_IDENTITY
    )


async def served(cluster: Cluster) -> None:
    """Wait until the API server names the resources: kopf looks for them once, as it begins, and never again."""
    backoff = Backoff(0.5, 5.0)
    said = False
    while True:
        try:
            if await _are_served(cluster):
                return
        except (RequestError, SourceError) as error:
            _log.debug("cannot ask for the API server's resources; trying again", error=str(error))
        else:
            if not said:
                said = True
                _log.warning("the API server does not serve ProxyRollouts and ProxyNodes yet; waiting")
        await asyncio.sleep(backoff.next())


async def _are_served(cluster: Cluster) -> bool:
    """By both documents that kopf reads: the group's own is there some moments before the list of groups has it."""
    own = await cluster.get(f"/apis/{API_VERSION}")
    groups = await cluster.get("/apis")
    if own is None or groups is None:
        return False
    resources = {one.name for one in decode(own, _Resources).resources}
    return resources.issuperset(_PLURALS) and any(one.name == GROUP for one in decode(groups, _Groups).groups)


def connection_info(credentials: Credentials) -> kopf.ConnectionInfo:
    """Our credentials, as kopf takes them. Blocking. Raises `CredentialsError`."""
    loaded = credentials.load()
    scheme, _, token = loaded.headers().get("authorization", "").partition(" ")
    configuration = loaded.configuration
    return kopf.ConnectionInfo(
        server=loaded.host,
        ca_path=configuration.ssl_ca_cert or None,
        insecure=not configuration.verify_ssl,
        scheme=scheme or None,
        token=token or None,
        certificate_path=configuration.cert_file or None,
        private_key_path=configuration.key_file or None,
        default_namespace=None,
    )
