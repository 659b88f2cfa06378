"""One roll-out never stops another, whatever is wrong with it."""

from __future__ import annotations

from typing import Any, cast

import msgspec
import pytest
from structlog.testing import capture_logs

from hack.controlplane import ControlPlane
from nodeproxy.api.proxy_node import ObjectMeta
from nodeproxy.operator.act import Actor
from nodeproxy.operator.api import PROXY_ROLLOUTS, ProxyRollout
from nodeproxy.operator.cluster import Cluster
from nodeproxy.operator.lease import Lease
from nodeproxy.operator.metrics import Metrics
from nodeproxy.operator.observe import Common, Observer
from nodeproxy.operator.reconcile import Reconciler
from nodeproxy.operator.world import Action, DaemonSetSeen, NodeSeen, World
from nodeproxy.source.apiserver.connection import StatusError
from tests.operator.conftest import MakeFleet, OperatorProcess, Rollouts
from tests.operator.fleet import MERGE, PROXY_NODES, Faults, eventually


class Server:
    """Three roll-outs. `refuses`: the status of these cannot be written."""

    def __init__(self, refuses: set[str]) -> None:
        self.refuses = refuses
        self.written: list[str] = []

    async def list_raw(self, path: str, query: object = None) -> list[msgspec.Raw]:
        return [_rollout(name) for name in ("a", "b", "c")]

    async def list_as(self, path: str, type: object, query: object = None) -> list[object]:
        return []

    async def send(self, method: str, path: str, body: Any = None, content_type: str = "") -> ObjectMeta:
        name = path.removeprefix(f"{PROXY_ROLLOUTS}/").removesuffix("/status")
        if name in self.refuses:
            raise StatusError(422, "status.nodes[0].reason: Too long")
        self.written.append(name)
        return ObjectMeta(name=name)


def _rollout(name: str) -> msgspec.Raw:
    whole = {
        "metadata": {"name": name, "uid": name, "finalizers": ["nodeproxy.io/rollout"]},
        "spec": {"target": {"mode": "ipvs"}, "nodes": {"names": ["n1"]}},
    }
    return msgspec.Raw(msgspec.json.encode(whole))


class Watching:
    """Sees the world of a roll-out, unless it is one of those that cannot be looked at."""

    def __init__(self, broken: set[str]) -> None:
        self.broken = broken

    async def common(self) -> Common:
        return Common(None, False, {}, {})

    async def world(self, rollout: ProxyRollout, others: object, common: Common) -> World:
        if rollout.metadata.name in self.broken:
            raise KeyError(rollout.metadata.name)
        return World(nodes={"n1": NodeSeen(name="n1")}, daemon_set=DaemonSetSeen(image="i", update_strategy={}))

    def forget(self) -> None:
        return


class Held:
    held = True


class Silent:
    async def carry_out(self, action: Action, rollout: ProxyRollout) -> None:
        return


async def test_a_roll_out_that_cannot_be_carried_on_does_not_stop_the_others() -> None:
    server, metrics = Server({"a"}), Metrics()
    reconciler = Reconciler(
        cast(Cluster, server),
        cast(Observer, Watching({"b"})),
        cast(Actor, Silent()),
        cast(Lease, Held()),
        metrics,
        interval=1.0,
    )
    with capture_logs() as said:
        for _ in range(2):
            assert await reconciler.once()
    assert server.written == ["c", "c"]
    failures = [entry for entry in said if entry["event"].startswith("a roll-out does not come forward")]
    assert [(one["rollout"], one["log_level"], one["error"]) for one in failures] == [
        ("a", "warning", "422: status.nodes[0].reason: Too long"),
        ("b", "error", "KeyError: 'b'"),
    ], "each once"
    assert [one["exc_info"] for one in failures] == [False, True]
    text = metrics.text().decode()
    assert 'nodeproxy_operator_rollout_failures_total{kind="request"} 2.0' in text
    assert 'nodeproxy_operator_rollout_failures_total{kind="fault"} 2.0' in text


@pytest.mark.controlplane
def test_an_agent_that_says_much_fails_its_roll_out_and_no_other(
    cluster: ControlPlane, rollouts: Rollouts, make_fleet: MakeFleet, operator: OperatorProcess
) -> None:
    make_fleet(2).faults["n0"] = Faults(deaf=True)
    checks = {"before": False}
    rollouts.create("spring", {"mode": "ipvs"}, nodes={"names": ["n0"]}, steps=["100%"], checks=checks)
    rollouts.until("spring", "the node is told", lambda status: rollouts.phases("spring").get("n0") == "Changing")

    def told() -> bool:
        return any(item["metadata"]["name"] == "n0" for item in cluster.request("GET", PROXY_NODES)["items"])

    eventually(told, "there is a ProxyNode", 20)
    said = {"observedGeneration": 1000, "mode": "iptables", "message": "x" * 2048}
    cluster.request("PATCH", f"{PROXY_NODES}/n0/status", {"status": said}, content_type=MERGE)
    rollouts.create("summer", {"mode": "ipvs"}, nodes={"names": ["n1"]}, steps=["100%"])
    rollouts.ended("summer", "Completed")
    failed = rollouts.until("spring", "it fails", lambda status: status.get("outcome") == "Failed")
    (line,) = failed["nodes"]
    assert line["reason"].startswith("the agent says: xxx") and line["reason"].endswith("x…")
    assert failed["message"].startswith("node n0: the agent says: xxx")
