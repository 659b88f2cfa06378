"""Owns what `plan` looks at and what it asks for: the cluster as observed, and actions.

An action is idempotent, and conditional on what was observed: it is asked for again until it is seen to have happened.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from msgspec import Struct

from nodeproxy.api.proxy_node import ProxyNode
from nodeproxy.operator.api import ProbeFigures

_OS: Final = "kubernetes.io/os"
_LINUX: Final = "linux"


class NodeSeen(Struct, frozen=True):
    """A Node. `proxy`: value of the label nodeproxy.io/proxy."""

    name: str
    uid: str = ""
    ready: bool = True
    labels: dict[str, str] = {}
    address: str | None = None

    @property
    def proxy(self) -> str | None:
        """What the label says."""
        return self.labels.get("nodeproxy.io/proxy")


class PodSeen(Struct, frozen=True):
    """A pod of the agent or of kube-proxy. `trouble`: why it does not run, as the kubelet says.

    `template_generation`: of which template of its DaemonSet it was made; None: its labels do not say.
    """

    name: str
    uid: str
    image: str = ""
    ready: bool = False
    deleting: bool = False
    trouble: str | None = None
    template_generation: str | None = None


class DaemonSetSeen(Struct, frozen=True):
    """The agent's DaemonSet. `observed`: its controller has seen the present template. `by_label`: for labelled nodes.

    `node_selector`: that of its pods, without the label nodeproxy.io/proxy.
    """

    image: str
    update_strategy: dict[str, Any]
    observed: bool = True
    by_label: bool = False
    desired: int = 0
    updated: int = 0
    template_generation: str | None = None
    node_selector: dict[str, str] = {}

    def keeps_off(self, node: NodeSeen) -> str | None:
        """The label that a Node lacks for the agent to run there, as key=value; None: it lacks none."""
        for key, value in self.node_selector.items():
            if node.labels.get(key) != value:
                return f"{key}={value}"
        if node.labels.get(_OS, _LINUX) != _LINUX:  # the agent is for no other system, whatever the selector says
            return f"{_OS}={_LINUX}"
        return None


class ProbesSeen(Struct, frozen=True):
    """Probes of one verification. `started` is False where that failed; `trouble`: why they have not ended, or started."""

    started: bool = True
    done: bool = False
    targets: tuple[ProbeFigures, ...] = ()
    trouble: str | None = None


class World(Struct, frozen=True):
    """What is observed. Pods are those of nodes that are in flight, and of finished ones while it soaks; so are ProxyNodes,
    and those of nodes that are gone. Before it begins all ProxyNodes are there.

    `claims`: which other roll-out owns a node; `image_claim`: which one changes the DaemonSet's image.
    `cleanups`: by node, whether the cleanup has succeeded.
    """

    nodes: Mapping[str, NodeSeen] = {}
    proxy_nodes: Mapping[str, ProxyNode] = {}
    agents: Mapping[str, PodSeen] = {}
    kube_proxies: Mapping[str, PodSeen] = {}
    daemon_set: DaemonSetSeen | None = None
    kube_proxy_there: bool = False
    probes: Mapping[str, ProbesSeen] = {}
    cleanups: Mapping[str, bool] = {}
    claims: Mapping[str, str] = {}
    image_claim: str | None = None


class Action(Struct, frozen=True):
    """Something to be done."""


class AddFinalizer(Action, frozen=True):
    """Before anything else happens."""


class ReleaseFinalizer(Action, frozen=True):
    """Nothing is left to be done."""


class TellNode(Action, frozen=True):
    """Write the spec of a ProxyNode, which is made if there is none. `uid`: of its Node, with which it goes."""

    node: str
    uid: str
    mode: str | None
    configuration: dict[str, Any] | None
    verification: str | None


class ForgetNode(Action, frozen=True):
    """Delete a ProxyNode, if it is still the one with this `uid`."""

    node: str
    uid: str | None


class SetImage(Action, frozen=True):
    """Write image and strategy of the agent's DaemonSet."""

    image: str
    update_strategy: dict[str, Any]


class DeletePod(Action, frozen=True):
    """Delete a pod of the agent, if it is still this one."""

    node: str
    name: str
    uid: str


class LabelNode(Action, frozen=True):
    """Write the label nodeproxy.io/proxy; None: remove it."""

    node: str
    value: str | None


class StartProbes(Action, frozen=True):
    """Begin the probes of a verification: from `node`, and from `elsewhere` to its node port."""

    verification: str
    node: str
    elsewhere: str
    address: str | None


class EndProbes(Action, frozen=True):
    """Remove what the probes of a verification need."""

    verification: str


class StartCleanup(Action, frozen=True):
    """Remove what the agent left on a node that kube-proxy serves again; connections through IPVS may end meanwhile."""

    node: str
    drain_seconds: float


class EndCleanup(Action, frozen=True):
    """Remove the pod that did it."""

    node: str


class Tell(Action, frozen=True):
    """Record an Event on the roll-out, and on a Node where one is named."""

    reason: str
    message: str
    node: str | None = None
    warning: bool = False
