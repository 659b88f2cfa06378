"""Owns kopf: it watches ProxyRollouts and ProxyNodes, and each change makes a pass due at once instead of soon."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import kopf

from nodeproxy.api.proxy_node import GROUP, VERSION
from nodeproxy.source.apiserver.credentials import Credentials

_IDENTITY: Any = "nodeproxy-operator"


async def watch(credentials: Credentials, changed: Callable[[], None], ready: asyncio.Event) -> None:
    """Run kopf until cancelled. `ready` is set when it has begun, with its own handlers of signals in the place of ours.

    Handlers of events keep nothing on the objects (no annotation, no finalizer of kopf's), and which replica acts is not for
    kopf to say: it runs where the Lease is held. What is missed while a watch is broken is seen by the next pass.
    """
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
        return await asyncio.to_thread(connection_info, credentials)

    async def on_event(**_: Any) -> None:
        changed()

    kopf.on.login(registry=registry, id="login")(login)
    for plural in ("proxyrollouts", "proxynodes"):
        kopf.on.event(GROUP, VERSION, plural, registry=registry, id=plural)(on_event)
    # kopf would make an identity of the user's name, which a container's user need not have; without peers it is not used.
    await kopf.operator(
        registry=registry, settings=settings, clusterwide=True, standalone=True, ready_flag=ready, identity=_IDENTITY
    )


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
