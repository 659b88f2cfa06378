"""Operators that come, end and are killed, against a real API server; nodes are played (`Fleet`)."""

from __future__ import annotations

import signal

import pytest

from hack.controlplane import ControlPlane
from nodeproxy.sandbox.pace import scaled
from tests.operator.conftest import MakeFleet, MakeOperator, Rollouts
from tests.operator.fleet import eventually

pytestmark = pytest.mark.controlplane


def test_killed_in_the_middle_another_goes_on(
    rollouts: Rollouts, make_fleet: MakeFleet, make_operator: MakeOperator
) -> None:
    fleet = make_fleet(4)
    first = make_operator("first")
    rollouts.create("spring", {"mode": "ipvs"}, steps=["100%"])
    rollouts.until("spring", "a node is done", lambda status: status.get("counts", {}).get("updated", 0) >= 1)
    first.end(signal.SIGKILL)
    make_operator("second")
    rollouts.ended("spring", "Completed")
    changes = [one for one in fleet.trail if "mode" in one]
    assert sorted(changes) == [f"n{i} mode ipvs" for i in range(4)], "each node was changed once"


def test_of_two_replicas_one_acts_and_the_other_takes_over_at_once(
    rollouts: Rollouts, make_fleet: MakeFleet, make_operator: MakeOperator
) -> None:
    fleet = make_fleet(2)
    first = make_operator("first")
    eventually(lambda: "this replica acts" in first.log(), "the first acts", scaled(20))
    second = make_operator("second")
    eventually(lambda: "another replica acts" in second.log(), "the second waits", scaled(20))
    rollouts.create("spring", {"mode": "ipvs"}, steps=[1, "100%"], soakSeconds=3600)
    rollouts.until("spring", "it soaks", lambda status: status.get("phase") == "Soaking")
    assert "spring" not in second.log()
    assert first.end() == 0
    rollouts.edit("spring", soakSeconds=0, steps=["100%"])
    eventually(lambda: "this replica acts" in second.log(), "the second acts", scaled(20))
    rollouts.ended("spring", "Completed")
    assert [one for one in fleet.trail if "mode" in one] == ["n0 mode ipvs", "n1 mode ipvs"]


def test_an_operator_without_rights_says_so_and_ends_quickly_by_sigterm(
    cluster: ControlPlane, make_operator: MakeOperator
) -> None:
    role = "/apis/rbac.authorization.k8s.io/v1/namespaces/kube-system/rolebindings/nodeproxy-operator"
    binding = cluster.request("GET", role)
    cluster.request("DELETE", role)
    try:
        operator = make_operator("poor")
        eventually(lambda: "cannot get the Lease" in operator.log(), "it says so", scaled(20))
        assert "leases.coordination.k8s.io" in operator.log() and "Traceback" not in operator.log()
        assert operator.end() == 0
    finally:
        made = {key: binding[key] for key in ("apiVersion", "kind", "roleRef", "subjects")}
        collection = role.rpartition("/")[0]
        cluster.request("POST", collection, {**made, "metadata": {"name": "nodeproxy-operator"}})
