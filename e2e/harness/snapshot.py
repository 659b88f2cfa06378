"""Owns what is shown of the cluster when a test has failed: its objects, and what the agents said last."""

from __future__ import annotations

from collections.abc import Callable

from e2e.harness.settings import NAMESPACE
from e2e.harness.stage import Stage

_LINES = 25


def snapshot(stage: Stage) -> str:
    """Services, slices and pods of the tests, the nodes, and the end of each agent's log. Never raises."""
    kubectl = stage.cluster.kubectl
    parts = [
        _told("objects", lambda: kubectl("-n", NAMESPACE, "get", "services,endpointslices,pods", "-o", "wide")),
        _told("nodes", lambda: kubectl("get", "nodes", "-o", "wide")),
    ]
    for name in _told("", lambda: kubectl(*_AGENTS, "-o", "name")).split():
        logs = ("-n", "kube-system", "logs", name, f"--tail={_LINES}", "--request-timeout=10s")
        parts.append(_told(name, lambda logs=logs: kubectl(*logs)))  # type: ignore[misc]
    return "\n".join(parts)


_AGENTS = ("-n", "kube-system", "get", "pods", "-l", "k8s-app in (nodeproxy, kube-proxy)")


def _told(title: str, look: Callable[[], str]) -> str:
    try:
        text = look()
    except Exception as error:
        text = f"not to be had: {error}"
    return f"--- {title}\n{text}" if title else text
