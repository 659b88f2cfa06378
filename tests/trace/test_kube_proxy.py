"""A node that kube-proxy serves is traced like one of ours: chains per endpoint and `recent` lists."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from hack.controlplane.build import kube_proxy
from hack.scene_oracle import Oracle, deviation
from nodeproxy.sandbox.agent import AgentProcess, kube_proxy_command, variant_environment
from nodeproxy.sandbox.scene import Flow, lay_out
from nodeproxy.trace.results import Agreement
from tests.conformance.static_apiserver import PORT, serving
from tests.takeover.proxies import NO_KUBE_PROXY
from tests.trace.node import SCENES, TracedNode
from tests.trace.test_agrees_with_agent import problems
from tests.trace.test_broken_rules import POD, SCENE, STICKY, agreed, differs
from tests.ways import LEGACY, NFT, Way

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(bool(NO_KUBE_PROXY), reason=NO_KUBE_PROXY)]


@contextmanager
def kube_proxy_node(scene: object, way: Way) -> Iterator[TracedNode]:
    """A node with what kube-proxy programmed."""
    binary = kube_proxy()
    assert binary is not None
    assert isinstance(scene, type(SCENE))
    with lay_out(scene) as layout, serving(layout.box.node, scene.objects(with_node=True)):
        command = kube_proxy_command(binary, scene.flags(way.mode), master=f"http://127.0.0.1:{PORT}")
        with AgentProcess(layout.box, command, environment=variant_environment(layout.box, way.variant)) as agent:
            agent.wait_metric("kubeproxy_sync_proxy_rules_last_timestamp_seconds", series=2)
        with closing(TracedNode(layout, way)) as node:
            yield node


@pytest.mark.parametrize(
    ("name", "way"), [("scene-02", LEGACY), ("scene-10", NFT), ("scene-14", LEGACY), ("scene-27", NFT)], ids=str
)
def test_scenes(name: str, way: Way) -> None:
    """But for where kube-proxy is known to do otherwise than SPEC has it."""
    scene = SCENES[name]
    oracle = Oracle(scene)
    with kube_proxy_node(scene, way) as node:
        flows = [flow for flow in scene.flows if deviation(oracle, flow) is None]
        wrong = [text for flow in flows for text in problems(node, flow)]
    assert flows
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("way", [LEGACY, NFT], ids=str)
def test_affinity_and_a_broken_endpoint_chain(way: Way) -> None:
    """A client that a `recent` list holds goes where the list belongs; a changed endpoint chain is found."""
    with kube_proxy_node(SCENE, way) as node:
        agreed(node.traced(STICKY))
        chains = [line.split()[1] for line in node.iptables("-t", "nat", "-S").splitlines() if "--set --name" in line]
        held = chains[1]
        node.box.node.run(remember, held)
        trace = node.traced(STICKY)
        assert (trace.agreement, trace.differences) == (Agreement.AGREES, ())
        assert trace.kernel is not None
        assert len(trace.kernel.destinations) == 1
        assert any("session affinity: the source is bound" in note for note in trace.notes)
        other = Flow("10.0.0.3", STICKY.destination, 80, [])
        trace = node.traced(other)
        assert trace.kernel is not None
        assert len(trace.kernel.destinations) == 3
        node.iptables("-t", "nat", "-F", held)
        differs(node.traced(other), "never sends it to 10.0.1.2:8080")  # the next endpoint gets its connections


def remember(chain: str) -> None:
    """Put the client on a list as a packet of it would."""
    from pathlib import Path

    Path(f"/proc/thread-self/net/xt_recent/{chain}").write_text(f"+{POD}\n")
