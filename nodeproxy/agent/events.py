"""Owns what the agent tells the cluster by Kubernetes Events: the reasons, and the interface of those who record them.

Events are for people (`kubectl describe`): what is wrong with their Service on this node, what happened to the node's
Services. They are observers' work: nothing waits for them, and losing one loses nothing else.
"""

from __future__ import annotations

from typing import Final, Protocol

import structlog

from nodeproxy.forwarding.table import ServiceName

_log = structlog.get_logger(__name__)

# Reasons. Those of kube-proxy are kept where the same thing happened.
STARTING: Final = "Starting"
"""Node: the agent serves."""
REFUSED_BY_KERNEL: Final = "ServicePortRefused"
"""Service: the kernel refuses one of its ServicePorts; all others are programmed."""
REFUSED_FIELD: Final = "FieldRefused"
"""Service: part of the object cannot be programmed; the note begins with the field."""
HEALTH_CHECK_FAILED: Final = "FailedToStartServiceHealthcheck"
"""Service: its health-check node port cannot be listened on."""
MODE_SWITCHED: Final = "ModeSwitched"
"""Node: another mode carries Services from now on."""
MODE_SWITCH_FAILED: Final = "ModeSwitchFailed"
"""Node: the wanted mode cannot be had; the present one goes on."""
FELL_BACK: Final = "FallbackMode"
"""Node: the agent started in another mode than the configured one."""
ANOTHER_PROXY_RUNS: Final = "AnotherServiceProxyRuns"
"""Node: kube-proxy or another nodeproxy runs here, and the agent waits until it has ended."""
CONFIG_REFUSED: Final = "ConfigurationRefused"
"""Node: a changed configuration is not applied; the present one goes on."""
HEALTHZ_FAILED: Final = "FailedToStartProxierHealthcheck"
"""Node: the address of /healthz cannot be listened on."""
METRICS_FAILED: Final = "FailedToStartMetricServer"
"""Node: the address of /metrics cannot be listened on."""

_ACTIONS: Final = {
    STARTING: "StartNodeproxy",
    REFUSED_BY_KERNEL: "Program",
    REFUSED_FIELD: "Validate",
    HEALTH_CHECK_FAILED: "Listen",
    MODE_SWITCHED: "SwitchMode",
    MODE_SWITCH_FAILED: "SwitchMode",
    FELL_BACK: "StartNodeproxy",
    ANOTHER_PROXY_RUNS: "TakeOver",
    CONFIG_REFUSED: "Configure",
    HEALTHZ_FAILED: "StartNodeproxy",
    METRICS_FAILED: "StartNodeproxy",
}


def action_of(reason: str) -> str:
    """What was being done when it happened: the API wants that of every Event."""
    return _ACTIONS.get(reason, "Sync")


class EventRecorder(Protocol):
    """Takes Events. Called on the event loop; never blocks and never raises."""

    def service(self, name: ServiceName, reason: str, note: str, *, warning: bool = True) -> None:
        """Something happened to a Service on this node."""

    def node(self, reason: str, note: str, *, warning: bool = False) -> None:
        """Something happened to this node's Services as a whole."""


class NoEvents:
    """For an agent without an API server: there is nobody to write to."""

    def service(self, name: ServiceName, reason: str, note: str, *, warning: bool = True) -> None:
        """Logged for debugging."""
        _log.debug("event", service=str(name), reason=reason, note=note, warning=warning)

    def node(self, reason: str, note: str, *, warning: bool = False) -> None:
        """Logged for debugging."""
        _log.debug("event", reason=reason, note=note, warning=warning)
