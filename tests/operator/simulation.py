"""A cluster of Nodes, agents, pods and probes that does what actions say, with faults; no API server."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from nodeproxy.api.proxy_node import Audit, ObjectMeta, ProxyNode, ProxyNodeSpec, ProxyNodeStatus, Verification
from nodeproxy.operator.api import FINALIZER, ProbeFigures, ProxyRollout, RolloutSpec, RolloutStatus
from nodeproxy.operator.plan import Plan, plan
from nodeproxy.operator.world import (
    Action,
    AddFinalizer,
    DaemonSetSeen,
    DeletePod,
    EndCleanup,
    EndProbes,
    ForgetNode,
    LabelNode,
    NodeSeen,
    PodSeen,
    ProbesSeen,
    ReleaseFinalizer,
    SetImage,
    StartCleanup,
    StartProbes,
    Tell,
    TellNode,
    World,
)

OLD, NEW = "nodeproxy:1", "nodeproxy:2"
ROLLING = {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}}


@dataclass
class SimNode:
    """One node. Faults: `no_ipvs`, `lies` (in sync, but new mode's rules miss), `deaf` (the agent does not answer)."""

    name: str
    uid: str
    ready: bool = True
    labelled: bool = True
    own_mode: str = "iptables"
    mode: str = "iptables"
    image: str | None = OLD
    pod: int = 0
    no_ipvs: bool = False
    lies: bool = False
    deaf: bool = False
    broken_image: bool = False
    spec: ProxyNodeSpec | None = None
    generation: int = 0
    status: ProxyNodeStatus = field(default_factory=ProxyNodeStatus)

    @property
    def serving(self) -> str:
        return "nodeproxy" if self.labelled else "kube-proxy"

    @property
    def changed(self) -> bool:
        """Whether anything is not as it was in the beginning."""
        return self.mode != self.own_mode or (self.image not in (None, OLD)) or not self.labelled

    @property
    def pod_ready(self) -> bool:
        return self.image is not None and not (self.broken_image and self.image == NEW) and self.ready


@dataclass
class Simulation:
    """The cluster, and one roll-out in it."""

    spec: RolloutSpec
    nodes: dict[str, SimNode]
    by_label: bool = False
    image: str = OLD
    unseen: int = 0
    """For how long the DaemonSet's controller has yet to see the present template."""
    strategy: dict[str, object] = field(default_factory=lambda: dict(ROLLING))
    probes: dict[str, tuple[str, bool]] = field(default_factory=dict)
    cleanups: dict[str, bool] = field(default_factory=dict)
    now: float = 1_800_000_000.0
    status: RolloutStatus = field(default_factory=RolloutStatus)
    finalizers: list[str] = field(default_factory=list)
    deleted: bool = False
    passed: dict[str, set[str]] = field(default_factory=dict)
    """By node, in which state (mode, image, proxy) probes have found it well."""
    told: list[Tell] = field(default_factory=list)
    claims: dict[str, str] = field(default_factory=dict)

    def rollout(self) -> ProxyRollout:
        meta = ObjectMeta(
            name="r",
            uid="01234567-89ab",
            generation=1,
            finalizers=list(self.finalizers),
            deletion_timestamp="2027-01-01T00:00:00Z" if self.deleted else None,
        )
        status = msgspec.json.decode(msgspec.json.encode(self.status), type=RolloutStatus)  # as from the API server
        return ProxyRollout(metadata=meta, spec=self.spec, status=status)

    def world(self) -> World:
        nodes, agents, kube_proxies, told = {}, {}, {}, {}
        for node in self.nodes.values():
            labels = {"nodeproxy.io/proxy": "nodeproxy"} if node.labelled and self.by_label else {}
            nodes[node.name] = NodeSeen(name=node.name, uid=node.uid, ready=node.ready, labels=labels, address="192.0.2.1")
            if node.image is not None:
                pod = PodSeen(name=f"{node.name}-{node.pod}", uid=str(node.pod), image=node.image, ready=node.pod_ready)
                agents[node.name] = pod
            if not node.labelled:
                kube_proxies[node.name] = PodSeen(name=f"kp-{node.name}", uid="k", ready=node.ready)
            if node.spec is not None:
                meta = ObjectMeta(name=node.name, generation=node.generation)
                told[node.name] = ProxyNode(metadata=meta, spec=node.spec, status=node.status)
        return World(
            nodes=nodes,
            proxy_nodes=told,
            agents=agents,
            kube_proxies=kube_proxies,
            daemon_set=DaemonSetSeen(
                image=self.image,
                update_strategy=dict(self.strategy),
                observed=self.unseen == 0,
                by_label=self.by_label,
                desired=len(self.nodes),
                updated=sum(node.image == self.image for node in self.nodes.values()),
            ),
            kube_proxy_there=True,
            probes={id: self._probes(node, well) for id, (node, well) in self.probes.items()},
            cleanups=dict(self.cleanups),
            claims=self.claims,
        )

    @staticmethod
    def _probes(node: str, well: bool) -> ProbesSeen:
        failed = 0 if well else 20
        figures = ProbeFigures(
            target="nodeproxy-probe", sent=20, failed=failed, reason=None if well else "connection refused"
        )
        return ProbesSeen(done=True, targets=(figures,))

    def plan(self) -> Plan:
        return plan(self.rollout(), self.world(), self.now)

    def act(self, action: Action) -> None:
        match action:
            case TellNode(node=name, mode=mode, configuration=configuration, verification=id):
                if name in self.nodes:
                    node = self.nodes[name]
                    node.spec = ProxyNodeSpec(mode=mode, configuration=configuration, verification=id)
                    node.generation += 1
            case ForgetNode(node=name):
                if name in self.nodes:
                    self.nodes[name].spec, self.nodes[name].status = None, ProxyNodeStatus()
            case SetImage(image=image, update_strategy=strategy):
                self.image, self.strategy, self.unseen = image, dict(strategy), 2
            case DeletePod(node=name, uid=uid):
                if name in self.nodes and str(self.nodes[name].pod) == uid:
                    self.nodes[name].image = None
            case LabelNode(node=name, value=value):
                self.nodes[name].labelled = value == "nodeproxy"
            case StartProbes(verification=id, node=name):
                if name in self.nodes:
                    node = self.nodes[name]
                    well = self.well(node)
                    self.probes.setdefault(id, (name, well))
                    if well:
                        self.passed.setdefault(name, set()).add(state(node))
            case EndProbes(verification=id):
                self.probes.pop(id, None)
            case StartCleanup(node=name):
                self.cleanups.setdefault(name, False)
            case EndCleanup(node=name):
                self.cleanups.pop(name, None)
            case AddFinalizer():
                self.finalizers = [FINALIZER]
            case ReleaseFinalizer():
                self.finalizers = []
            case Tell():
                self.told.append(action)
            case _:
                raise TypeError(action)

    @staticmethod
    def well(node: SimNode) -> bool:
        """Whether connections through it succeed. What was programmed goes on working while the pod is exchanged."""
        return not (node.lies and node.changed)

    def elapse(self, seconds: float = 5.0) -> None:
        """Agents, kubelets and controllers do their work."""
        self.now += seconds
        self.unseen = max(self.unseen - 1, 0)
        for node in self.nodes.values():
            wanted = node.labelled or not self.by_label
            if not wanted:
                node.image = None
            elif node.image is None and node.ready:
                node.image, node.pod = self.image, node.pod + 1
            if self.strategy.get("type") == "RollingUpdate" and node.image is not None and node.image != self.image:
                node.image, node.pod = self.image, node.pod + 1
            if not node.pod_ready or node.deaf:
                continue
            spec = node.spec or ProxyNodeSpec()
            message = None
            mode = spec.mode or node.own_mode
            if mode == "ipvs" and node.no_ipvs:
                mode, message = node.mode, "the kernel has no ip_vs"
            node.mode = mode
            if node.spec is not None:
                answer = Verification(id=spec.verification, sync_p99_seconds=0.01) if spec.verification else None
                node.status = ProxyNodeStatus(
                    observed_generation=node.generation,
                    mode=mode,
                    in_sync=True,
                    audit=Audit(clean=True),
                    message=message,
                    verification=answer,
                )
        for name in self.cleanups:
            self.cleanups[name] = True

    def step(self, *, persisted: bool = True, actions: int | None = None) -> Plan:
        """One pass. `persisted` False: the operator ends before the status is written; `actions`: after so many of them."""
        result = self.plan()
        if persisted:
            self.status = result.status
            for action in result.actions[:actions]:
                self.act(action)
        self.elapse()
        return result

    def finish(self, limit: int = 2000) -> RolloutStatus:
        """Passes until it has ended and let go of its finalizer."""
        for _ in range(limit):
            if self.status.phase in ("Completed", "Failed", "Aborted") and not self.finalizers:
                return self.status
            self.step()
        raise AssertionError(f"does not end: {self.status}")


def state(node: SimNode) -> str:
    """What its data path comes from."""
    return f"{node.serving} {node.mode} {node.image}"


def cluster(count: int, spec: RolloutSpec, **options: bool) -> Simulation:
    """Nodes n0, n1, ..."""
    return Simulation(spec, {f"n{i}": SimNode(f"n{i}", f"u{i}") for i in range(count)}, **options)
