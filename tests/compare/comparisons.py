"""Comparisons as `nodeproxy compare` makes them, of as many Services as asked for; with names that nobody should have."""

import random
from collections.abc import Mapping

from nodeproxy.compare.results import (
    Affinity,
    Balance,
    Comparison,
    ConnectLatency,
    Count,
    Difference,
    Expected,
    Figures,
    FrontendResult,
    ModeResult,
    ProbeResult,
    Scope,
    Seen,
    Sender,
    SenderKind,
    spread_of,
)
from nodeproxy.compare.statistics import chi_square, p_value

HOSTILE = {
    0: "<script>window.hacked = 1</script>",
    1: "javascript:window.hacked=1",
    2: "\u202egnp.exe\u2066 \u200fשלום",  # noqa: RUF001
    3: "x" * 300,
    4: '"><img src=http://evil.example/x onerror=window.hacked=1>',
    5: "</style></script><svg onload=window.hacked=1>",
    6: "{{ 7*7 }}{% raw %}",
    7: "a\x00b\x1b[31m",
}
_SENDERS = (
    Sender(SenderKind.POD, "10.244.0.77"),
    Sender(SenderKind.NODE, "192.168.10.2"),
    Sender(SenderKind.OUTSIDE, "192.168.20.9"),
)


def comparison(
    services: int = 60,
    disagreements: int = 3,
    *,
    by_design: int = 12,
    names: Mapping[int, str] | None = None,
    error: str | None = None,
    seed: int = 7,
) -> Comparison:
    """IPVS disagrees at the first `disagreements` Services, and differs by design at the first `by_design`."""
    chosen = random.Random(seed)
    names = {number: f"team-{number % 7}/service-{number}" for number in range(services)} | dict(names or {})
    ways = (("iptables", "legacy", 2.4), ("iptables", "nft", 3.1), ("ipvs", "nft", 1.0))
    modes = [
        _mode(chosen, mode, variant, cost, names=names, wrong=disagreements, by_design=by_design)
        for mode, variant, cost in ways
    ]
    if error:
        modes[-1] = ModeResult("ipvs", "nft", modes[-1].where, error, modes[-1].figures, modes[-1].frontends)
    return Comparison(
        version="0.1.0",
        origin="API server https://10.0.0.1:6443",
        taken="2026-11-24T17:30:00Z",
        node="worker-1",
        machine="2 cores, Debian 12, Linux 6.1.0",
        seed=seed,
        scope=Scope(services, services, services, services * 3, services, services, "all frontends", complete=True),
        modes=tuple(modes),
        disagreements=tuple(_disagreement(number, names) for number in range(min(disagreements, services))),
        by_design=tuple(_design(number, names) for number in range(min(by_design, services))),
        refused=("EndpointSlice team-3/x-abc: endpoints[0].addresses[0]: 300.1.1.1 is no IPv4 address",),
        adapted=("the interface of the node is a veth pair",),
        seconds=93.0,
    )


def _disagreement(number: int, names: Mapping[int, str]) -> Difference:
    backend = f"10.244.9.{number % 250}:8080"
    dropped = number % 3 == 0
    reason = "dropped, where the forwarding table forwards" if dropped else f"answered by {backend}, which is no backend"
    return Difference(
        mode="ipvs (nft)",
        service_port=f"{names[number]}:http",
        frontend=f"10.96.{number // 250}.{number % 250}:80/TCP",
        sender="node 192.168.10.2",
        expected="forward to 10.244.0.3:8080, 10.244.1.4:8080 and 3 more, source kept",
        seen="12 x drop" if dropped else f"6 x {backend}, source 192.168.10.2",
        reason=reason,
        other_modes={"iptables (legacy)": "as expected", "iptables (nft)": "as expected"},
    )


def _design(number: int, names: Mapping[int, str]) -> Difference:
    return Difference(
        mode="ipvs (nft)",
        service_port=f"{names[number]}:http",
        frontend=f"10.96.{number // 250}.{number % 250}:80/TCP",
        sender="pod 10.244.0.77",
        expected="no match",
        seen="4 x connected",
        reason="IPVS mode has the address of the Service on an interface of the node",
    )


def _mode(
    chosen: random.Random, mode: str, variant: str, cost: float, *, names: Mapping[int, str], wrong: int, by_design: int
) -> ModeResult:
    services = len(names)
    changes = tuple(chosen.lognormvariate(0, 0.4) * 0.02 * cost for _ in range(20))
    connects: list[ConnectLatency] = []
    for position, factor in (("first", 1.0), ("last", cost), ("random", cost * 0.6)):
        samples = tuple(chosen.lognormvariate(0, 0.25) * 60 * factor for _ in range(200))
        spread = spread_of(samples)
        assert spread
        connects.append(ConnectLatency(position, "10.96.0.1:80/TCP", samples, spread))
    if mode == "ipvs":
        counts = (Count("rules", 31), Count("virtual servers", services * 2), Count("set entries", services * 4))
    else:
        counts = (Count("rules", services * 12), Count("chains", services * 3))
    return ModeResult(
        mode,
        variant,
        "VM (Linux 6.1.148)" if mode == "ipvs" else "this machine (Linux 6.1.0)",
        figures=Figures(
            first_sync=cost * 0.9,
            changes=changes,
            change=spread_of(changes),
            cpu_own=cost * 0.8,
            cpu_children=cost * 0.3,
            cpu_own_changes=0.2,
            cpu_children_changes=0.1,
            rss=61_000_000,
            rss_peak=78_000_000,
            counts=counts,
            connects=tuple(connects),
        ),
        frontends=tuple(
            _frontend(chosen, number, name, ipvs=mode == "ipvs", wrong=wrong, by_design=by_design)
            for number, name in sorted(names.items())
        ),
        seconds=12.3 * cost,
    )


def _frontend(chosen: random.Random, number: int, name: str, *, ipvs: bool, wrong: int, by_design: int) -> FrontendResult:
    backends = tuple(f"10.244.{place % 3}.{number % 200 + place}:8080" for place in range(2 + number % 5))
    probes = tuple(
        ProbeResult(
            sender=sender,
            expected=Expected("forward", backends),
            seen=tuple(Seen("forward", 4, backend, False, sender.address) for backend in backends),
            agrees=not (ipvs and number < wrong and sender.kind is SenderKind.NODE),
            complete=True,
            by_design="IPVS mode" if ipvs and number < by_design and sender.kind is SenderKind.POD else None,
        )
        for sender in _SENDERS
    )
    counts = {backend: chosen.randint(35, 50) for backend in backends}
    if number == 4:
        counts = {backend: 90 if place == 0 else 5 for place, backend in enumerate(backends)}
    statistic, degrees = chi_square([*counts.values()]), len(counts) - 1
    chance = p_value(statistic, degrees)
    balance = Balance(_SENDERS[0], counts, statistic, degrees, chance, exact=ipvs, even=chance > 1e-4)
    return FrontendResult(
        service_port=f"{name}:http",
        family=4,
        protocol="TCP",
        kind="cluster IP",
        address=f"10.96.{number // 250}.{number % 250}",
        port=80,
        policy="cluster IP, forward to all endpoints",
        endpoints=len(backends),
        probes=probes,
        balance=balance if number % 3 == 1 else None,
        affinity=Affinity(8, 6 if number == 20 else 8, len(backends), spread=True) if number % 20 == 0 else None,
    )
