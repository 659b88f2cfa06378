"""Owns what the environment asks of the suite."""

from __future__ import annotations

import os
from typing import Final, Literal, cast

Mode = Literal["iptables", "ipvs"]
Proxy = Literal["nodeproxy", "kube-proxy"]


def _chosen(variable: str, *allowed: str) -> str:
    value = os.environ.get(variable) or allowed[0]
    if value not in allowed:
        raise SystemExit(f"{variable}={value}: must be one of {', '.join(allowed)}")
    return value


MODE: Final = cast(Mode, _chosen("E2E_MODE", "iptables", "ipvs"))
PROXY: Final = cast(Proxy, _chosen("E2E_PROXY", "nodeproxy", "kube-proxy"))
"""With kube-proxy the suite runs against the peer, so that a wrong test can be told from a wrong proxy."""
ALL_ROLLOUTS: Final = _chosen("E2E_ROLLOUT", "short", "all") == "all"
"""Whether all tests of roll-outs run, and not only a few."""
CLUSTER_NAME: Final = os.environ.get("E2E_CLUSTER") or ("nodeproxy-e2e" if PROXY == "nodeproxy" else "nodeproxy-e2e-peer")
AGNHOST: Final = os.environ.get("E2E_AGNHOST") or "registry.k8s.io/e2e-test-images/agnhost:2.63.0"
NAMESPACE: Final = "e2e"
