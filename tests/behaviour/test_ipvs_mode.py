"""What only IPVS mode has: draining, the node's own processes and addresses, foreign virtual servers, settings, repairs."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from nodeproxy.kernel.ipvs import (
    IPVS,
    AddRealServer,
    AddVirtualServer,
    DeleteRealServer,
    DeleteVirtualServer,
    EditRealServer,
    RealServer,
    VirtualServer,
    VirtualServerSettings,
)
from nodeproxy.sandbox.client import Answered, NoListener, Rejected
from nodeproxy.sandbox.namespace import Namespace
from nodeproxy.sandbox.pace import scaled
from nodeproxy.sandbox.sockets import RESET_ON_CLOSE
from nodeproxy.sandbox.topology import NODE_LINK, Sandbox
from tests.ways import IPVS_LEGACY, IPVS_NFT, NFT, ipvs, needs_ipvs

from .conftest import POD_A, POD_B
from .test_operations import OTHER_IP, serves, two_services
from .world import CLUSTER_IP, NODE_ADDRESS, World, ask, endpoint_slice, names, service

pytestmark = pytest.mark.kernel
CLIENT = "10.1.0.9"

in_ipvs_mode = pytest.mark.parametrize("way", [ipvs(IPVS_NFT)], ids=str)
in_both_variants = pytest.mark.parametrize("way", [ipvs(IPVS_LEGACY), ipvs(IPVS_NFT)], ids=str)


class Conversation:
    """A connection from a client to an echo of our own at an endpoint, through a Service."""

    def __init__(self, client: Namespace, server: Namespace, listen: tuple[str, int], through: tuple[str, int]) -> None:
        self._listener = server.run(socket.create_server, listen)
        self._client = client
        self._through = through

    def open(self) -> None:
        self._connection = self._client.run(lambda: socket.create_connection(self._through, timeout=10))
        self._accepted, _ = self._listener.accept()
        self._accepted.settimeout(10)

    def check(self) -> None:
        """It is alive, both ways."""
        for sender, receiver in ((self._connection, self._accepted), (self._accepted, self._connection)):
            sender.sendall(b"still here")
            assert receiver.recv(100) == b"still here"

    def close(self) -> None:
        """Ended by resets: IPVS forgets such a connection in ten seconds, where it remembers others for two minutes."""
        for one in (self._connection, self._accepted):
            if one.fileno() < 0:
                continue
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        for one in (self._connection, self._accepted, self._listener):
            one.close()


@contextmanager
def conversation(world: World) -> Iterator[Conversation]:
    """With the Service web at endpoint POD_A:9090, an established connection to it."""
    client = world.box.add_pod(CLIENT)
    made = Conversation(client, world.box.pods[POD_A], (POD_A, 9090), (CLUSTER_IP, 80))
    world.put("web", service(), endpoint_slice([POD_A], port=9090))
    with world.agent:
        made.open()
        try:
            yield made
        finally:
            made.close()


def weights(world: World, address: str = CLUSTER_IP, port: int = 80) -> dict[str, int]:
    """The real servers of a virtual server, with their weights."""

    def read() -> dict[str, int]:
        with IPVS() as ipvs:
            return {str(real.server): real.weight for real in ipvs.real_servers(VirtualServer(4, "tcp", address, port))}

    return world.box.node.run(read)


@in_ipvs_mode
def test_an_endpoint_that_goes_drains_and_is_gone_when_its_connections_end(world: World) -> None:
    with conversation(world) as talk:
        world.put("web", service(), endpoint_slice([POD_B]))
        world.settle(lambda: weights(world) == {f"{POD_A}:9090": 0, f"{POD_B}:8080": 1}, "a drains, b serves")
        talk.check()
        assert names(ask(world.box.pods[CLIENT], CLUSTER_IP, 80, 5)) == {"b"}
        # the agent is killed and started meanwhile: what drains goes on draining
        world.agent.kill()
        talk.check()
        world.agent.start()
        world.agent.wait_ready()
        assert weights(world)[f"{POD_A}:9090"] == 0
        talk.check()
        # it comes back: at once
        world.put("web", service(), endpoint_slice([POD_A], port=9090))
        world.settle(lambda: weights(world).get(f"{POD_A}:9090") == 1, "a is taken back")
        talk.check()
        # the whole Service goes: the connection stays, new ones are rejected
        world.remove("web")
        world.settle(lambda: weights(world).get(f"{POD_A}:9090") == 0, "a drains again")
        talk.check()
        assert ask(world.box.pods[CLIENT], CLUSTER_IP, 80) == [Rejected()]
        talk.close()
        world.settle(lambda: world.virtual_servers() == [], "the drained virtual server is gone", timeout=60)
        world.settle(lambda: not world.box.is_local(CLUSTER_IP), "its address is gone")


@needs_ipvs
def test_draining_ends_after_its_time(box: Sandbox) -> None:
    world = World(box, IPVS_NFT, flags=["--ipvs-drain-timeout", "2s"])
    with conversation(world) as talk:
        world.put("web", service(), endpoint_slice([POD_B]))
        world.settle(
            lambda: list(weights(world)) == [f"{POD_B}:8080"], "a is gone, although somebody talks to it", timeout=8
        )
        with pytest.raises((TimeoutError, ConnectionError, AssertionError)):
            talk._accepted.settimeout(1)
            talk.check()


@in_both_variants
def test_processes_of_the_node_are_not_reached_at_service_addresses(world: World) -> None:
    world.put("web", service(nodePort=30080), endpoint_slice([POD_A]))
    world.put("empty", service("empty", cluster_ip=OTHER_IP))
    world.put(
        "external",
        service("external", cluster_ip="10.96.0.30", externalIPs=[NODE_ADDRESS]),
        endpoint_slice([POD_B], "external"),
    )
    client, outside = world.box.add_pod(CLIENT), world.box.add_client("203.0.113.7")
    for protocol in ("TCP", "UDP"):
        for port in (22, 80):
            world.box.serve(world.box.node, "0.0.0.0", port, protocol=protocol, name="node")
    with world.agent:
        for where in (client, world.box.node, outside):
            for address in (CLUSTER_IP, OTHER_IP):
                assert ask(where, address, 22) == [Rejected()]
                assert ask(where, address, 22, protocol="UDP") == [Rejected()]
            assert ask(where, OTHER_IP, 80) == [Rejected()]
            assert names(ask(where, CLUSTER_IP, 80)) == {"a"}
            # the node's own address, also where it is an external IP of a Service: other ports are the node's
            assert names(ask(where, NODE_ADDRESS, 80)) == {"b"}
            assert names(ask(where, NODE_ADDRESS, 22)) == {"node"}
            assert names(ask(where, NODE_ADDRESS, 30080)) == {"a"}
        assert client.run(answers_to_ping, CLUSTER_IP)


def answers_to_ping(address: str) -> bool:
    """Whether an ICMP echo request is answered. Runs in a namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as ping:
        ping.settimeout(scaled(2))
        ping.connect((address, 0))
        body = struct.pack("!BBHHH", 8, 0, 0, 46, 1)
        checksum = ~sum(struct.unpack("!4H", body)) & 0xFFFF
        ping.send(struct.pack("!BBHHH", 8, 0, checksum, 46, 1))
        return ping.recv(100)[20] == 0


