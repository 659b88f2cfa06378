"""Owns the node sandbox: a throw-away node in network namespaces, its pods, and the world outside.

```
 pod eth0 ─┐                                   ┌─ eth0 client
 pod eth0 ─┤ br0  NODE  eth0 ───── up0 OUTSIDE ┤
 pod eth0 ─┘      lan0                         └─ eth0 client
```

- **node**: the bridge `br0` with hairpin ports for pods, the uplink `eth0`, and `lan0`, which carries the node's own
  addresses. Forwarding is on. Pods have host routes (/32, /128) by the bridge, so any address can be a pod.
- **outside**: the router behind the uplink. It delivers to itself whatever the node sends out that is not for a client:
  servers there stand for pods of other nodes (any address, no set-up), and for "the packet left the node unchanged".
  Whatever does not come from the node goes to the node, so clients reach every service address through it, and answers
  of remote pods always come back through it. What nobody serves there is met with silence, as with a host that is down.
- **client**: one namespace for each client address, so that a client's address may also be a destination.

Links have addresses of their own (100.64.0.0/16, fdff:6464::/32), and so what a masqueraded packet carries is never
one of the node's addresses in `node_addresses`: masquerading shows even when the node itself is the client.

Addresses are given as text without prefix length; both families everywhere.
"""

from __future__ import annotations

import ipaddress
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final, Self

from nodeproxy.sandbox.namespace import Namespace, cleanup_stale, unique_stem
from nodeproxy.sandbox.servers import EchoServers

NODE_LINK: Final = ("100.64.0.2", "fdff:6464::2")
OUTSIDE_LINK: Final = ("100.64.0.1", "fdff:6464::1")
BRIDGE: Final = ("100.64.1.1", "fdff:6464:1::1")
CLIENT_GATEWAY: Final = ("100.64.2.1", "fdff:6464:2::1")

# Hardware addresses are fixed and the neighbour entries permanent: the kernel has one limit on all other entries, for
# all namespaces of the machine together (gc_thresh3, 1024), and drops packets when many sandboxes reach it.
_BRIDGE_MAC: Final = "02:64:00:00:00:01"
_NODE_MAC: Final = "02:64:00:00:00:02"
_OUTSIDE_MAC: Final = "02:64:00:00:00:03"
_GATEWAY_MAC: Final = "02:64:00:00:00:04"

_COMMON_SYSCTLS: Final = {
    "net.ipv4.conf.all.rp_filter": 0,
    "net.ipv4.conf.default.rp_filter": 0,
    "net.ipv4.icmp_ratelimit": 0,
    "net.ipv6.icmp.ratelimit": 0,
    "net.ipv6.conf.all.disable_ipv6": 0,
    "net.ipv6.conf.default.disable_ipv6": 0,
    **{f"net.ipv6.conf.{where}.{key}": 0 for where in ("all", "default") for key in ("accept_dad", "accept_ra")},
    "net.ipv6.conf.default.dad_transmits": 0,
}
# For each namespace since Linux 6.12 or so; before, one limit for the machine, and not to be seen in here.
_NEWER_SYSCTLS: Final = {"net.ipv4.icmp_msgs_per_sec": 1_000_000, "net.ipv4.icmp_msgs_burst": 1_000_000}
_FORWARDING: Final = {
    "net.ipv4.ip_forward": 1,
    "net.ipv6.conf.all.forwarding": 1,
    "net.ipv6.conf.default.forwarding": 1,
}


def bits(address: str) -> int:
    """32 or 128, by the family of the address."""
    return ipaddress.ip_address(address).max_prefixlen


def _flag(address: str) -> str:
    return " nodad" if bits(address) == 128 else ""


def _address(address: str, device: str, *, prefix: int | None = None) -> str:
    return f"addr add {address}/{prefix or bits(address)} dev {device}{_flag(address)}"


def _neighbour(address: str, mac: str, device: str) -> str:
    return f"neigh add {address} lladdr {mac} dev {device} nud permanent"


def _mac(number: int) -> str:
    return f"02:64:01:{number >> 16:02x}:{number >> 8 & 255:02x}:{number & 255:02x}"


def _default(family_of: str) -> str:
    return "::/0" if bits(family_of) == 128 else "0.0.0.0/0"


# A packet on its way from a client to the node must not be taken for a socket here just because addresses match.
_NO_SHORTCUT: Final = {f"net.ipv4.{proto}_early_demux": 0 for proto in ("ip", "tcp", "udp")}


