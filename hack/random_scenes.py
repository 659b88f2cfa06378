"""Seeded random scenes in the format of packet_flows.json, over everything that SPEC sections 2 and 3 speak of.

`python -m hack.random_scenes --seed 7 --count 20 > scenes.json` writes scenes that tests/conformance runs with
NODEPROXY_SCENES=scenes.json, on nodeproxy or (KUBE_PROXY) on kube-proxy. What each flow must meet is the oracle's answer.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from hack.random_objects import NODE, PLANS, Plan, RandomObjects, zone_labels
from hack.scene_oracle import Oracle, expectation
from nodeproxy.forwarding.verdict import Outcome
from nodeproxy.sandbox.scene import Flow, NodeSpec, Object, Scene

QUOTA = {Outcome.FORWARD: 22, Outcome.DROP: 8, Outcome.REJECT: 7, Outcome.NO_MATCH: 7, Outcome.ACCEPT: 2}
NO_SERVICE_PORT = 4444  # a port that no Service has


class Candidate(msgspec.Struct, frozen=True):
    """A packet that might be sent. `kind` is what stands at its destination; flows are spread over the kinds."""

    kind: str
    source: str
    destination: str
    port: int
    protocol: str


def make_scene(seed: int) -> Scene:
    """The scene of a seed: the same at all times."""
    rng = random.Random(seed)
    families = rng.choice([(4,), (4,), (6,), (6,), (4, 6), (6, 4)])
    plans = [PLANS[family] for family in families]
    node = _node(rng, plans)
    objects = RandomObjects(rng, plans).objects(rng.randint(4, 6))
    scene = Scene(
        name=f"random-{seed}",
        ip_family=f"IPv{families[0]}",
        node=node,
        services=[strip(one) for one in objects if one["kind"] == "Service"],
        endpoint_slices=[strip(one) for one in objects if one["kind"] == "EndpointSlice"],
        flows=[],
    )
    return msgspec.structs.replace(scene, flows=list(_flows(rng, scene, plans)))


def strip(obj: Object) -> Object:
    """An object without its kind, as scenes hold it."""
    return {key: value for key, value in obj.items() if key != "kind"}


def _node(rng: random.Random, plans: Sequence[Plan]) -> NodeSpec:
    listed = {plan.family: plan.node_ips for plan in PLANS.values()}
    first = plans[0].family
    choices: list[list[str]] = [
        [plan.everything for plan in plans],
        [],
        [plan.everything for plan in plans],
        [plan.node_networks[0] for plan in plans],
        [network for plan in plans for network in plan.node_networks],
        [plans[0].node_networks[1]],
        ["primary"],
    ]
    if first == 4:
        choices += [["127.0.0.0/8"], ["192.168.0.0/24", "127.0.0.1/32"]]
    return NodeSpec(
        name=NODE,
        ips=[*listed[first], *listed[10 - first]],
        pod_cidr=",".join(plan.pod_cidr for plan in plans),
        detect_local=rng.random() < 0.8,
        masquerade_all=rng.random() < 0.2,
        localhost_node_ports=rng.random() < 0.6,
        node_port_addresses=rng.choice(choices),
        labels=zone_labels(rng),
    )


def _flows(rng: random.Random, scene: Scene, plans: Sequence[Plan]) -> Iterator[Flow]:
    """Of each outcome at most so many as QUOTA says, spread over what stands at the destination and who sends."""
    oracle = Oracle(scene)
    pools: dict[Outcome, dict[str, list[Flow]]] = {outcome: {} for outcome in QUOTA}
    for one in dict.fromkeys(_candidates(scene, plans, oracle)):
        bare = Flow(one.source, one.destination, one.port, "no-match", protocol=one.protocol)
        answer = oracle.ask(bare)
        pools[answer.outcome].setdefault(one.kind, []).append(expectation(bare, answer))
    for outcome, most in QUOTA.items():
        kinds = [rng.sample(flows, len(flows)) for _, flows in sorted(pools[outcome].items())]
        rng.shuffle(kinds)
        rounds = [kind[turn] for turn in range(most) for kind in kinds if turn < len(kind)]
        yield from rounds[:most]


def _candidates(scene: Scene, plans: Sequence[Plan], oracle: Oracle) -> Iterator[Candidate]:
    for plan in plans:
        sources = list(_sources(scene, plan))
        for kind, destination, port, protocol in _destinations(scene, plan):
            for where, source in sources:
                if _can_be_sent(source, destination, plan, oracle):
                    yield Candidate(f"{kind} from {where}", source, destination, port, protocol)
            if kind in ("external IP", "load balancer IP"):
                yield Candidate(f"{kind} from itself", destination, destination, port, protocol)
        yield from _between_load_balancer_ips(scene, plan)


def _between_load_balancer_ips(scene: Scene, plan: Plan) -> Iterator[Candidate]:
    """From one of a Service's load balancer IPs to another."""
    for service in scene.services:
        ingress = service.get("status", {}).get("loadBalancer", {}).get("ingress", [])
        addresses = [one["ip"] for one in ingress if "ip" in one and plan.has(one["ip"])]
        for source, destination in itertools.permutations(addresses, 2):
            for port in service["spec"]["ports"]:
                kind = "load balancer IP from another"
                yield Candidate(kind, source, destination, port["port"], port["protocol"])


