"""The configuration is changed under a running agent: modes are switched, flows live on, and what cannot be is refused."""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from nodeproxy.sandbox.agent import AgentProcess, http_get
from nodeproxy.sandbox.client import NoListener, Rejected
from nodeproxy.sandbox.namespace import Namespace
from nodeproxy.sandbox.sockets import RESET_ON_CLOSE
from nodeproxy.sandbox.topology import Sandbox
from tests.ways import LEGACY, NFT, Way, ipvs, needs_ipvs

from .conftest import POD_A, POD_B
from .world import CLUSTER_IP, NODE, NODE_ADDRESS, World, ask, endpoint_slice, names, service

pytestmark = pytest.mark.kernel

HERE = [LEGACY, NFT]
BOTH_VARIANTS = pytest.mark.parametrize("way", [ipvs(LEGACY), ipvs(NFT)], ids=str)
EMPTY_IP = "10.96.0.77"


def configuration(**fields: Any) -> dict[str, Any]:
    """A KubeProxyConfiguration for the sandbox."""
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "clusterCIDR": "10.0.0.0/8",
        "conntrack": {"maxPerCore": 0},
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        "iptables": {"minSyncPeriod": "0s"},
        **fields,
    }


class Configured(World):
    """A world whose agent has a configuration file."""

    def __init__(self, box: Sandbox, way: Way, **fields: Any) -> None:
        super().__init__(box, way)
        self.file = box.directory / "config.conf"
        self.write(**fields)
        program = Path(sys.executable).with_name("nodeproxy")
        own = ["--manifests", str(self.manifests), "--hostname-override", NODE, "--ipvs-drain-timeout", "60s"]
        command = [str(program), "run", "--config", str(self.file), "--iptables-variant", way.variant, *own]
        self.agent = AgentProcess(box, command)

    def write(self, **fields: Any) -> None:
        """Replace the configuration file."""
        temporary = self.file.with_suffix(".new")
        temporary.write_text(json.dumps(configuration(**fields)))
        temporary.rename(self.file)

    def mode(self) -> str:
        """The mode in force."""
        return http_get(self.box.node, "http://127.0.0.1:10249/proxyMode")[1]

    def switch(self, mode: str) -> None:
        """Ask for another mode, and wait until it is in force."""
        self.write(mode=mode)
        self.settle(lambda: self.mode() == mode, f"mode {mode}", 20)
        self.way = Way(mode, self.way.variant)

    def labelled(self, metric: str) -> float:
        """The value of a metric with labels, as /metrics spells it; 0 where it is not there."""
        _, text = http_get(self.box.node, "http://127.0.0.1:10249/metrics")
        return next((float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(metric + " ")), 0.0)


@contextmanager
def echo(where: Namespace, address: str, port: int) -> Iterator[None]:
    """A server that sends back what it gets, on as many connections as come."""
    listener = where.run(lambda: socket.create_server((address, port)))

    def serve(connection: socket.socket) -> None:
        with connection, suppress(ConnectionResetError):
            while data := connection.recv(1000):
                connection.sendall(data)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            Thread(target=serve, args=(connection,), daemon=True).start()

    Thread(target=accept, daemon=True).start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