@in_ipvs_mode
def test_addresses_that_the_node_gets_later_serve_node_ports(world: World) -> None:
    world.put("web", service(nodePort=30080), endpoint_slice([POD_A]))
    world.put("empty", service("empty", cluster_ip=OTHER_IP, nodePort=30081))
    with world.agent:
        assert ask(world.box.outside, "192.168.7.7", 30080) != [Answered("a", NODE_LINK[0], 0)]
        with world.box.node_address("192.168.7.7", "lan0"):
            world.settle(lambda: names(ask(world.box.outside, "192.168.7.7", 30080)) == {"a"}, "the new address serves")
            assert ask(world.box.outside, "192.168.7.7", 30081) == [Rejected()]
            assert names(ask(world.box.outside, NODE_ADDRESS, 30080)) == {"a"}
        # Once the connections that it had have ended: IPVS keeps one that was reset for 10 s.
        world.settle(lambda: "192.168.7.7" not in str(world.virtual_servers()), "it is gone again", timeout=30)
        # an address of a Service that the node gets on an interface of its own is the node's, and back again
        world.box.serve(world.box.node, "0.0.0.0", 22, name="node")
        assert ask(world.box.outside, OTHER_IP, 22) == [Rejected()]
        world.box.node.ip([f"addr add {OTHER_IP}/32 dev lan0"])
        world.settle(lambda: names(ask(world.box.outside, OTHER_IP, 22)) == {"node"}, "the address is the node's own")
        assert ask(world.box.outside, OTHER_IP, 80) == [Rejected()]
        world.box.node.ip([f"addr del {OTHER_IP}/32 dev lan0"])
        world.settle(lambda: ask(world.box.outside, OTHER_IP, 22) == [Rejected()], "the address is the Service's")


