"""Anonymised snapshots: nothing of the original is in them, and they forward alike."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from hack.random_scenes import make_scene
from hack.scene_oracle import snapshot_of_scene
from nodeproxy.api.objects import EndpointSlice, Service
from nodeproxy.configuration.agent_config import AgentConfig
from nodeproxy.forwarding.table import Backend, Frontend, ServicePort, ServicePortKey, ServicePortName
from nodeproxy.sandbox.scene import load_scenes
from nodeproxy.snapshot.anonymise import Anonymiser, anonymise
from nodeproxy.snapshot.model import Snapshot
from nodeproxy.snapshot.take import save
from nodeproxy.snapshot.view import NodeView

SCENES = load_scenes(Path(__file__).parents[1] / "conformance/packet_flows.json")
RANDOM_SCENES = [make_scene(seed) for seed in range(1, 41)]
TOKENS = re.compile(r"[^\s\"',{}\[\]]+")


class Image:
    """The image of a forwarding table under an anonymiser."""

    def __init__(self, made: Anonymiser) -> None:
        self._made = made

    def row(self, row: ServicePort) -> ServicePort:
        return replace(
            row,
            key=self._key(row.key),
            frontends=tuple(map(self._frontend, row.frontends)),
            cluster_backends=self._backends(row.cluster_backends),
            local_backends=self._backends(row.local_backends),
        )

    def _key(self, key: ServicePortKey) -> ServicePortKey:
        service = self._made.service_name(key.name.service)
        return key._replace(name=ServicePortName(*service, self._made.port_name(key.name.port) or ""))

    def _frontend(self, frontend: Frontend) -> Frontend:
        images, sources = self._made.addresses, frontend.allowed_sources
        return replace(
            frontend,
            address=images.address(frontend.address) if frontend.address else None,
            allowed_sources=None if sources is None else tuple(sorted(map(images.network, sources))),
        )

    def _backends(self, backends: Iterable[Backend]) -> tuple[Backend, ...]:
        return tuple(sorted(replace(one, address=self._made.addresses.address(one.address)) for one in backends))


@pytest.mark.parametrize("scene", [*SCENES, *RANDOM_SCENES], ids=lambda scene: scene.name)
def test_the_forwarding_table_is_the_image_of_the_original(scene: Any) -> None:
    original = snapshot_of_scene(scene)
    made = Anonymiser(b"a secret of some length")
    before, after = NodeView(original), NodeView(made.snapshot(original))
    image = Image(made)
    assert {row.key: row for row in map(image.row, before.table.rows.values())} == after.table.rows
    checks = {
        made.service_name(name): replace(check, service=made.service_name(name))
        for name, check in before.table.health_checks.items()
    }
    assert checks == after.table.health_checks
    assert sum(map(len, before.problems.values())) == sum(map(len, after.problems.values()))
    addresses = made.addresses.address
    for flow in scene.flows:
        told = before.packet(flow.source, flow.destination, flow.port)
        asked = after.packet(addresses(flow.source), addresses(flow.destination), flow.port)
        assert replace(asked, source="", destination="") == replace(told, source="", destination="")
        assert before.verdict(told).outcome is after.verdict(asked).outcome


@pytest.mark.parametrize("scene", [*SCENES, *RANDOM_SCENES], ids=lambda scene: scene.name)
def test_nothing_of_a_scene_is_in_the_output(scene: Any) -> None:
    original = replace(snapshot_of_scene(scene), node_addresses=tuple(scene.node.ips))
    assert not told_in(original) & written(anonymise(original))


@st.composite
def clusters(draw: st.DrawFn) -> Snapshot:
    """A few Services with names and addresses of every kind, some of them bad."""
    # A name of its own in each place, none of which is a word of the API.
    names = st.integers(0, 10**6).map(lambda number: f"own{number}x9")
    ipv4, ipv6 = st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map(str)
    addresses = ipv4 | ipv6
    cidrs = st.builds(lambda text, bits: str(ipaddress.ip_network((text, bits), strict=False)), ipv4, st.integers(9, 32))
    odd = st.sampled_from(["", "nonsense1x9", "10.0.0.999x9", "not/a/cidrx9"])
    objects: list[Any] = []
    for number in range(draw(st.integers(1, 4))):
        namespace, name, port = draw(names), f"{draw(names)}{number}", draw(names | st.just("Bad_port_x9") | st.none())
        spec = {
            "clusterIP": draw(ipv4),
            "ports": [{"name": port, "port": 80, "protocol": draw(st.sampled_from(["TCP", "UDP", "QUICx9"]))}],
            "externalIPs": draw(st.lists(addresses | odd, max_size=2)),
            "loadBalancerSourceRanges": draw(st.lists(cidrs | odd, max_size=3)),
            "type": draw(st.sampled_from(["LoadBalancer", "ClusterIP", "Weirdx9"])),
        }
        status = {"loadBalancer": {"ingress": [{"ip": one} for one in draw(st.lists(addresses | odd, max_size=2))]}}
        metadata = {"name": name, "namespace": namespace}
        objects.append(msgspec.convert({"metadata": metadata, "spec": spec, "status": status}, Service))
        slice_metadata = {**metadata, "name": f"{name}-{draw(names)}", "labels": {"kubernetes.io/service-name": name}}
        endpoint = {
            "addresses": draw(st.lists(ipv4 | odd, min_size=1, max_size=2)),
            "nodeName": draw(names),
            "hints": {"forZones": [{"name": draw(names)}], "forNodes": [{"name": draw(names)}]},
        }
        made = {
            "metadata": slice_metadata,
            "addressType": "IPv4",
            "endpoints": [endpoint],
            "ports": [{"name": port, "port": 1}],
        }
        objects.append(msgspec.convert(made, EndpointSlice))
    config = AgentConfig(
        node_name=draw(names),
        kubeconfig=Path("/home/x9/kubeconfig"),
        cluster_cidrs=(draw(cidrs),),
        node_port_addresses=(draw(cidrs),),
        bind_address=draw(addresses),
        metrics_bind_address=f"{draw(ipv4)}:10249",
    )
    return Snapshot(tuple(objects), (), config, (draw(ipv4),), "2026-01-01T00:00:00Z", "API server https://api.x9:6443")


@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.generate])  # secrets differ: no shrinking
@given(clusters())
def test_nothing_of_any_cluster_is_in_the_output(original: Snapshot) -> None:
    output = written(anonymise(original))
    seen = sorted(told_in(original) & output)
    assert seen == []
    assert not [token for token in output if token.endswith("x9")]


def test_two_anonymised_snapshots_of_one_cluster_have_nothing_in_common() -> None:
    original = snapshot_of_scene(RANDOM_SCENES[0])
    one, other = (
        {text for obj in anonymise(original).objects for text in (obj.key.namespace, obj.key.name)} for _ in range(2)
    )
    assert not (one & other) - {"", "default"}


def test_the_service_of_the_api_server_keeps_its_name() -> None:
    made = {"metadata": {"name": "kubernetes", "namespace": "default"}, "spec": {"clusterIP": "10.96.0.1"}}
    other = {"metadata": {"name": "kubernetes", "namespace": "shop"}, "spec": {"clusterIP": "10.96.0.2"}}
    objects = tuple(msgspec.convert([made, other], list[Service]))
    keys = [obj.key for obj in anonymise(Snapshot(objects, (), AgentConfig(node_name="n"), (), "", "")).objects]
    assert sum((key.namespace, key.name) == ("default", "kubernetes") for key in keys) == 1
    assert not [key for key in keys if key.namespace == "shop"]


def test_who_came_first_still_gets_the_address() -> None:
    """Ages decide, then names; both are replaced."""
    services = [
        {
            "metadata": {"name": name, "namespace": "ns", "creationTimestamp": created},
            "spec": {"clusterIP": f"10.96.0.{number}", "externalIPs": ["192.0.2.1"], "ports": [{"port": 80}]},
        }
        for number, (name, created) in enumerate(
            [("c", None), ("b", "2025-01-01T00:00:00Z"), ("a", "2025-01-01T00:00:00Z"), ("z", "2024-01-01T00:00:00Z")], 1
        )
    ]
    for left in range(4):
        objects = tuple(msgspec.convert(services[: left + 1], list[Service]))
        original = Snapshot(objects, (), AgentConfig(node_name="n"), (), "", "")
        for secret in (b"one", b"two", b"three"):
            made = Anonymiser(secret)
            winner, image = winner_of(NodeView(original)), winner_of(NodeView(made.snapshot(original)))
            assert made.service_name(winner.key.name.service) == image.key.name.service


def winner_of(view: NodeView) -> ServicePort:
    (winner,) = [row for row in view.table.rows.values() if len(row.frontends) > 1]
    return winner


def told_in(snapshot: Snapshot) -> set[str]:
    """Every name and address of a snapshot that may not be seen. What cannot be other than it is, is not among them."""
    told: set[str] = {snapshot.config.node_name, *snapshot.node_addresses, *snapshot.config.cluster_cidrs}
    told |= {*snapshot.config.node_port_addresses, snapshot.config.bind_address or "", snapshot.origin}
    for obj in snapshot.objects:
        told |= {obj.key.namespace, obj.key.name}
        told |= set(texts(msgspec.to_builtins(obj)))
    return {text for text in told if text and not stays(text)}


def texts(value: Any, key: str = "") -> Iterable[str]:
    """Texts that are names, addresses or anything that a user wrote."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name not in ("creationTimestamp", "addressType", "sessionAffinity", "labels"):
                yield from texts(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner, key)
    elif isinstance(value, str):
        yield value.strip()


