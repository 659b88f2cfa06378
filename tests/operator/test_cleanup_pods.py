"""Cleanups of nodes: pods that people made and left, as the guide to migrating says, keep none from being cleaned up."""

from __future__ import annotations

import pytest
import yaml

from hack.controlplane import ControlPlane
from tests.operator.conftest import DEPLOY, MakeFleet, OperatorProcess, Rollouts
from tests.operator.fleet import SYSTEM

pytestmark = pytest.mark.controlplane


def test_a_cleanup_that_is_left_from_migrating_by_hand_is_replaced(
    cluster: ControlPlane, rollouts: Rollouts, make_fleet: MakeFleet, operator: OperatorProcess
) -> None:
    make_fleet(1, by_label=True)
    left = yaml.safe_load((DEPLOY / "migration" / "cleanup.yaml").read_text().replace("NODE", "n0"))
    cluster.request("POST", f"{SYSTEM}/pods", left)
    rollouts.create("back", {"proxy": "kube-proxy"}, steps=["100%"])
    rollouts.ended("back", "Completed")