class Flow:
    """A connection that can be asked whether it lives."""

    def __init__(self, where: Namespace, to: tuple[str, int]) -> None:
        self._socket = where.run(lambda: socket.create_connection(to, timeout=10))

    def check(self) -> None:
        """Something goes there and comes back."""
        self._socket.sendall(b"still here")
        assert self._socket.recv(100) == b"still here"

    def reset(self) -> None:
        """End it so that IPVS forgets it soon."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self._socket.close()


def put_echo(world: World) -> None:
    """The Service web leads to port 9090 of pod A; another has no endpoint."""
    world.put("web", service(nodePort=30080), endpoint_slice([POD_A], port=9090))
    world.put("empty", service("empty", cluster_ip=EMPTY_IP))


@needs_ipvs
@BOTH_VARIANTS
@pytest.mark.parametrize("first", ["iptables", "ipvs"])
def test_flows_live_through_switches_there_and_back(box: Sandbox, way: Way, first: str) -> None:
    modes = {"iptables": "ipvs", "ipvs": "iptables"}
    world = Configured(box, Way(first, way.variant), mode=first)
    put_echo(world)
    client = box.add_pod("10.1.0.9")
    with echo(box.pods[POD_A], POD_A, 9090), world.agent:
        flows: list[Flow] = []

        def open_flows() -> None:
            flows.extend(Flow(where, (CLUSTER_IP, 80)) for where in (client, box.node))
            flows.append(Flow(box.outside, (NODE_ADDRESS, 30080)))

        open_flows()
        mode = first
        for _ in range(3):
            mode = modes[mode]
            world.switch(mode)
            for flow in flows:
                flow.check()
            open_flows()
            assert names(ask(client, EMPTY_IP, 80)) == {str(Rejected())}
        assert world.labelled(f'nodeproxy_mode_switches_total{{result="done",to="{mode}"}}') >= 1
        for flow in flows:
            flow.check()
            flow.reset()


@needs_ipvs
@BOTH_VARIANTS
def test_ipvs_mode_leaves_once_its_connections_have_ended(box: Sandbox, way: Way) -> None:
    world = Configured(box, Way("ipvs", way.variant), mode="ipvs")
    put_echo(world)
    client = box.add_pod("10.1.0.9")
    with echo(box.pods[POD_A], POD_A, 9090), echo(box.node, "0.0.0.0", 2222), world.agent:
        flow = Flow(client, (CLUSTER_IP, 80))
        world.switch("iptables")
        flow.check()
        world.settle(lambda: len(world.virtual_servers()) == 1, "only the virtual server of the flow is left")
        assert " weight 0" in world.virtual_servers()[0]
        assert world.metric("nodeproxy_draining_real_servers") == 1
        # The address is still on the node, whose own processes are not reached by it.
        assert names(ask(client, CLUSTER_IP, 2222)) == {str(Rejected())}
        assert names(ask(box.node, CLUSTER_IP, 2222)) == {str(Rejected())}
        new_flow_works(client)
        flow.reset()
        world.settle(lambda: not _traces(box.node), "nothing of IPVS mode is left", 40)
        assert world.metric("nodeproxy_draining_real_servers") == 0
        assert not any("KUBE-IPVS" in rule for rule in world.rules("filter") + world.rules("nat"))
        new_flow_works(client)


def new_flow_works(client: Namespace) -> None:
    flow = Flow(client, (CLUSTER_IP, 80))
    flow.check()
    flow.reset()


def _traces(node: Namespace) -> list[str]:
    links = node.command(["ip", "-o", "link"]).stdout
    sets = node.command(["ipset", "list", "-n"]).stdout.split()
    return [*(["kube-ipvs0"] if "kube-ipvs0" in links else []), *sets]


@needs_ipvs
@pytest.mark.parametrize("way", [ipvs(NFT)], ids=str)
def test_draining_goes_on_after_a_restart(box: Sandbox, way: Way) -> None:
    world = Configured(box, Way("ipvs", way.variant), mode="ipvs")
    put_echo(world)
    client = box.add_pod("10.1.0.9")
    with echo(box.pods[POD_A], POD_A, 9090):
        with world.agent:
            flow = Flow(client, (CLUSTER_IP, 80))
            world.switch("iptables")
            world.agent.kill()
        with world.agent:
            flow.check()
            flow.reset()
            world.settle(lambda: not _traces(box.node), "nothing of IPVS mode is left", 40)


@pytest.mark.parametrize("way", HERE, ids=str)
def test_a_mode_that_cannot_be_had_is_refused_and_the_present_one_goes_on(box: Sandbox, way: Way) -> None:
    """An interface of the name that IPVS mode needs is there, and of another kind."""
    world = Configured(box, way)
    put_echo(world)
    box.node.ip(["link add kube-ipvs0 type veth peer name other0"])
    with echo(box.pods[POD_A], POD_A, 9090), world.agent:
        before = world.held()
        world.write(mode="ipvs")
        world.settle(
            lambda: world.labelled('nodeproxy_config_reloads_total{result="refused"}') == 1, "the refusal is counted"
        )
        assert world.mode() == "iptables"
        assert "this kernel cannot do IPVS mode" in world.agent.log_text()
        assert world.labelled('nodeproxy_mode_switches_total{result="failed",to="ipvs"}') == 1
        assert world.held() == before
        world.write(mode="iptables", iptables={"masqueradeAll": True, "minSyncPeriod": "0s"})
        world.settle(lambda: world.held() != before, "the next configuration is applied")


@pytest.mark.parametrize("way", HERE, ids=str)
@pytest.mark.parametrize(
    ("fields", "complaint"),
    [({"mode": "userspace"}, "mode:"), ({"iptables": {"syncPeriod": "soon"}}, "iptables.syncPeriod")],
    ids=["mode", "duration"],
)
def test_a_file_that_makes_no_sense_changes_nothing(
    box: Sandbox, way: Way, fields: Mapping[str, Any], complaint: str
) -> None:
    world = Configured(box, way)
    put_echo(world)
    with echo(box.pods[POD_A], POD_A, 9090), world.agent:
        world.write(**fields)
        world.settle(lambda: complaint in world.agent.log_text(), "the complaint names the field")
        world.settle(lambda: world.labelled('nodeproxy_config_reloads_total{result="refused"}') == 1, "counted")
        assert names(ask(box.pods[POD_B], CLUSTER_IP, 80)) != {str(NoListener())}
        assert "Traceback" not in world.agent.log_text()


@pytest.mark.parametrize("way", [NFT], ids=str)
def test_settings_are_applied_live_and_what_is_not_is_named(box: Sandbox, way: Way) -> None:
    world = Configured(box, way)
    world.put("web", service(nodePort=30080), endpoint_slice([POD_A, POD_B]))
    with world.agent:
        assert not any("--set-xmark 0x2000" in rule for rule in world.rules())
        world.write(
            iptables={"masqueradeBit": 13, "minSyncPeriod": "0s"},
            metricsBindAddress="127.0.0.1:10250",
            nodePortAddresses=["192.0.2.0/24"],
            clientConnection={"kubeconfig": "/nowhere"},
        )
        world.settle(lambda: any("--set-xmark 0x2000" in rule for rule in world.rules()), "another mark")
        assert names(ask(box.outside, NODE_ADDRESS, 30080)) == {str(NoListener())}
        world.settle(_answers(box.node, "http://127.0.0.1:10250/metrics"), "metrics are served at the new address")
        status, text = http_get(box.node, "http://127.0.0.1:10250/configz")
        assert status == 200
        shown = json.loads(text)["kubeproxy.config.k8s.io"]
        assert shown["iptables"]["masqueradeBit"] == 13
        assert shown["nodePortAddresses"] == ["192.0.2.0/24"]


def _answers(where: Namespace, url: str) -> Callable[[], bool]:
    def answers() -> bool:
        try:
            return http_get(where, url)[0] == 200
        except OSError:
            return False

    return answers


@pytest.mark.parametrize("way", [NFT], ids=str)
def test_sighup_reads_the_file_again(box: Sandbox, way: Way) -> None:
    world = Configured(box, way)
    with world.agent:
        assert world.agent.process is not None
        start = time.monotonic()
        while world.labelled('nodeproxy_config_reloads_total{result="applied"}') == 0:
            world.agent.process.send_signal(signal.SIGHUP)
            assert time.monotonic() - start < 10
            time.sleep(0.1)
        assert names(ask(box.node, "127.0.0.1", 10256)) != {str(NoListener())}