def _can_be_sent(source: str, destination: str, plan: Plan, oracle: Oracle) -> bool:
    """Loopback leaves the node only where route_localnet is set."""
    if source != plan.loopback:
        return destination != plan.loopback
    if destination == plan.loopback:
        return True
    return destination in plan.node_ips and oracle.serves_node_ports(plan.loopback)


def _sources(scene: Scene, plan: Plan) -> Iterator[tuple[str, str]]:
    """(what it is, address)"""
    yield "pod", plan.client_pod
    for address in plan.node_ips:
        yield "node", address
    yield "loopback", plan.loopback
    for address in plan.clients:
        yield "outside", address
    for address in _endpoint_addresses(scene):
        if address in plan.local_pods:
            yield "endpoint", address


def _endpoint_addresses(scene: Scene) -> list[str]:
    found = {e["addresses"][0] for one in scene.endpoint_slices for e in one["endpoints"]}
    return sorted(found)


def _destinations(scene: Scene, plan: Plan) -> Iterator[tuple[str, str, int, str]]:
    """(what it is, address, port, protocol); Services to be ignored come with the others."""
    for service in scene.services:
        spec = service["spec"]
        for address in spec.get("clusterIPs", []):
            if plan.has(address):
                yield "no port", address, NO_SERVICE_PORT, "TCP"
        for port in spec.get("ports", []):
            number, protocol = port["port"], port.get("protocol", "TCP")
            for kind, address in _service_addresses(service):
                if plan.has(address):
                    yield kind, address, number, protocol
            yield "service port on the node", plan.node_ips[0], number, protocol
            if port.get("nodePort"):
                for address in (*plan.node_ips, plan.loopback):
                    yield "node port", address, port["nodePort"], protocol
                for _, address in _service_addresses(service):
                    if plan.has(address):
                        yield "node port on a service address", address, port["nodePort"], protocol
        if spec.get("healthCheckNodePort") and f"IPv{plan.family}" in spec["ipFamilies"]:
            yield "health check", plan.node_ips[0], spec["healthCheckNodePort"], "TCP"


def _service_addresses(service: Object) -> Iterator[tuple[str, str]]:
    spec = service["spec"]
    for address in spec.get("clusterIPs", []):
        if address not in ("None", ""):
            yield "cluster IP", address
    for address in spec.get("externalIPs", []):
        yield "external IP", address
    for one in service.get("status", {}).get("loadBalancer", {}).get("ingress", []):
        if "ip" in one:
            yield "load balancer IP", one["ip"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=1, help="seed of the first scene (default 1)")
    parser.add_argument("--count", type=int, default=10, help="number of scenes, each of the next seed (default 10)")
    given = parser.parse_args()
    scenes: list[Any] = [make_scene(seed) for seed in range(given.seed, given.seed + given.count)]
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(scenes), indent=1) + b"\n")


if __name__ == "__main__":
    main()
