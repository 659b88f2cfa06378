"""States of a node as kube-proxy left them, kept in files: how they are recorded, and how a node gets one again.

`python -m tests.takeover.recorded` records all modes that this kernel has; `python -m hack.vm run -- …` those with IPVS.
The rules are without their accounting objects (nfacct), which would have to be there when rules are restored.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import msgspec

from nodeproxy.kernel.ipvs import (
    IPVS,
    AddRealServer,
    AddVirtualServer,
    Operation,
    RealServer,
    VirtualServer,
    VirtualServerSettings,
)
from nodeproxy.kernel.links import Links
from nodeproxy.sandbox.namespace import Namespace
from tests.takeover.probing import wait_serving
from tests.takeover.proxies import (
    THEIR_IPVS_LEGACY,
    THEIR_IPVS_NFT,
    THEIR_LEGACY,
    THEIR_NFT,
    THEIR_NFTABLES,
    Theirs,
    made_node,
)
from tests.ways import lacks_ipvs

DIRECTORY = Path(__file__).with_name("recorded")
_DEVICE = "kube-ipvs0"
_ACCOUNTING = re.compile(r" -m nfacct --nfacct-name +\S+")
_COUNTERS = re.compile(r"\[\d+:\d+\]")
_BY_CHANCE = re.compile(r" (?:initval 0x[0-9a-f]+|hashsize \d+|bucketsize \d+)")


class Ipvs(msgspec.Struct, frozen=True):
    """What IPVS mode leaves beside rules and sets: addresses of its interface, virtual servers with their real ones."""

    addresses: list[str]
    servers: list[tuple[VirtualServer, VirtualServerSettings, list[RealServer]]]


class Recorded(NamedTuple):
    """All of it, each in the format of the tool that restores it; empty or None where a mode leaves none of a kind."""

    iptables: str = ""
    ip6tables: str = ""
    nft: str = ""
    ipset: str = ""
    ipvs: Ipvs | None = None


def read(theirs: Theirs) -> Recorded:
    """The recorded state of a mode."""
    directory = DIRECTORY / str(theirs)
    texts = {path.stem: path.read_text() for path in directory.glob("*.txt")}
    ipvs = directory / "ipvs.json"
    return Recorded(**texts, ipvs=msgspec.json.decode(ipvs.read_bytes(), type=Ipvs) if ipvs.exists() else None)


def write(theirs: Theirs, state: Recorded) -> None:
    """Keep the state of a mode."""
    directory = DIRECTORY / str(theirs)
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in state._asdict().items():
        if isinstance(text, str) and text:
            (directory / f"{name}.txt").write_text(text)
    if state.ipvs is not None:
        (directory / "ipvs.json").write_bytes(msgspec.json.format(msgspec.json.encode(state.ipvs), indent=1) + b"\n")


def record(node: Namespace, theirs: Theirs) -> Recorded:
    """What a node holds now."""
    if theirs.mode == "nftables":
        return Recorded(
            nft="".join(node.command(["nft", "list", "table", one, "kube-proxy"]).stdout for one in ("ip", "ip6"))
        )
    iptables, ip6tables = (
        _COUNTERS.sub("[0:0]", _ACCOUNTING.sub("", _without_comments(node, f"{tool}-{theirs.variant}-save")))
        for tool in ("iptables", "ip6tables")
    )
    if theirs.mode == "iptables":
        return Recorded(iptables, ip6tables)
    shown = node.command(["ip", "-o", "address", "show", "dev", _DEVICE]).stdout
    addresses = sorted(line.split()[3].partition("/")[0] for line in shown.splitlines())
    saved = node.command(["ipset", "save"]).stdout.splitlines()
    sets = sorted(_BY_CHANCE.sub("", line) for line in saved)
    sets.sort(key=lambda line: not line.startswith("create"))
    return Recorded(iptables, ip6tables, ipset="\n".join(sets) + "\n", ipvs=Ipvs(addresses, node.run(_servers)))


def _without_comments(node: Namespace, tool: str) -> str:
    return "".join(f"{line}\n" for line in node.command([tool]).stdout.splitlines() if not line.startswith("#"))


def _servers() -> list[tuple[VirtualServer, VirtualServerSettings, list[RealServer]]]:
    with IPVS() as ipvs:
        return [
            (server, settings, sorted((one.server for one in ipvs.real_servers(server)), key=str))
            for server, settings in sorted(ipvs.virtual_servers().items(), key=str)
        ]


def restore(node: Namespace, theirs: Theirs) -> None:
    """Put a node into the recorded state."""
    state = read(theirs)
    if state.nft:
        node.command(["nft", "-f", "-"], input=state.nft)
    if state.ipset:
        node.command(["ipset", "restore"], input=state.ipset)
    if state.ipvs is not None:
        node.run(_restore_ipvs, state.ipvs)
    for tool, text in (("iptables", state.iptables), ("ip6tables", state.ip6tables)):
        if text:
            node.command([f"{tool}-{theirs.variant}-restore"], input=text)


def _restore_ipvs(state: Ipvs) -> None:
    with IPVS() as ipvs, Links() as links:
        operations: list[Operation] = []
        for server, settings, reals in state.servers:
            operations.append(AddVirtualServer(server, settings))
            operations += [AddRealServer(server, real) for real in reals]
        refused = [*ipvs.change(operations).values(), *links.add_addresses(links.ensure_dummy(_DEVICE), state.addresses)]
    assert not refused, refused


def main() -> None:
    """Record every mode that this kernel has."""
    modes = [THEIR_LEGACY, THEIR_NFT, THEIR_NFTABLES]
    if not lacks_ipvs():
        modes = [THEIR_IPVS_LEGACY, THEIR_IPVS_NFT]
    for theirs in modes:
        with made_node() as node, node.kube_proxy(theirs):
            wait_serving(node.box)
            write(theirs, record(node.box.node, theirs))
        print(theirs)


if __name__ == "__main__":
    main()
