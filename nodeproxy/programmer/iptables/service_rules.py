"""Owns the translation of one row of the forwarding table into chains, dispatch entries and affinity sets. Pure text.

Rules are written exactly as iptables-save prints them (both variants print alike), so that the kernel can be compared with
what is wanted chain by chain. Everything that reaches rule text comes from the forwarding table, whose addresses, names and
numbers were validated in `nodeproxy.cluster`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from msgspec import Struct

from nodeproxy.forwarding.table import (
    Action,
    Backend,
    BackendSet,
    Family,
    Frontend,
    FrontendKind,
    IPProtocol,
    Masquerade,
    ServicePort,
    ServicePortKey,
)
from nodeproxy.programmer.base import LocalDetector
from nodeproxy.programmer.iptables.dispatch import Leaf
from nodeproxy.programmer.rules.common import FROM_NODE, source_matches
from nodeproxy.programmer.rules.names import AFFINITY_SET, MARK_MASQ, endpoint_hash, service_hash


class AffinitySet(Struct, frozen=True):
    """An ipset (hash:ip) of the clients that hold on to one endpoint of a row."""

    name: str
    key: ServicePortKey


class ServiceRules(Struct, frozen=True):
    """One row as rules: chains of the nat table, and for each frontend its dispatch leaves in the nat and filter tables."""

    protocol: IPProtocol
    chains: dict[str, list[str]]
    nat: list[tuple[Frontend, Leaf]]
    filter: list[tuple[Frontend, Leaf]]
    sets: list[AffinitySet]


class Translator:
    """Translates rows for one family and one way of telling local pods apart.

    With `hairpin_chains` every endpoint gets a chain that marks what it sends to itself: for kernels without BPF matches,
    where no single rule can recognise that.
    """

    def __init__(self, family: Family, detector: LocalDetector, hairpin_chains: bool = False) -> None:
        self._hairpin_chains = hairpin_chains
        self._family = family
        self._affinity = AFFINITY_SET[family]
        self._reject = "icmp-port-unreachable" if family is Family.IPV4 else "icmp6-port-unreachable"
        self._from_pods, self._not_from_pods = source_matches(family, detector)

    def translate(self, row: ServicePort) -> ServiceRules:
        """All chains, dispatch leaves and sets of a row."""
        rules = ServiceRules(row.key.protocol, {}, [], [], [])
        name_hash = service_hash(row.key)
        internal = [frontend for frontend in row.frontends if frontend.kind is FrontendKind.CLUSTER_IP]
        external = [frontend for frontend in row.frontends if frontend.kind is not FrontendKind.CLUSTER_IP]
        for chain, which in ((f"KUBE-SVC-{name_hash}", BackendSet.CLUSTER), (f"KUBE-SVL-{name_hash}", BackendSet.LOCAL)):
            if row.backends(which):
                masquerading = [front for front in internal if front.backend_set is which and front.action is Action.FORWARD]
                rules.chains[chain] = [*self._masquerade(row, masquerading), *self._balance(row, which, rules)]
        reached = [front for front in external if front.action is Action.FORWARD or front.short_cuts]
        if reached:
            rules.chains[f"KUBE-EXT-{name_hash}"] = self._external(reached[0], name_hash)
        firewalled = [front for front in reached if front.allowed_sources is not None]
        if firewalled:
            rules.chains[f"KUBE-FW-{name_hash}"] = _firewall(firewalled, name_hash)
        for frontend in row.frontends:
            self._dispatch(row, frontend, name_hash, rules)
        return rules

    def _masquerade(self, row: ServicePort, frontends: Sequence[Frontend]) -> Iterator[str]:
        protocol = row.key.protocol
        for frontend in frontends:
            destination = f"-d {frontend.address}/{self._family.address_bits}"
            match = f"-p {protocol} -m {protocol} --dport {frontend.port}"
            if frontend.masquerade is Masquerade.ALWAYS:
                yield f"{destination} {match} -j {MARK_MASQ}"
            elif frontend.masquerade is Masquerade.NOT_LOCAL_PODS and self._not_from_pods is not None:
                source, interface = self._not_from_pods
                yield " ".join(part for part in (source, destination, interface, match) if part) + f" -j {MARK_MASQ}"

    def _external(self, frontend: Frontend, name_hash: str) -> list[str]:
        """KUBE-EXT chain; all external frontends of a row share their policy."""
        cluster, local = f"-j KUBE-SVC-{name_hash}", f"-j KUBE-SVL-{name_hash}"
        rules = []
        if frontend.masquerade is Masquerade.ALWAYS:
            rules.append(f"-j {MARK_MASQ}")
        if frontend.short_cuts:
            if self._from_pods is not None:
                rules.append(f"{self._from_pods} {cluster}")
            rules += [f"{FROM_NODE} -j {MARK_MASQ}", f"{FROM_NODE} {cluster}"]
        if frontend.action is Action.FORWARD:
            rules.append(cluster if frontend.backend_set is BackendSet.CLUSTER else local)
        return rules

    def _balance(self, row: ServicePort, which: BackendSet, rules: ServiceRules) -> Iterator[str]:
        """Each new connection goes to one backend, all with equal chances; with affinity to the one it had before."""
        backends = row.backends(which)
        protocol = row.key.protocol
        if row.affinity_seconds is None and not self._hairpin_chains:
            targets = [f"-j DNAT --to-destination {_endpoint(backend)}" for backend in backends]
        else:
            hashes = [endpoint_hash(row.key, _endpoint(backend)) for backend in backends]
            for backend, name in zip(backends, hashes, strict=True):
                self._endpoint_chain(row, backend, name, rules)
            if row.affinity_seconds is not None:
                yield from (f"-m set --match-set {self._affinity}{name} src -j KUBE-SEP-{name}" for name in hashes)
            targets = [f"-j KUBE-SEP-{name}" for name in hashes]
        for position, target in enumerate(targets):
            yield f"-p {protocol} {_share(len(targets) - position)}{target}"

    def _endpoint_chain(self, row: ServicePort, backend: Backend, name: str, rules: ServiceRules) -> None:
        """KUBE-SEP chain of an endpoint: with affinity remember the client (anew with each connection), then go there."""
        if f"KUBE-SEP-{name}" in rules.chains:
            return
        chain = rules.chains[f"KUBE-SEP-{name}"] = []
        if self._hairpin_chains:
            chain.append(f"-s {backend.address}/{self._family.address_bits} -j {MARK_MASQ}")
        if row.affinity_seconds is not None:
            rules.sets.append(AffinitySet(f"{self._affinity}{name}", row.key))
            chain.append(f"-j SET --add-set {self._affinity}{name} src --exist --timeout {row.affinity_seconds}")
        chain.append(f"-p {row.key.protocol} -j DNAT --to-destination {_endpoint(backend)}")

    def _dispatch(self, row: ServicePort, frontend: Frontend, name_hash: str, rules: ServiceRules) -> None:
        label = f"{row.key.name} {frontend.kind}"
        if frontend.action is Action.REJECT:
            target = f"-j REJECT --reject-with {self._reject}"
            rules.filter.append((frontend, Leaf(f"{row.key.name} has no endpoints", target)))
            return
        if frontend.action is Action.DROP:
            rules.filter.append((frontend, Leaf(f"{row.key.name} has no local endpoints", "-j DROP")))
        elif frontend.allowed_sources is not None:
            rules.filter.append((frontend, Leaf(f"{row.key.name} source not allowed", "-j DROP")))
        if frontend.kind is FrontendKind.CLUSTER_IP:
            if frontend.action is Action.FORWARD:
                chain = "SVC" if frontend.backend_set is BackendSet.CLUSTER else "SVL"
                rules.nat.append((frontend, Leaf(label, f"-j KUBE-{chain}-{name_hash}")))
        elif frontend.action is Action.FORWARD or frontend.short_cuts:
            chain = "EXT" if frontend.allowed_sources is None else "FW"
            rules.nat.append((frontend, Leaf(label, f"-j KUBE-{chain}-{name_hash}")))


def _endpoint(backend: Backend) -> str:
    return f"[{backend.address}]:{backend.port}" if ":" in backend.address else f"{backend.address}:{backend.port}"


@lru_cache(maxsize=4096)
def _share(remaining: int) -> str:
    """Match that holds with probability 1/remaining, as iptables-save prints it: the kernel keeps 31 bits of it."""
    if remaining == 1:
        return ""
    return f"-m statistic --mode random --probability {round(0x80000000 / remaining) / 0x80000000:.11f} "


def _firewall(frontends: Sequence[Frontend], name_hash: str) -> list[str]:
    """KUBE-FW chain: who is allowed goes on; the rest falls through, to be dropped in the filter table."""
    sources: dict[str, None] = {}
    for frontend in frontends:
        sources.update(dict.fromkeys(frontend.allowed_sources or ()))
    return [
        f"-s {source} -j KUBE-EXT-{name_hash}" if not source.endswith("/0") else f"-j KUBE-EXT-{name_hash}"
        for source in sources
    ]