@needs_ipvs
def test_virtual_servers_of_others_are_left_alone(box: Sandbox) -> None:
    world = World(box, IPVS_NFT, flags=["--ipvs-exclude-cidrs", "10.97.0.0/16"])
    foreign = VirtualServer(4, "tcp", "192.0.2.1", 80)
    excluded = VirtualServer(4, "tcp", "10.97.0.1", 80)
    usurped = VirtualServer(4, "tcp", CLUSTER_IP, 80)
    settings = VirtualServerSettings(scheduler="wlc")
    operations = [AddVirtualServer(server, settings) for server in (foreign, excluded, usurped)]
    real = [AddRealServer(server, RealServer("192.0.2.9", 80)) for server in (foreign, usurped)]
    assert box.node.run(lambda: IPVS().change([*operations, *real])) == {}
    world.put("web", service(), endpoint_slice([POD_A]))
    with world.agent:
        assert serves(world) == {"a"}
        world.settle(lambda: list(weights(world)) == [f"{POD_A}:8080"], "the one in our place is ours", timeout=10)
    world.box.node.command([world.agent.command[0], "cleanup"])
    assert [line.split()[1] for line in world.virtual_servers()] == ["10.97.0.1:80", "192.0.2.1:80"]


Damage = Callable[[World], object]


def _change(*operations: object) -> Damage:
    return lambda world: world.box.node.run(lambda: IPVS().change(operations))  # type: ignore[arg-type]


def _run(*command: str) -> Damage:
    return lambda world: world.box.node.command(list(command))


WEB = VirtualServer(4, "tcp", CLUSTER_IP, 80)
DAMAGES: dict[str, Damage] = {
    "all virtual servers deleted": lambda world: world.box.node.run(lambda: IPVS().flush()),
    "a virtual server deleted": _change(DeleteVirtualServer(WEB)),
    "a real server deleted": _change(DeleteRealServer(WEB, RealServer(POD_A, 8080))),
    "a weight changed": _change(EditRealServer(WEB, RealServer(POD_A, 8080), 0)),
    "an IPv6 virtual server deleted": _change(DeleteVirtualServer(VirtualServer(6, "tcp", "fd00:96::10", 80))),
    "the interface deleted": _run("ip", "link", "delete", "kube-ipvs0"),
    "an address deleted": _run("ip", "address", "delete", f"{CLUSTER_IP}/32", "dev", "kube-ipvs0"),
    "a set flushed": _run("ipset", "flush", "KUBE-CLUSTER-IP"),
    "the set of addresses flushed": _run("ipset", "flush", "KUBE-IPVS-IPS"),
    "an entry exchanged": _run(
        "bash", "-c", f"ipset del KUBE-CLUSTER-IP {OTHER_IP},tcp:80; ipset add KUBE-CLUSTER-IP 1.2.3.4,tcp:80"
    ),
    "the nat table flushed": _run("iptables-nft", "-t", "nat", "-F"),
    "a fence flushed": _run("iptables-nft", "-t", "mangle", "-F", "KUBE-PROXY-FIREWALL"),
}


@in_ipvs_mode
def test_what_others_change_is_put_back(world: World) -> None:
    two_services(world)
    world.put("six", service("six", cluster_ip="fd00:96::10"), endpoint_slice(["fd00:10::1"], "six"))
    with world.agent:
        time.sleep(1.5)  # an audit has passed
        before = world.held()
        for number, (what, damage) in enumerate(DAMAGES.items(), 1):
            damage(world)
            world.settle_as(before, f"{what}: put back")
            assert world.metric("nodeproxy_drift_repairs_total") == number, what
        assert serves(world) == {"a"}


@in_ipvs_mode
def test_a_refused_service_port_holds_up_no_other(world: World) -> None:
    # An endpoint that is the broadcast address of one of the node's networks: IPVS takes none.
    world.put("web", service(), endpoint_slice([POD_A]))
    world.put("other", service("other", cluster_ip=OTHER_IP), endpoint_slice(["100.64.0.3"], "other"))
    with world.agent:
        assert serves(world) == {"a"}
        assert "test/other:p" in world.agent.log_text()
        assert world.metric("nodeproxy_refused_service_ports") == 1
        world.put("other", service("other", cluster_ip=OTHER_IP), endpoint_slice([POD_B], "other"))
        world.settle(lambda: serves(world, OTHER_IP) == {"b"}, "what the kernel takes is programmed")
        world.settle(lambda: world.metric("nodeproxy_refused_service_ports") == 0, "nothing is refused any more")
        world.put("other", service("other", cluster_ip=OTHER_IP), endpoint_slice([POD_B, "100.64.0.3"], "other"))
        world.settle(lambda: world.metric("nodeproxy_refused_service_ports") == 1, "refused again")
        assert serves(world, OTHER_IP) == {"b"}
        world.put("other", service("other", cluster_ip=OTHER_IP), endpoint_slice(["100.64.0.3"], "other"))
        world.put("web", service(), endpoint_slice([POD_B]))
        world.settle(lambda: serves(world) == {"b"}, "others are programmed")
        assert serves(world, OTHER_IP) == {"b"}, "what was programmed of the refused one stays"


