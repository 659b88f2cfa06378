"""Owns the short excerpt of what the kernel holds for one Service: iptables rules, or IPVS virtual servers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress

from nodeproxy.kernel.errors import KernelError
from nodeproxy.kernel.ipvs import IPVS
from nodeproxy.sandbox.namespace import Namespace

SHOWN = 40  # lines
_HOOKS = ("PREROUTING", "OUTPUT")


def excerpt(node: Namespace, words: Sequence[str]) -> tuple[str, list[str]]:
    """A title and the lines about a Service, found by words such as its addresses and its name."""
    servers = node.run(_virtual_servers, words)
    if servers:
        return "the virtual servers of shop/web, as ipvsadm -Ln would list them", servers[:SHOWN]
    for variant in ("nft", "legacy"):
        saved = node.command([f"iptables-{variant}-save", "-t", "nat"]).stdout.splitlines()
        lines = by_chain(about([line for line in saved if line.startswith("-A ")], words))
        if lines:
            return f"iptables-{variant}-save -t nat: what concerns shop/web, chain by chain, without comments", lines
    return "no rules found for this Service", []


def by_chain(rules: Iterable[str]) -> list[str]:
    """The rules under the names of their chains, without comments and what says nothing beside them."""
    lines: list[str] = []
    last = ""
    for rule in rules:
        _, chain, words = rule.split(" ", 2)
        if chain != last:
            lines.append(chain)
            last = chain
        words = re.sub(r'-m comment --comment ("(\\.|[^"\\])*"|\S+) ?', "", words)
        lines.append("    " + re.sub(r"-m (tcp|udp|sctp) ", "", words))
    return lines[:SHOWN] + (["    …"] if len(lines) > SHOWN else [])


def _virtual_servers(words: Sequence[str]) -> list[str]:
    """Virtual servers whose address or port is among the words, each with its real servers. Runs in the node."""
    lines: list[str] = []
    with suppress(KernelError), IPVS() as ipvs:
        for server, settings in ipvs.virtual_servers().items():
            if {server.address, str(server.port)} & set(words):
                lines.append(f"{server.protocol.upper()}  {server.address}:{server.port} {settings.scheduler}")
                for real in ipvs.real_servers(server):
                    counts = f"{real.weight:<6} {real.active_connections:<10} {real.inactive_connections}"
                    lines.append(f"  -> {real.server!s:<26} Masq    {counts}")
    head = ["Prot LocalAddress:Port Scheduler Flags", "  -> RemoteAddress:Port         Forward Weight ActiveConn InActConn"]
    return [*head, *lines] if lines else []


def _chain(line: str) -> str:
    return line.split()[1]


def _target(line: str) -> str | None:
    match = re.search(r" -[jg] (\S+)", line)
    return match[1] if match else None


def about(rules: Sequence[str], words: Iterable[str]) -> list[str]:
    """The rules that hold one of the words, and the jumps that lead to their chains, in the order packets meet them."""
    pattern = re.compile("|".join(rf"(?<![\w.]){re.escape(word)}(?![\w])" for word in words))
    wanted = [line for line in rules if pattern.search(line)]
    chains = {_chain(line) for line in wanted}
    while True:
        jumps = [line for line in rules if _target(line) in chains and line not in wanted]
        if not jumps:
            break
        wanted += jumps
        chains |= {_chain(line) for line in jumps}
    ordered = []
    queue = [hook for hook in _HOOKS if hook in chains][:1] or sorted(chains)
    visited: set[str] = set()
    while queue:
        chain = queue.pop(0)
        if chain in visited:
            continue
        visited.add(chain)
        mine = [line for line in rules if _chain(line) == chain and line in wanted]
        ordered += mine
        queue += [target for line in mine if (target := _target(line)) in chains and target not in visited]
    return ordered
