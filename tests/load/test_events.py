"""What clients notice of each event, in the short form of `make soak`: a few seconds of load, the event a few times."""

from __future__ import annotations

import pytest

from hack.soak.agents import kube_proxy_binary
from hack.soak.events import EVENTS, Event
from hack.soak.runs import Row, run_event
from nodeproxy.sandbox.load.generator import affordable
from nodeproxy.sandbox.load.plan import CONNECTION, FRESH_FLOW, KEPT_FLOW, STREAM
from tests.ways import IPVS_NFT, LEGACY, NFT, Way, ipvs

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(900)]

RATE, SECONDS = 300.0, 5.0


def cases() -> list[object]:
    """Each event in each way that it makes sense in, except what `make soak` alone does."""
    found: list[object] = []
    for event in EVENTS.values():
        if "iptables" in event.modes:
            found += [pytest.param(event, way, id=f"{event.name}-{way}") for way in (LEGACY, NFT)]
        if (
            not event.needs_kube_proxy
        ):  # minutes in a VM, because kube-proxy starts a process for each entry of an ipset there
            found.append(ipvs(event, IPVS_NFT, id=f"{event.name}-{IPVS_NFT}"))
    return found


@pytest.mark.parametrize(("event", "way"), cases())
def test_clients_notice_nothing(event: Event, way: Way) -> None:
    if event.needs_kube_proxy and kube_proxy_binary() is None:
        pytest.skip("there is no kube-proxy: KUBE_PROXY=path, or hack/controlplane/build.py")
    row = run_event(event, way.mode, way.variant, rate=affordable(RATE), seconds=SECONDS, times=event.short_times)
    print(summary(row))
    assert row.wanting == (), "\n".join([*row.wanting, *row.timeline, *row.traces])
    if event.planned:
        assert (row.failed, row.reset, row.wrong) == (0, 0, 0)
    for kind in (CONNECTION, STREAM, KEPT_FLOW, FRESH_FLOW):
        loaded = [outcome for outcome in row.outcomes if outcome.kind == kind]
        assert {outcome.place for outcome in loaded} == {"pod", "node", "outside"}
        assert all(outcome.count.succeeded > 0 for outcome in loaded)


def summary(row: Row) -> str:
    """What was noticed, in a line."""
    names = (
        "attempts",
        "failed",
        "reset",
        "wrong",
        "borne",
        "gap",
        "repeated",
        "strayed",
        "stall",
        "slowest",
        "stream_stall",
    )
    return f"{row.event}: " + ", ".join(f"{name} {getattr(row, name)}" for name in names)