WORDS = {"TCP", "UDP", "SCTP", "VIP", "Proxy", "ClusterIP", "NodePort", "LoadBalancer", "ExternalName", "Local", "Cluster"}


SPECIAL = [
    *map(ipaddress.IPv4Network, ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "255.255.255.255/32")),
    *map(ipaddress.IPv6Network, ("::/127", "::ffff:0:0/96", "fe80::/10", "ff00::/8")),
]


def stays(text: str) -> bool:
    """Words of the API; what is special; and ranges so wide that they, or what is beside them, hold what is special."""
    if text in WORDS | {"None", "InternalIP", "ExternalIP", "default", "primary"}:
        return True
    try:
        network: Any = ipaddress.ip_network(text)
    except ValueError:
        return False
    special = [one for one in SPECIAL if one.version == network.version]
    return any(network.subnet_of(one) or one.subnet_of(network.supernet()) for one in special)


def written(snapshot: Snapshot) -> set[str]:
    """Every word of the files of a snapshot."""
    with TemporaryDirectory() as directory:
        save(snapshot, Path(directory) / "out")
        content = "\n".join(path.read_text() for path in (Path(directory) / "out").iterdir())
    found = set(TOKENS.findall(content)) | set(re.findall(r'"([^"]*)"', content))
    return found | {token.rpartition(":")[0] for token in found} | {token.strip(":") for token in found}
