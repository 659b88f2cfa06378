"""Watching begins with the definitions, whenever they come: kopf looks for resources once."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from structlog.testing import capture_logs

from hack.controlplane import ControlPlane
from nodeproxy.operator.cluster import Cluster
from nodeproxy.operator.watch import watch
from nodeproxy.sandbox.pace import scaled
from nodeproxy.source.apiserver.credentials import Credentials
from tests.operator.conftest import COLLECTIONS, DEPLOY, Rollouts

pytestmark = pytest.mark.controlplane


async def test_an_operator_that_is_there_before_its_definitions_hears_of_roll_outs(tmp_path: Path) -> None:
    with ControlPlane() as cluster, capture_logs() as said:
        cluster.write_kubeconfig(tmp_path / "kubeconfig")
        heard: asyncio.Queue[None] = asyncio.Queue()
        ready = asyncio.Event()
        connection = Cluster(Credentials(tmp_path / "kubeconfig"))
        task = asyncio.create_task(watch(connection, lambda: heard.put_nowait(None), ready))
        try:
            async with asyncio.timeout(scaled(60)):
                while not said:  # noqa: ASYNC110 - what was said is a list
                    await asyncio.sleep(0.05)
                assert said[0]["event"] == "the API server does not serve ProxyRollouts and ProxyNodes yet; waiting"
                assert heard.empty() and not ready.is_set()
                for plural in ("proxynodes", "proxyrollouts"):
                    definition = yaml.safe_load((DEPLOY / "operator" / "crds" / f"{plural}.yaml").read_text())
                    path = COLLECTIONS["CustomResourceDefinition"]
                    await asyncio.to_thread(cluster.request, "POST", path, definition)
                await heard.get()  # a pass is due: until now they all failed
                await ready.wait()
                await asyncio.to_thread(Rollouts(cluster).create, "spring", {"mode": "ipvs"})
                await heard.get()
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