@in_ipvs_mode
def test_affinity_is_of_the_service_port_whatever_the_frontend(world: World) -> None:
    affinity = {"sessionAffinity": "ClientIP", "externalIPs": ["198.51.100.7"]}
    world.put("web", service(nodePort=30080, **affinity), endpoint_slice([POD_A, POD_B]))
    clients = [world.box.add_pod(f"10.1.9.{number}") for number in range(1, 7)]
    with world.agent:
        seen = []
        for client in clients:
            answers = [
                *ask(client, CLUSTER_IP, 80, 2),
                *ask(client, NODE_ADDRESS, 30080, 2),
                *ask(client, "198.51.100.7", 80, 2),
                *ask(client, CLUSTER_IP, 80),
            ]
            assert len(names(answers)) == 1
            seen.append(names(answers).pop())
        assert set(seen) == {"a", "b"}


@needs_ipvs
def test_the_node_is_set_up_as_told(box: Sandbox) -> None:
    flags = ["--ipvs-strict-arp", "--ipvs-tcp-timeout", "20m", "--ipvs-tcpfin-timeout", "30s", "--ipvs-udp-timeout", "1m"]
    world = World(box, IPVS_NFT, flags=flags)
    world.put("web", service(), endpoint_slice([POD_A]))
    with world.agent:
        for name, value in (
            ("net.ipv4.vs.conntrack", "1"),
            ("net.ipv4.vs.expire_nodest_conn", "1"),
            ("net.ipv4.vs.expire_quiescent_template", "1"),
            ("net.ipv4.vs.conn_reuse_mode", "1"),
            ("net.ipv4.conf.all.arp_ignore", "1"),
            ("net.ipv4.conf.all.arp_announce", "2"),
            ("net.ipv4.conf.all.route_localnet", "0"),
        ):
            assert box.node.read_sysctl(name) == value, name
        timeouts = box.node.run(lambda: IPVS().timeouts())
        assert (timeouts.tcp, timeouts.tcp_fin, timeouts.udp) == (1200, 30, 60)


@in_ipvs_mode
def test_nobody_listens_where_only_the_address_is_left(world: World) -> None:
    world.put("web", service(), endpoint_slice([POD_A]))
    with world.agent:
        assert serves(world) == {"a"}
        world.remove("web")
        world.settle(lambda: not world.box.is_local(CLUSTER_IP), "the address is gone")
        assert ask(world.box.node, NODE_ADDRESS, 80) == [NoListener()]


@needs_ipvs
def test_the_other_mode_takes_over_at_a_restart_and_back(box: Sandbox) -> None:
    world = World(box, IPVS_NFT)
    affinity = {"sessionAffinity": "ClientIP"}
    world.put("web", service(), endpoint_slice([POD_A]))
    world.put("other", service("other", cluster_ip=OTHER_IP, **affinity), endpoint_slice([POD_B], "other"))
    world.put("empty", service("empty", cluster_ip="10.96.0.30"))
    other = World(box, NFT, manifests=world.manifests)
    for one in (world, other, world):
        with one.agent:
            assert (serves(one), serves(one, OTHER_IP), serves(one, "10.96.0.30")) == ({"a"}, {"b"}, {str(Rejected())})
            one.settle(lambda: traces_of_other_modes(one) == [], "what the other mode left is gone")  # noqa: B023


def traces_of_other_modes(world: World) -> list[str]:
    """What is in the kernel that the world's mode has no use for."""
    sets = world.box.node.command(["ipset", "list", "-name"]).stdout.split()
    if world.way.mode == "ipvs":
        return [name for name in sets if "AFFINITY" in name] + [rule for rule in world.rules() if "KUBE-SVC" in rule]
    left = [name for name in sets if "AFFINITY" not in name] + world.virtual_servers()
    left += [rule for rule in world.rules("mangle") if "KUBE" in rule]
    return left + (["kube-ipvs0"] if "kube-ipvs0" in world.box.node.command(["ip", "link"]).stdout else [])
