"""Owns the rules that every mode has: masquerading by mark, forwarding, and how traffic of local pods is told apart."""

from __future__ import annotations

from typing import NamedTuple

from nodeproxy.forwarding.table import Family
from nodeproxy.programmer.base import LocalDetector, ProgrammerConfig

RANDOM_FULLY = "-j MASQUERADE --random-fully"

FROM_NODE = "-m addrtype --src-type LOCAL"
"""Match for traffic of the node itself."""

# Classic BPF (linux/filter.h), offsets from the IP header: accept where source and destination address are equal. This one
# program recognises every hairpin (a pod that a Service sent back to itself), where kube-proxy has a rule or set entry per
# endpoint.
_SAME_ADDRESSES = {
    Family.IPV4: "6,32 0 0 12,7 0 0 0,32 0 0 16,29 0 1 0,6 0 0 65535,6 0 0 0",
    Family.IPV6: (
        "18,32 0 0 8,7 0 0 0,32 0 0 24,29 0 13 0,32 0 0 12,7 0 0 0,32 0 0 28,29 0 9 0,"
        "32 0 0 16,7 0 0 0,32 0 0 32,29 0 5 0,32 0 0 20,7 0 0 0,32 0 0 36,29 0 1 0,6 0 0 65535,6 0 0 0"
    ),
}


class Features(NamedTuple):
    """What this kernel and its tools can do: MASQUERADE --random-fully, and BPF matches (for the one hairpin rule)."""

    random_fully: bool = True
    bpf: bool = True

    @property
    def masquerade(self) -> str:
        """The target that masquerades."""
        return RANDOM_FULLY if self.random_fully else "-j MASQUERADE"


class SourceMatches(NamedTuple):
    """Matches for traffic of local pods and for all other traffic; None where detect-local cannot tell.

    The second is in two parts, which iptables-save prints before and after a destination: source, interface.
    """

    local_pods: str | None
    others: tuple[str, str] | None


def source_matches(family: Family, detector: LocalDetector) -> SourceMatches:
    """How a detector tells local pods apart in rules of one family."""
    if detector.interface is not None:
        return SourceMatches(f"-i {detector.interface}", ("", f"! -i {detector.interface}"))
    if detector.interface_prefix is not None:
        return SourceMatches(f"-i {detector.interface_prefix}+", ("", f"! -i {detector.interface_prefix}+"))
    cidr = detector.cidrs.get(family)
    return SourceMatches(f"-s {cidr}", (f"! -s {cidr}", "")) if cidr else SourceMatches(None, None)


def same_addresses(family: Family) -> str:
    """Match for packets that go to where they come from."""
    return f'-m bpf --bytecode "{_SAME_ADDRESSES[family]}"'


def masquerade_mark(config: ProgrammerConfig) -> str:
    """The mark of packets to be masqueraded, as VALUE/MASK."""
    bit = 1 << config.masquerade_bit
    return f"{bit:#x}/{bit:#x}"


def mark_chain(config: ProgrammerConfig) -> list[str]:
    """KUBE-MARK-MASQ, which others may jump to as well."""
    return [f"-j MARK --set-xmark {masquerade_mark(config)}"]


def postrouting_chain(config: ProgrammerConfig, features: Features, hairpin: list[str]) -> list[str]:
    """KUBE-POSTROUTING: masquerade what `hairpin` matches and what is marked; the mark is cleared, lest it act twice."""
    return [
        *(f"{match} {features.masquerade}" for match in hairpin),
        f"-m mark ! --mark {masquerade_mark(config)} -j RETURN",
        f"-j MARK --set-xmark {1 << config.masquerade_bit:#x}/0x0",
        f'-m comment --comment "kubernetes service traffic requiring SNAT" {features.masquerade}',
    ]


def forward_chain(config: ProgrammerConfig) -> list[str]:
    """KUBE-FORWARD: what is forwarded for Services passes, whatever the policy of FORWARD."""
    forward = [
        f'-m comment --comment "kubernetes forwarding rules" -m mark --mark {masquerade_mark(config)} -j ACCEPT',
        '-m comment --comment "kubernetes forwarding conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT',
    ]
    if not config.conntrack_tcp_be_liberal:
        forward.insert(0, "-m conntrack --ctstate INVALID -j DROP")
    return forward
