"""A node in a sandbox that an agent has programmed, and traces of packets on it."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from hack.scene_oracle import snapshot_of_scene
from nodeproxy.cluster.addresses import Address
from nodeproxy.cluster.names import Family, IPProtocol
from nodeproxy.configuration.agent_config import Mode
from nodeproxy.kernel.xtables_tools import Variant
from nodeproxy.sandbox.agent import AgentProcess, nodeproxy_command
from nodeproxy.sandbox.scene import Flow, Layout, Scene, lay_out, load_scenes
from nodeproxy.snapshot.view import NodeView
from nodeproxy.trace.ends import Target
from nodeproxy.trace.live_kernel import LiveKernel
from nodeproxy.trace.results import Trace
from nodeproxy.trace.tracer import Tracer
from tests.ways import Way

SCENES = {scene.name: scene for scene in load_scenes(Path(__file__).parent.parent / "conformance" / "packet_flows.json")}


class TracedNode:
    """A laid out scene with its rules in the kernel."""

    def __init__(self, layout: Layout, way: Way) -> None:
        self.layout = layout
        self.box = layout.box
        self.way = way
        self._open = ExitStack()
        self._kernels: dict[Family, LiveKernel] = {}
        self.view = NodeView(snapshot_of_scene(layout.scene), mode=Mode(way.mode))

    def trace(self, flow: Flow) -> Trace:
        """What `nodeproxy trace` says of a flow, on the node, by rules that are read once and stay as they are."""
        with self.layout.sender(flow):
            return self.box.node.run(self._trace, flow, self._kernel)

    def traced(self, flow: Flow) -> Trace:
        """The same by rules as they are now, without anybody there who could send it."""

        def afresh() -> Trace:
            with LiveKernel(ipaddress.ip_address(flow.destination).version, Variant(self.way.variant)) as kernel:
                return self._trace(flow, lambda _: kernel)

        return self.box.node.run(afresh)

    def close(self) -> None:
        """Let go of the kernel."""
        self._open.close()

    def _trace(self, flow: Flow, kernel: Callable[[Family], LiveKernel]) -> Trace:
        family = Family(ipaddress.ip_address(flow.destination).version)
        target = Target(Address(family, flow.destination), flow.port, IPProtocol(flow.protocol.lower()))
        return Tracer(self.view, kernel).trace(flow.source, target)

    def _kernel(self, family: Family) -> LiveKernel:
        if family not in self._kernels:
            self._kernels[family] = self._open.enter_context(LiveKernel(int(family), Variant(self.way.variant)))
        return self._kernels[family]

    def iptables(self, *arguments: str, family: int = 4) -> str:
        """Run an iptables program of the variant on the node."""
        tool = f"{'iptables' if family == 4 else 'ip6tables'}-{self.way.variant}"
        return self.box.node.command([tool, "-w", "5", *arguments]).stdout

    def rules(self, table: str, chain: str) -> list[str]:
        """The rules of a chain, as `iptables -S` prints them."""
        return [line for line in self.iptables("-t", table, "-S", chain).splitlines() if line.startswith("-A ")]


@contextmanager
def traced_node(scene: Scene, way: Way) -> Iterator[TracedNode]:
    """A node with what the agent programmed, and no agent any more that would repair it."""
    with lay_out(scene) as layout:
        manifests = layout.box.directory / "manifests"
        manifests.mkdir()
        scene.write_manifests(manifests)
        command = nodeproxy_command(scene.flags(way.mode), manifests=manifests, variant=way.variant)
        with AgentProcess(layout.box, command):
            pass
        with closing(TracedNode(layout, way)) as node:
            yield node
