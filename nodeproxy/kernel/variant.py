"""Owns choosing the iptables variant (legacy or nft) that the rest of the node uses.

Two packet filters work side by side in the kernel, and rules in the wrong one are passed in an order that nobody expects. So
look where kubelet and others already put their rules. Looking changes nothing: nft chains are listed by netlink, and legacy
tables are only read if they exist, because reading a legacy table creates it.

Sources: include/uapi/linux/netfilter/nf_tables.h (NFTA_CHAIN_*); kubelet's hint: KEP 3178.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from nodeproxy.kernel.errors import FeatureMissing, RequestRefused, ToolMissing
from nodeproxy.kernel.netlink import NETLINK_NETFILTER, NetlinkSocket, attributes
from nodeproxy.kernel.xtables_stamp import NFNL_SUBSYS_NFTABLES, legacy_tables
from nodeproxy.kernel.xtables_tools import Variant, find_tools, version_of

_HINT_CHAINS: Final = ("KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY")
_HINT_TABLE: Final = "mangle"
_PREFIX: Final = "KUBE-"
_CHAIN_LINE: Final = re.compile(r"^:(KUBE-\S*)", re.MULTILINE)
_RULE_OR_JUMP: Final = re.compile(r"^-A KUBE-| -[jg] KUBE-", re.MULTILINE)

_NFT_MSG_GETCHAIN: Final = 4
_NFTA_CHAIN_TABLE: Final = 1
_NFTA_CHAIN_NAME: Final = 3
_NFTA_CHAIN_USE: Final = 6
_ADDRESS_FAMILY: Final = {4: 2, 6: 10}


class VariantChoice(NamedTuple):
    """The variant to use, and why, as a sentence for the log."""

    variant: Variant
    reason: str


@dataclass(slots=True)
class _Traces:
    """What others left in one variant: the hint chains found, and the rules in KUBE- chains plus the jumps to them."""

    hints: list[str] = field(default_factory=list)
    rules: int = 0


def detect_variant(families: Sequence[int] = (4, 6)) -> VariantChoice:
    """Choose: kubelet's hint chain, else more rules in KUBE- chains, else what `iptables` on PATH is, else nft, else legacy.

    `families` are 4 and 6; only a variant whose programs are installed for the first of them is chosen. Blocking, for the
    start of a program: with large legacy tables it takes some tenths of a second. Raises ToolMissing if neither variant is
    installed, PermissionMissing without CAP_NET_ADMIN.
    """
    usable = []
    for variant in (Variant.NFT, Variant.LEGACY):
        try:
            find_tools(variant, families[0])
        except ToolMissing:
            continue
        usable.append(variant)
    if not usable:
        find_tools(Variant.NFT, families[0])  # raises the error with its hint
    if len(usable) == 1:
        return VariantChoice(usable[0], f"only the {usable[0]} variant of iptables is installed")

    traces = {Variant.NFT: _nft_traces(families), Variant.LEGACY: _legacy_traces(families)}
    for variant in usable:
        if hints := traces[variant].hints:
            return VariantChoice(variant, f"kubelet's chain {hints[0]} is in the {variant} {_HINT_TABLE} table")
    nft, legacy = traces[Variant.NFT].rules, traces[Variant.LEGACY].rules
    if nft != legacy:
        more, fewer = (Variant.NFT, Variant.LEGACY) if nft > legacy else (Variant.LEGACY, Variant.NFT)
        counts = f"{traces[more].rules} rules of KUBE- chains against {traces[fewer].rules}"
        return VariantChoice(more, f"the {more} tables hold {counts} in the {fewer} tables")
    name = "iptables" if families[0] == 4 else "ip6tables"
    program = shutil.which(name)
    version = version_of(program) if program else None
    if version is not None and version[1] in usable:
        return VariantChoice(version[1], f"no KUBE- rules yet, and {program} is the {version[1]} variant")
    return VariantChoice(usable[0], f"no KUBE- rules yet, and no {name} on PATH: {usable[0]} is the default")


def _nft_traces(families: Sequence[int]) -> _Traces:
    """List the chains that iptables-nft made; the kernel counts what each holds and what jumps to it."""
    traces = _Traces()
    for family in families:
        for table, chain, use in _nft_chains(family):
            if table == _HINT_TABLE and chain in _HINT_CHAINS:
                traces.hints.append(chain)
            if chain.startswith(_PREFIX):
                traces.rules += use
    return traces


def _nft_chains(family: int) -> list[tuple[str, str, int]]:
    """(table, chain, rules in it plus jumps to it) for every nft chain of the family in the iptables tables."""
    request = bytes((_ADDRESS_FAMILY[family], 0, 0, 0))  # nfgenmsg
    found = []
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        try:
            kind = NFNL_SUBSYS_NFTABLES << 8 | _NFT_MSG_GETCHAIN
            for message in netlink.dump(kind, request, request="list nft chains"):
                values = {key: message[start:end] for key, start, end in attributes(message, 4, len(message))}
                table = values[_NFTA_CHAIN_TABLE].rstrip(b"\0").decode(errors="replace")
                if table not in ("raw", "mangle", "nat", "filter", "security"):
                    continue  # nftables' own, such as kube-proxy's nftables mode
                chain = values[_NFTA_CHAIN_NAME].rstrip(b"\0").decode(errors="replace")
                found.append((table, chain, int.from_bytes(values.get(_NFTA_CHAIN_USE, b""), "big")))
        except (FeatureMissing, RequestRefused):  # no nf_tables in this kernel: nobody left anything there
            return []
    return found


def _legacy_traces(families: Sequence[int]) -> _Traces:
    traces = _Traces()
    for family in families:
        tables = legacy_tables(family)
        if not tables:
            continue
        try:
            tools = find_tools(Variant.LEGACY, family)
        except ToolMissing:
            continue
        for table in tables:
            save = [tools.save, "--table", table]
            text = subprocess.run(save, capture_output=True, text=True, errors="replace", check=False).stdout
            if table == _HINT_TABLE:
                traces.hints += [chain for chain in _CHAIN_LINE.findall(text) if chain in _HINT_CHAINS]
            traces.rules += len(_RULE_OR_JUMP.findall(text))
    return traces
