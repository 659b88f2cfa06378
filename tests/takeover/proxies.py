"""Running kube-proxy and nodeproxy in turn on a sandbox node, as an operator does who replaces one by the other."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from hack.controlplane.build import kube_proxy
from nodeproxy.sandbox.agent import (
    AgentFlags,
    AgentProcess,
    Variant,
    kube_proxy_command,
    nodeproxy_command,
    variant_environment,
)
from nodeproxy.sandbox.topology import Sandbox
from tests.conformance.static_apiserver import PORT, StaticApiServer, serving
from tests.takeover import shop
from tests.ways import IPVS_LEGACY, IPVS_NFT, LEGACY, NFT, Way, ipvs

MASTER = f"http://127.0.0.1:{PORT}"
_SYNCED = "kubeproxy_sync_proxy_rules_last_timestamp_seconds"
_SLOW = 60  # seconds to be ready in: kube-proxy's IPVS mode starts `ipset` for every entry


class Theirs(NamedTuple):
    """A mode of kube-proxy, and the variant of iptables that it finds on its PATH."""

    mode: str
    variant: Variant

    def __str__(self) -> str:
        return "nftables" if self.mode == "nftables" else f"{self.mode}-{self.variant}"


THEIR_LEGACY, THEIR_NFT = Theirs("iptables", "legacy"), Theirs("iptables", "nft")
THEIR_IPVS_LEGACY, THEIR_IPVS_NFT = Theirs("ipvs", "legacy"), Theirs("ipvs", "nft")
THEIR_NFTABLES = Theirs("nftables", "nft")


NO_KUBE_PROXY = "" if kube_proxy() else "no kube-proxy: KUBE_PROXY=path, or build it (hack/controlplane/build.py)"
"""Why tests of the real program cannot run; empty where they can."""


def their_modes() -> Iterator[object]:
    """Parameter sets: each mode of kube-proxy."""
    for theirs in (THEIR_LEGACY, THEIR_NFT, THEIR_NFTABLES):
        yield pytest.param(theirs, id=str(theirs))
    for theirs in (THEIR_IPVS_LEGACY, THEIR_IPVS_NFT):
        yield ipvs(theirs, id=str(theirs))


def both_modes() -> Iterator[object]:
    """Parameter sets: a mode of kube-proxy and one of ours, as they follow each other on one node."""
    pairs = [
        *((THEIR_LEGACY, LEGACY), (THEIR_NFT, NFT), (THEIR_NFTABLES, LEGACY), (THEIR_NFTABLES, NFT)),
        *((THEIR_LEGACY, NFT), (THEIR_NFT, LEGACY)),
        *((THEIR_IPVS_LEGACY, LEGACY), (THEIR_IPVS_NFT, NFT)),
        *((THEIR_LEGACY, IPVS_LEGACY), (THEIR_NFT, IPVS_NFT), (THEIR_NFTABLES, IPVS_NFT)),
        *((THEIR_IPVS_LEGACY, IPVS_LEGACY), (THEIR_IPVS_NFT, IPVS_NFT)),
    ]
    for theirs, way in pairs:
        name = f"{theirs}-and-{way}"
        plain = "ipvs" not in (theirs.mode, way.mode)
        yield pytest.param(theirs, way, id=name) if plain else ipvs(theirs, way, id=name)


class Node:
    """A sandbox node whose Services both proxies know: nodeproxy from manifests, kube-proxy from an API server."""

    def __init__(self, box: Sandbox, api: StaticApiServer) -> None:
        self.box = box
        self.api = api
        self._manifests = box.directory / "manifests"
        self._manifests.mkdir()
        self._runs = 0

    @contextmanager
    def kube_proxy(self, theirs: Theirs, *flags: str, synced: bool = True) -> Iterator[AgentProcess]:
        """kube-proxy, having programmed both families; its rules stay after the block."""
        binary = kube_proxy()
        assert binary is not None
        command = [*kube_proxy_command(binary, AgentFlags(mode=theirs.mode), master=MASTER), *flags]
        environment = variant_environment(self.box, theirs.variant)
        process = AgentProcess(self.box, command, environment=environment, name=self._name("kube-proxy"))
        process.start()
        try:
            if synced:
                self.wait_synced(process)
            yield process
        finally:
            process.stop()

    def wait_synced(self, kube_proxy: AgentProcess) -> None:
        """Wait until it has programmed both families."""
        kube_proxy.wait_metric(_SYNCED, series=2, timeout=_SLOW)

    @contextmanager
    def nodeproxy(self, way: Way, *flags: str, ready: bool = True) -> Iterator[AgentProcess]:
        """nodeproxy; its rules stay after the block."""
        self.write_manifests()
        command = nodeproxy_command(AgentFlags(mode=way.mode), manifests=self._manifests, variant=way.variant)
        process = AgentProcess(self.box, [*command, *flags], name=self._name("nodeproxy"))
        process.start()
        try:
            if ready:
                process.wait_ready(_SLOW)
            yield process
        finally:
            process.stop()

    def write_manifests(self) -> None:
        """Give nodeproxy the objects of the API server."""
        whole = "\n---\n".join(json.dumps(one) for one in shop.objects())
        (self._manifests / "shop.yaml").write_text(whole)

    def cleanup(self, *flags: str) -> None:
        """`nodeproxy cleanup`. What IPVS remembers of probes that have ended (UDP: 5 minutes) is not waited for."""
        program = Path(sys.executable).with_name("nodeproxy")
        self.box.node.command([str(program), "cleanup", "--ipvs-drain-timeout", "20s", *flags], timeout=180)

    def _name(self, program: str) -> str:
        self._runs += 1
        return f"{self._runs}-{program}"


@contextmanager
def made_node() -> Iterator[Node]:
    """A node with pods, clients and an API server, on which no proxy has run."""
    with Sandbox(node_addresses=[shop.NODE_ADDRESS, shop.NODE_ADDRESS6]) as box:
        shop.serve(box)
        with serving(box.node, [shop.node_object(), *shop.objects()]) as api:
            yield Node(box, api)
