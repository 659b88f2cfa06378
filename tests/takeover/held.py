"""What proxies hold in the kernel of a node, as lines of text that can be compared: rules, sets, virtual servers, tables.

KUBE-FIREWALL is not among it: it is kubelet's, and proxies only make it where it is not there. Nor are the clients that are
remembered for session affinity, which are traffic.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from nodeproxy.kernel.errors import KernelError
from nodeproxy.kernel.ipvs import IPVS
from nodeproxy.sandbox.namespace import Namespace

_OF_IPTABLES = {"filter", "nat", "mangle", "raw", "security"}
_BY_CHANCE = re.compile(r" (?:initval 0x[0-9a-f]+|hashsize \d+|bucketsize \d+)")  # differ from set to set
_DEVICE = "kube-ipvs0"


def held(node: Namespace) -> list[str]:
    """Everything, sorted. A line that is there twice is twice in it."""
    return sorted([*_rules(node), *_sets(node), *_servers(node), *_addresses(node), *_tables(node)])


def difference(before: Sequence[str], now: Sequence[str]) -> str:
    """What is held `now` and was not before (+), and the other way round (-), a line each; empty where both are equal."""
    left, missing = list(now), []
    for line in before:
        if line in left:
            left.remove(line)
        else:
            missing.append(line)
    return "\n".join([*(f"+ {line}" for line in left), *(f"- {line}" for line in missing)])


def repeated(node: Namespace) -> list[str]:
    """Rules that are in a chain twice, KUBE-FIREWALL and the jumps to it included."""
    rules = list(_rules(node, kubelets=True))
    return sorted({rule for rule in rules if rules.count(rule) > 1})


def _rules(node: Namespace, *, kubelets: bool = False) -> Iterator[str]:
    for variant in ("legacy", "nft"):
        for family, tool in (("4", "iptables"), ("6", "ip6tables")):
            table = ""
            for line in node.command([f"{tool}-{variant}-save"]).stdout.splitlines():
                if line.startswith("*"):
                    table = line[1:]
                elif "KUBE-FIREWALL" in line and not kubelets:
                    continue
                elif line.startswith("-A "):
                    yield f"{variant}{family} {table} {line}"
                elif line.startswith(":") and line.split()[1] == "-":
                    yield f"{variant}{family} {table} {line.split()[0]}"


def _sets(node: Namespace) -> Iterator[str]:
    for line in node.command(["ipset", "save"]).stdout.splitlines():
        if not line.startswith("add KUBE-AFFINITY"):
            yield f"ipset {_BY_CHANCE.sub('', line)}"


def _servers(node: Namespace) -> list[str]:
    def read() -> list[str]:
        try:
            with IPVS() as ipvs:
                return [
                    f"ipvs {server} {settings.scheduler} {settings.persistence_seconds or ''} flags {settings.flags:#x}"
                    + "".join(sorted(f", {real.server} weight {real.weight}" for real in ipvs.real_servers(server)))
                    for server, settings in ipvs.virtual_servers().items()
                ]
        except KernelError:
            return []  # no IPVS in this kernel

    return node.run(read)


def _addresses(node: Namespace) -> Iterator[str]:
    shown = node.command(["ip", "-o", "address", "show", "dev", _DEVICE], check=False)
    if shown.returncode == 0:
        yield f"link {_DEVICE}"
        yield from (f"address {line.split()[3]}" for line in shown.stdout.splitlines())


def _tables(node: Namespace) -> Iterator[str]:
    for line in node.command(["nft", "list", "tables"]).stdout.splitlines():
        if line.split()[-1] not in _OF_IPTABLES:
            yield f"nft {line}"
