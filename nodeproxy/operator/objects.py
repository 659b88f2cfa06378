"""Owns the shape of what the operator reads of Nodes, pods and DaemonSets, and what it makes of them."""

from __future__ import annotations

from typing import Any, Final

from nodeproxy.api.proxy_node import PROXY_LABEL, ApiObjectBase, ObjectMeta
from nodeproxy.operator.api import NODEPROXY
from nodeproxy.operator.world import DaemonSetSeen, NodeSeen, PodSeen

_TEMPLATE_GENERATION: Final = "deprecated.daemonset.template.generation"
"""The API server counts a DaemonSet's templates in this annotation, and the controller labels pods with the count. It is
what the controller itself tells a pod of the present template by, whatever a webhook made of the pod."""
_POD_GENERATION: Final = "pod-template-generation"


class _Condition(ApiObjectBase, frozen=True):
    type: str = ""
    status: str = ""


class _Address(ApiObjectBase, frozen=True):
    type: str = ""
    address: str = ""


class _NodeStatus(ApiObjectBase, frozen=True):
    conditions: list[_Condition] | None = None
    addresses: list[_Address] | None = None


class Node(ApiObjectBase, frozen=True):
    """A Node."""

    metadata: ObjectMeta
    status: _NodeStatus = _NodeStatus()

    def seen(self) -> NodeSeen:
        """What matters of it. The address is its first internal one."""
        addresses = [one.address for one in self.status.addresses or [] if one.type == "InternalIP"]
        return NodeSeen(
            name=self.metadata.name,
            uid=self.metadata.uid or "",
            ready=any(one.type == "Ready" and one.status == "True" for one in self.status.conditions or []),
            labels=self.metadata.labels or {},
            address=addresses[0] if addresses else None,
        )


class _Reason(ApiObjectBase, frozen=True):
    reason: str | None = None
    message: str | None = None
    exit_code: int | None = None


class _State(ApiObjectBase, frozen=True):
    waiting: _Reason | None = None
    terminated: _Reason | None = None


class _ContainerStatus(ApiObjectBase, frozen=True):
    name: str = ""
    state: _State = _State()
    restart_count: int = 0


class _PodStatus(ApiObjectBase, frozen=True):
    phase: str | None = None
    conditions: list[_Condition] | None = None
    container_statuses: list[_ContainerStatus] | None = None
    message: str | None = None


class _Container(ApiObjectBase, frozen=True):
    name: str = ""
    image: str = ""
    args: tuple[str, ...] = ()


class _PodSpec(ApiObjectBase, frozen=True):
    node_name: str | None = None
    containers: tuple[_Container, ...] = ()
    node_selector: dict[str, str] | None = None

    def agent_image(self) -> str:
        """The image of the agent's container; that of the first one where none has its name."""
        named = (one.image for one in self.containers if one.name == NODEPROXY)
        return next(named, self.containers[0].image if self.containers else "")


class Pod(ApiObjectBase, frozen=True):
    """A pod."""

    metadata: ObjectMeta
    spec: _PodSpec = _PodSpec()
    status: _PodStatus = _PodStatus()

    def seen(self) -> PodSeen:
        """What matters of it. The image is that of the agent's container, which need not be the first."""
        return PodSeen(
            name=self.metadata.name,
            uid=self.metadata.uid or "",
            image=self.spec.agent_image(),
            ready=any(one.type == "Ready" and one.status == "True" for one in self.status.conditions or []),
            deleting=self.metadata.deletion_timestamp is not None,
            trouble=self.trouble(),
            template_generation=(self.metadata.labels or {}).get(_POD_GENERATION),
        )

    def trouble(self) -> str | None:
        """Why a container waits, or ended, in the kubelet's words."""
        for one in self.status.container_statuses or []:
            why = one.state.waiting or one.state.terminated
            if why is not None and why.reason not in (None, "ContainerCreating", "Completed"):
                text = f"{why.reason}{f' ({why.message.strip()[:160]})' if why.message else ''}"
                return f"{text}, {one.restart_count} restarts" if one.restart_count else text
        return self.status.message

    def termination(self) -> str | None:
        """What its first container left when it ended; empty text where it left nothing; None: it has not ended."""
        if self.status.phase not in ("Succeeded", "Failed"):
            return None
        for one in self.status.container_statuses or []:
            if one.state.terminated is not None:
                return one.state.terminated.message or ""
        return ""


class _Template(ApiObjectBase, frozen=True):
    spec: _PodSpec = _PodSpec()


class _DaemonSetSpec(ApiObjectBase, frozen=True):
    template: _Template = _Template()
    update_strategy: dict[str, Any] | None = None


class _DaemonSetStatus(ApiObjectBase, frozen=True):
    observed_generation: int = 0
    desired_number_scheduled: int = 0
    updated_number_scheduled: int = 0


class DaemonSet(ApiObjectBase, frozen=True):
    """A DaemonSet."""

    metadata: ObjectMeta
    spec: _DaemonSetSpec = _DaemonSetSpec()
    status: _DaemonSetStatus = _DaemonSetStatus()

    def seen(self) -> DaemonSetSeen:
        """What matters of it."""
        pod, status = self.spec.template.spec, self.status
        selector = pod.node_selector or {}
        return DaemonSetSeen(
            image=next((one.image for one in pod.containers if one.name == NODEPROXY), ""),
            update_strategy=self.spec.update_strategy or {"type": "RollingUpdate"},
            observed=status.observed_generation >= self.metadata.generation,
            by_label=PROXY_LABEL in selector,
            desired=status.desired_number_scheduled,
            updated=status.updated_number_scheduled,
            template_generation=(self.metadata.annotations or {}).get(_TEMPLATE_GENERATION),
            node_selector={key: value for key, value in selector.items() if key != PROXY_LABEL},
        )
