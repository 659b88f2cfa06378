"""The ipsets of IPVS mode on a real kernel: what is listed is what was wanted, and a set grows when it is full."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

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
from nodeproxy.kernel.ipset import IPSets
from nodeproxy.programmer.ipvs.names import SetName
from nodeproxy.programmer.ipvs.sets import ServiceSets
from nodeproxy.programmer.ipvs.wanted import Wanted
from nodeproxy.sandbox.namespace import Namespace, unique_stem

pytestmark = pytest.mark.kernel

SOURCES = {
    Family.IPV4: ("10.0.0.0/8", "192.0.2.128/25", "203.0.113.7/32"),
    Family.IPV6: ("fd00::/8", "2001:db8::/33", "2001:db8::7/128"),
}
ADDRESS = {Family.IPV4: ("203.0.113.9", "10.1.0.1"), Family.IPV6: ("2001:db8::9", "fd00:10::1")}


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace(f"{unique_stem()}-sets") as made:
        yield made


@pytest.mark.parametrize("family", list(Family))
def test_source_ranges_are_listed_as_they_are_wanted(namespace: Namespace, family: Family) -> None:
    """Else each audit would find them changed by somebody."""
    frontend, backend = ADDRESS[family]
    row = ServicePort(
        ServicePortKey(family, ServicePortName("ns", "web", ""), IPProtocol.TCP),
        (
            Frontend(
                FrontendKind.LOAD_BALANCER_IP,
                frontend,
                80,
                Action.FORWARD,
                BackendSet.CLUSTER,
                Masquerade.ALWAYS,
                allowed_sources=SOURCES[family],
            ),
        ),
        (Backend(backend, 8080, False),),
        (),
    )

    def inside() -> None:
        wanted = Wanted(family, "rr", loop_back=False)
        sets = ServiceSets(family, IPSets())
        sets.read()
        added = wanted.change({row.key: row}).added
        assert len(added[SetName.ALLOWED_SOURCES]) == 3
        assert not sets.add(added)
        for _ in SetName:
            assert sets.differ() == ""
            sets._compare_at = 0.0
        again = ServiceSets(family, IPSets())
        again.read()
        assert again.entries(SetName.ALLOWED_SOURCES) == added[SetName.ALLOWED_SOURCES]

    namespace.run(inside)


@pytest.mark.parametrize("seconds", [0.0, 60.0], ids=["in turn", "all at once"])
def test_an_exchanged_entry_is_found(namespace: Namespace, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr("nodeproxy.programmer.ipvs.sets._LOOK_SECONDS", seconds)

    def inside() -> list[str]:
        sets = ServiceSets(Family.IPV4, IPSets())
        sets.read()
        assert not sets.add({SetName.CLUSTER_IP: {"10.96.0.1,tcp:80"}})
        IPSets().remove("KUBE-CLUSTER-IP", {"10.96.0.1,tcp:80"})
        IPSets().add("KUBE-CLUSTER-IP", {"10.96.0.2,tcp:80"})
        found = []
        for _ in SetName:
            found.append(sets.differ())
            sets._compare_at = 0.0
        return found

    found = namespace.run(inside)
    assert set(found) == {"ipset KUBE-CLUSTER-IP", *([] if seconds else [""])}


def test_a_set_that_is_full_is_replaced_by_a_larger_one_which_a_restart_keeps(namespace: Namespace) -> None:
    entries = {f"10.{number >> 16}.{number >> 8 & 255}.{number & 255},tcp:80" for number in range(66_000)}

    def inside() -> None:
        sets = ServiceSets(Family.IPV4, IPSets())
        sets.read()
        assert not sets.add({SetName.CLUSTER_IP: entries})
        again = ServiceSets(Family.IPV4, IPSets())
        again.read()
        assert again.entries(SetName.CLUSTER_IP) == entries

    namespace.run(inside)
