"""A cluster of Nodes, agents, pods and probes that does what actions say, with faults; no API server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from nodeproxy.api.proxy_node import (
    Audit,
    ObjectMeta,
    OwnerReference,
    ProxyNode,
    ProxyNodeSpec,
    ProxyNodeStatus,
    Verification,
)
from nodeproxy.operator.api import (
    FINALIZER,
    FINISHED,
    IN_FLIGHT,
    NodePhase,
    Nodes,
    Phase,
    ProbeFigures,
    ProxyRollout,
    RolloutSpec,
    RolloutStatus,
    Selector,
    Target,
)
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

OLDEST, OLD, NEW = "nodeproxy:0", "nodeproxy:1", "nodeproxy:2"
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
    crashes: bool = False
    """Whichever pod serves it does not become Ready."""
    labels: dict[str, str] = field(default_factory=dict)
    own_image: str = OLD
    template: int = 1
    """Of which template its pod is."""
    spec: ProxyNodeSpec | None = None
    owner: str = ""
    """The UID of the Node that its ProxyNode belongs to."""
    generation: int = 0
    status: ProxyNodeStatus = field(default_factory=ProxyNodeStatus)

    @property
    def serving(self) -> str:
        return "nodeproxy" if self.labelled else "kube-proxy"

    @property
    def changed(self) -> bool:
        """Whether anything is not as it was in the beginning."""
        return self.mode != self.own_mode or (self.image not in (None, self.own_image)) or not self.labelled

    @property
    def pod_ready(self) -> bool:
        broken = self.crashes or (self.broken_image and self.image == NEW)
        return self.image is not None and not broken and self.ready


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
    orphans: dict[str, SimNode] = field(default_factory=dict)
    """Nodes that are gone, whose ProxyNode is still there: nobody collects garbage here."""
    node_selector: dict[str, str] = field(default_factory=dict)
    template: int = 1
    counts_templates: bool = False
    """The API server counts templates, and pods say of which they are."""
    mirror: str = ""
    """A webhook puts this before the image of each pod."""
    deleted_pods: int = 0
    probed_from: set[str] = field(default_factory=set)
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

    def add(self, node: SimNode) -> None:
        """A Node; one that is there under this name is replaced, and what that one was told stays."""
        old = self.nodes.get(node.name)
        if old is not None:
            node.spec, node.owner, node.generation = old.spec, old.owner, old.generation
        self.nodes[node.name] = node

    def remove(self, name: str) -> None:
        """A Node leaves the cluster; its ProxyNode stays as it is."""
        node = self.nodes.pop(name)
        if node.spec is not None:
            self.orphans[name] = node

    def world(self) -> World:
        """What `Observer` shows, and nothing besides."""
        nodes, agents, kube_proxies, told = {}, {}, {}, {}
        status = self.status
        flying = {line.name for line in status.nodes if line.phase in IN_FLIGHT}
        gone = any(line.phase is NodePhase.GONE for line in status.nodes)
        soaks = status.soak_until is not None
        all_told = soaks or gone or status.phase in FINISHED
        for node in self.orphans.values():
            if all_told or node.name in flying:
                told[node.name] = self._proxy_node(node)
        for node in self.nodes.values():
            labels = node.labels | ({"nodeproxy.io/proxy": "nodeproxy"} if node.labelled and self.by_label else {})
            nodes[node.name] = NodeSeen(name=node.name, uid=node.uid, ready=node.ready, labels=labels, address="192.0.2.1")
            if node.spec is not None and (all_told or node.name in flying):
                told[node.name] = self._proxy_node(node)
            if not soaks and node.name not in flying:
                continue
            if node.image is not None:
                agents[node.name] = PodSeen(
                    name=f"{node.name}-{node.pod}",
                    uid=str(node.pod),
                    image=self.mirror + node.image,
                    ready=node.pod_ready,
                    template_generation=str(node.template) if self.counts_templates else None,
                )
            if not node.labelled:
                ready = node.ready and not node.crashes
                kube_proxies[node.name] = PodSeen(name=f"kp-{node.name}", uid="k", ready=ready)
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
                template_generation=str(self.template) if self.counts_templates else None,
                node_selector=dict(self.node_selector),
            ),
            kube_proxy_there=True,
            probes={id: self._probes(node, well) for id, (node, well) in self.probes.items()},
            cleanups=dict(self.cleanups),
            claims=self.claims,
        )

    @staticmethod
    def _proxy_node(node: SimNode) -> ProxyNode:
        assert node.spec is not None
        owners = [OwnerReference(kind="Node", name=node.name, uid=node.owner)] if node.owner else None
        meta = ObjectMeta(name=node.name, generation=node.generation, owner_references=owners)
        return ProxyNode(metadata=meta, spec=node.spec, status=node.status)

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
            case TellNode(node=name, uid=uid, mode=mode, configuration=configuration, verification=id):
                if name in self.nodes:
                    node = self.nodes[name]
                    node.owner = uid
                    node.spec = ProxyNodeSpec(mode=mode, configuration=configuration, verification=id)
                    node.generation += 1
            case ForgetNode(node=name):
                self.orphans.pop(name, None)
                if name in self.nodes:
                    self.nodes[name].spec, self.nodes[name].status = None, ProxyNodeStatus()
            case SetImage(image=image, update_strategy=strategy):
                self.template += image != self.image
                self.image, self.strategy, self.unseen = image, dict(strategy), 2
            case DeletePod(node=name, uid=uid):
                if name in self.nodes and str(self.nodes[name].pod) == uid:
                    self.nodes[name].image = None
                    self.deleted_pods += 1
            case LabelNode(node=name, value=value):
                self.nodes[name].labelled = value == "nodeproxy"
            case StartProbes(verification=id, node=name, elsewhere=elsewhere):
                self.probed_from.add(elsewhere)
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
                node.image, node.pod, node.template = self.image, node.pod + 1, self.template
            if self.strategy.get("type") == "RollingUpdate" and node.image is not None and node.image != self.image:
                node.image, node.pod, node.template = self.image, node.pod + 1, self.template
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


def spec(target: Target | None = None, **fields: Any) -> RolloutSpec:
    """To all nodes, unless told otherwise."""
    fields.setdefault("nodes", Nodes(selector=Selector()))
    fields.setdefault("soak_seconds", 20)
    return RolloutSpec(target=target or Target(mode="ipvs"), **fields)


def phases(sim: Simulation) -> dict[str, str]:
    """Of its nodes."""
    return {line.name: line.phase.value for line in sim.status.nodes}


def until(sim: Simulation, phase: NodePhase, node: str) -> None:
    """Passes until a node is in this phase."""
    for _ in range(200):
        if any(line.name == node and line.phase is phase for line in sim.status.nodes):
            return
        sim.step()
    raise AssertionError(f"{node} does not become {phase}: {phases(sim)}")


def until_it_soaks(sim: Simulation) -> None:
    """Passes until it watches the nodes of a step."""
    for _ in range(200):
        if sim.status.phase is Phase.SOAKING:
            return
        sim.step()
    raise AssertionError(f"it does not soak: {sim.status}")


def cluster(count: int, spec: RolloutSpec, **options: bool) -> Simulation:
    """Nodes n0, n1, ..."""
    return Simulation(spec, {f"n{i}": SimNode(f"n{i}", f"u{i}") for i in range(count)}, **options)
