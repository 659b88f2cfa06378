"""Random rows of a forwarding table, as valid as `nodeproxy.forwarding` makes them."""

from __future__ import annotations

from hypothesis import strategies as st

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
    ServicePortName,
)

_CLUSTER, _LOCAL = BackendSet.CLUSTER, BackendSet.LOCAL


def _addresses(family: Family, net: int) -> st.SearchStrategy[str]:
    pattern = "10.{net}.{high}.{low}" if family is Family.IPV4 else "fd00:{net}::{high}:{low}"
    return st.builds(lambda high, low: pattern.format(net=net, high=high, low=low), st.integers(1, 3), st.integers(1, 200))


def _backends(family: Family) -> st.SearchStrategy[tuple[Backend, ...]]:
    backend = st.builds(Backend, _addresses(family, 200), st.sampled_from([80, 8080]), st.booleans())
    return st.lists(backend, max_size=4, unique_by=lambda b: (b.address, b.port)).map(lambda found: tuple(sorted(found)))


@st.composite
def service_ports(draw: st.DrawFn, family: Family, key: ServicePortKey, index: int) -> ServicePort:
    """A row whose frontends no other `index` has."""
    cluster = draw(_backends(family))
    local = tuple(backend for backend in cluster if backend.local)
    internal_local, external_local = draw(st.booleans()), draw(st.booleans())
    masquerade = draw(st.sampled_from([Masquerade.ALWAYS, Masquerade.NOT_LOCAL_PODS]))

    def action(is_local: bool) -> Action:
        if not cluster:
            return Action.REJECT
        return Action.DROP if is_local and not local else Action.FORWARD

    port = draw(st.sampled_from([80, 443]))
    frontends = [
        Frontend(
            FrontendKind.CLUSTER_IP,
            f"10.96.{index}.1" if family is Family.IPV4 else f"fd00:96::{index:x}",
            port,
            action(internal_local),
            _LOCAL if internal_local else _CLUSTER,
            masquerade,
        )
    ]
    ranges = draw(st.sampled_from([None, ("192.0.2.0/24",) if family is Family.IPV4 else ("2001:db8::/32",)]))
    for kind in draw(st.sets(st.sampled_from(list(FrontendKind)[1:]))):
        address = f"10.{97 + len(kind)}.{index}.1" if family is Family.IPV4 else f"fd00:{len(kind)}::{index:x}"
        frontends.append(
            Frontend(
                kind,
                None if kind is FrontendKind.NODE_PORT else address,
                30000 + index if kind is FrontendKind.NODE_PORT else port,
                action(external_local),
                _LOCAL if external_local else _CLUSTER,
                Masquerade.NEVER if external_local else Masquerade.ALWAYS,
                short_cuts=external_local and bool(cluster),
                allowed_sources=ranges if kind is FrontendKind.LOAD_BALANCER_IP else None,
            )
        )
    uses_local = internal_local or (external_local and len(frontends) > 1)
    return ServicePort(
        key, tuple(frontends), cluster, local if uses_local else (), draw(st.sampled_from([None, None, 60, 10800]))
    )


@st.composite
def row_changes(draw: st.DrawFn, family: Family) -> list[dict[ServicePortKey, ServicePort | None]]:
    """A sequence of changes of up to 20 rows; None removes."""
    steps = []
    for _ in range(draw(st.integers(1, 8))):
        step: dict[ServicePortKey, ServicePort | None] = {}
        for index in draw(st.sets(st.integers(0, 19), max_size=8)):
            protocol = list(IPProtocol)[index % 3]
            key = ServicePortKey(family, ServicePortName("ns", f"svc{index}", "p" if index % 2 else ""), protocol)
            step[key] = draw(st.one_of(st.none(), service_ports(family, key, index), service_ports(family, key, index)))
        steps.append(step)
    return steps
