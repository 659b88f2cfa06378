"""The status in words: what is hostile is shown harmless, long lists are cut and counted, times are readable."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from nodeproxy.agent.status import (
    AgentStatus,
    Counts,
    Drift,
    LastSync,
    Problems,
    Refusal,
    Refusals,
    SourceState,
    SyncState,
    Trouble,
)
from nodeproxy.cli.status import lines
from nodeproxy.cluster.findings import printable
from nodeproxy.configuration.agent_config import Mode

NOW = "2026-01-02T03:04:05Z"
WELL = AgentStatus(
    version="1",
    node="n",
    mode=Mode.IPTABLES,
    configured_mode=Mode.IPTABLES,
    variant="nft",
    pid=7,
    started="2026-01-01T00:00:00Z",
    now=NOW,
    in_sync=True,
    why_not=(),
    sync=SyncState(True, 0, True, LastSync("2026-01-02T03:04:00Z", 0.0123, False, 4)),
    source=SourceState("API server (in-cluster)", True, "2026-01-02T03:03:05Z", {}),
    counts=Counts(1, 2, 3, 12_345, 0, {"IPv4": {"nat": 1_000}}),
    refused=Refusals(0, ()),
    problems=Problems(0, ()),
    most_backends=(),
    most_frontends=(),
    audits=5,
    last_audit=NOW,
    drift=(),
    errors=(),
    draining_real_servers=0,
    other_proxies=(),
)


def shown(**changes: Any) -> list[str]:
    return [f"{title} {text}".strip() for title, text, _ in lines(replace(WELL, **changes))]


def test_all_is_well() -> None:
    assert shown() == [
        "in sync",
        "Agent nodeproxy 1, iptables mode (nft), node n, pid 7, since 2026-01-01T00:00:00Z (1 d 3 h)",
        "Sync last 5 s ago, took 12 ms (4 ServicePorts); nothing pending",
        "Source API server (in-cluster); lists complete; last event 1 m ago",
        "Holds 1 Services, 2 ServicePorts, 3 frontends, 12,345 backends, 0 health-check ports",
        "IPv4 rules: nat 1,000",
        "Drift none seen; 5 audits, last 0 s ago",
    ]


def test_what_is_wrong_is_told() -> None:
    text = shown(
        in_sync=False,
        why_not=("the last sync failed: no",),
        configured_mode=Mode.IPVS,
        sync=SyncState(True, 3, False, error=Trouble(NOW, "sync", "no", 2), retry_seconds=4.5),
        refused=Refusals(12, tuple(Refusal(f"ns/s{number}", "why") for number in range(12)), 2.0),
        drift=(Drift(NOW, ("rules of IPv4",)),),
        errors=(Trouble(NOW, "audit", "first"), Trouble(NOW, "sync", "no", 2)),
        draining_real_servers=9,
        other_proxies=("kube-proxy runs on this node",),
    )
    for line in (
        "NOT IN SYNC",
        "the last sync failed: no",
        "configured is ipvs mode",
        f"Sync none yet; 3 Services pending, late; failed at {NOW}: no; again in 4.5 s",
        f"{NOW} changed by somebody: rules of IPv4; not put back yet",
        "Refused ns/s0: why (again in 2 s)",
        "and 2 more",
        "Draining 9 real servers keep their connections and get no new ones",
        "Others kube-proxy runs on this node",
        f"Errors {NOW} sync: no (2 times)",
        f"{NOW} audit: first",
    ):
        assert line in text


def test_nothing_that_a_terminal_acts_upon_is_shown() -> None:
    assert printable("a\x1b[31mb\nc\u202e") == "a\\x1b[31mb\\x0ac\\x202e"