class Sandbox:
    """A node in namespaces. Use as a context manager; what it made is gone afterwards, also after SIGINT and SIGTERM."""

    def __init__(self, *, node_addresses: Sequence[str] = (), bridge_netfilter: bool = True) -> None:
        self.stem = unique_stem()
        self.directory = Path(tempfile.gettempdir()) / self.stem
        self.node_addresses = list(node_addresses)
        self.bridge_netfilter = bridge_netfilter
        self.pods: dict[str, Namespace] = {}
        self.clients: dict[str, Namespace] = {}
        self._namespaces: list[Namespace] = []
        self._links = 0
        self._sigterm: object = None

    def __enter__(self) -> Self:
        cleanup_stale()
        self._catch_sigterm()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _catch_sigterm(self) -> None:
        """SIGTERM unwinds the stack as SIGINT does, unless the program has its own handler for it."""
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _exit)
            self._sigterm = signal.SIG_DFL

    def _build(self) -> None:
        self.directory.mkdir()
        self.servers = EchoServers()
        self.node = self.namespace("node")
        self.outside = self.namespace("outside")
        for router in (self.node, self.outside):
            router.sysctl(_FORWARDING)
        self.outside.sysctl(_NO_SHORTCUT)
        self.node.environment["XTABLES_LOCKFILE"] = str(self.directory / "xtables.lock")
        self._build_node()
        self._build_outside()
        self.node.wait_links_up(["eth0"])
        self.outside.wait_links_up(["up0"])

    def _build_node(self) -> None:
        self.node.ip(
            [
                "link set lo up",
                f"link add br0 address {_BRIDGE_MAC} type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
                "link set br0 up",
                *(_address(address, "br0") for address in BRIDGE),
                f"link add eth0 address {_NODE_MAC} type veth"
                f" peer name up0 address {_OUTSIDE_MAC} netns {self.outside.name}",
                f"link add lan0 type veth peer name lan0 netns {self.outside.name}",
                "link set eth0 up",
                "link set lan0 up",
                *(_address(address, "eth0", prefix=bits(address) - 2) for address in NODE_LINK),
                *(f"route add {_default(via)} via {via} dev eth0" for via in OUTSIDE_LINK),
                *(_neighbour(via, _OUTSIDE_MAC, "eth0") for via in OUTSIDE_LINK),
                *(_address(address, "lan0") for address in self.node_addresses),
            ]
        )
        keys = ("net.bridge.bridge-nf-call-iptables", "net.bridge.bridge-nf-call-ip6tables")
        self.node.sysctl(dict.fromkeys(keys, int(self.bridge_netfilter)), optional=True)

    def _build_outside(self) -> None:
        self.outside.ip(
            [
                "link set lo up",
                "link set up0 up",
                "link set lan0 up",
                *(_address(address, "up0", prefix=bits(address) - 2) for address in OUTSIDE_LINK),
                *(f"route add {_default(via)} via {via} dev up0 table 101" for via in NODE_LINK),
                *(_neighbour(via, _NODE_MAC, "up0") for via in NODE_LINK),
            ]
        )
        for family in (4, 6):
            rules = ["rule add not iif up0 lookup 101 pref 100", "route add local default dev lo table main"]
            self.outside.ip(rules, family=family)

    @property
    def links(self) -> int:
        """How many pods and clients have been added, which is the number in the last one's link."""
        return self._links

    def namespace(self, role: str) -> Namespace:
        """Another namespace of this sandbox, with the sysctls that all of them have, not linked to anything."""
        made = Namespace(f"{self.stem}-{role}", sysctls=_COMMON_SYSCTLS)
        self._namespaces.append(made)
        made.sysctl(_NEWER_SYSCTLS, optional=True)
        return made

    def add_pods(self, pods: Iterable[Sequence[str]]) -> list[Namespace]:
        """Pods of this node on its bridge, each given by its addresses; looked up later in `pods` by any of them."""
        made, ports = [], []
        lines: list[str] = []
        for addresses in pods:
            self._links += 1
            pod = self.namespace(f"pod{self._links}")
            port = f"pod{self._links}"
            ports.append(port)
            lines += [
                f"link add {port} type veth peer name eth0 address {_mac(self._links)} netns {pod.name}",
                f"link set {port} master br0 up",
                f"link set {port} type bridge_slave hairpin on",
                *(f"route add {address} dev br0" for address in addresses),
                *(_neighbour(address, _mac(self._links), "br0") for address in addresses),
            ]
            made.append((pod, addresses))
        self.node.ip(lines)
        self._configure(made, BRIDGE, _BRIDGE_MAC)
        self.node.wait_links_up(["br0", *ports] if made else [])
        self.pods |= {address: pod for pod, addresses in made for address in addresses}
        return [pod for pod, _ in made]

    def add_pod(self, *addresses: str) -> Namespace:
        """One pod of this node."""
        return self.add_pods([addresses])[0]

    def remove_pod(self, pod: Namespace) -> None:
        """Take a pod away, link and all, as when its node deletes it."""
        pod.command(["ip", "link", "delete", "eth0"])
        mine = [address for address, other in self.pods.items() if other is pod]
        self.node.ip(f"{what} del {address} dev br0" for address in mine for what in ("neigh", "route"))
        self.pods = {address: other for address, other in self.pods.items() if other is not pod}
        self._namespaces.remove(pod)
        pod.close()

    def add_clients(self, clients: Iterable[Sequence[str]]) -> list[Namespace]:
        """Clients outside the cluster, each given by its addresses; looked up later in `clients` by any of them."""
        made, ports = [], []
        lines: list[str] = []
        for addresses in clients:
            self._links += 1
            client = self.namespace(f"client{self._links}")
            port = f"cl{self._links}"
            ports.append(port)
            lines += [
                f"link add {port} address {_GATEWAY_MAC} type veth"
                f" peer name eth0 address {_mac(self._links)} netns {client.name}",
                f"link set {port} up",
                *(_address(gateway, port) for gateway in CLIENT_GATEWAY),
                *(f"route add {address} dev {port}" for address in addresses),
                *(_neighbour(address, _mac(self._links), port) for address in addresses),
            ]
            made.append((client, addresses))
        self.outside.ip(lines)
        self._configure(made, CLIENT_GATEWAY, _GATEWAY_MAC)
        self.outside.wait_links_up(ports)
        self.clients |= {address: client for client, addresses in made for address in addresses}
        return [client for client, _ in made]

    def add_client(self, *addresses: str) -> Namespace:
        """One client outside the cluster."""
        return self.add_clients([addresses])[0]

    def _configure(self, hosts: Sequence[tuple[Namespace, Sequence[str]]], gateways: Sequence[str], mac: str) -> None:
        for host, addresses in hosts:
            lines = ["link set lo up", "link set eth0 up", *(_address(address, "eth0") for address in addresses)]
            for gateway in gateways:
                if any(bits(address) == bits(gateway) for address in addresses):
                    lines += [f"route add {gateway} dev eth0", f"route add {_default(gateway)} via {gateway} dev eth0"]
                    lines.append(_neighbour(gateway, mac, "eth0"))
            host.ip(lines)
        for host, _ in hosts:
            host.wait_links_up(["eth0"])

    @contextmanager
    def node_address(self, address: str, device: str = "lo") -> Iterator[None]:
        """Give the node one more local address for a while (as when a load balancer's address is bound on nodes).

        One that it has already, as IPVS mode makes it, stays as it is.
        """
        if self.is_local(address):
            yield
            return
        self.node.ip([_address(address, device)])
        self._wait_local(address)
        try:
            yield
        finally:
            self.node.ip([f"addr del {address}/{bits(address)} dev {device}"])

    def _wait_local(self, address: str) -> None:
        """Wait until packets to an address of the node stay there: the kernel makes an IPv6 address's route a bit later."""
        deadline = time.monotonic() + 5
        while not self.is_local(address):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{address} does not become local")
            time.sleep(0.005)

    def is_local(self, address: str) -> bool:
        """Whether packets of the node to an address stay on it."""
        return self.node.command(["ip", "route", "get", address]).stdout.startswith("local ")

    def serve(self, where: Namespace, address: str, port: int, *, protocol: str = "TCP", name: str | None = None) -> None:
        """A server at address:port in a namespace; by default its name is "address:port"."""
        self.servers.add(where, address, port, protocol=protocol, name=name)

    def owned_addresses(self) -> set[str]:
        """Every address the node itself has, those of its links included: one of them is what masquerading gives."""
        return {*self.node_addresses, *NODE_LINK, *BRIDGE}

    def close(self) -> None:
        """Remove everything. Safe to call twice."""
        if hasattr(self, "servers"):
            self.servers.close()
        for namespace in self._namespaces:
            with suppress(OSError):
                namespace.close()
        self._namespaces.clear()
        shutil.rmtree(self.directory, ignore_errors=True)
        if self._sigterm is not None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._sigterm = None


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
