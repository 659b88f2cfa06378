"""`make demo`: a throw-away node in network namespaces, Services programmed by nodeproxy, live requests through them.

Everything happens in namespaces of this process and is gone at the end. The exit status is 0 only if every request was
answered, each client of the Service with affinity kept its backend, and the removed backend got nothing new.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hack.demo_rules import excerpt
from nodeproxy.sandbox.agent import AgentError, AgentFlags, AgentProcess, nodeproxy_command
from nodeproxy.sandbox.client import PATIENT, Answered, Probe, Verdict, probe_many
from nodeproxy.sandbox.namespace import NamespaceError
from nodeproxy.sandbox.topology import Sandbox

NODE = "demo-node"
NODE_IP = "192.168.0.2"
POD_CIDR = "10.244.0.0/16"
POD_CLIENT = "10.244.0.2"
OUTSIDE_CLIENT = "203.0.113.7"
CLIENTS = [f"10.244.8.{number}" for number in range(1, 201)]  # for the Service with affinity
REQUESTS_PER_CLIENT = 5

WEB, WEB_PORT, WEB_NODE_PORT = "10.96.0.10", 80, 30080
CART, CART_PORT = "10.96.0.20", 80
LOCAL_BACKENDS = {"web-1": "10.244.0.11", "web-2": "10.244.0.12", "web-3": "10.244.0.13"}
REMOTE_BACKENDS = {"web-4": "10.244.5.14"}
WEB_BACKENDS = LOCAL_BACKENDS | REMOTE_BACKENDS
CART_BACKENDS = {"cart-1": "10.244.0.21", "cart-2": "10.244.0.22", "cart-3": "10.244.5.23"}
REMOVED = "web-2"

STEADY = 3.0  # seconds of requests before the backend is taken out of the manifests
GRACE = 1.5  # seconds from then until its server is gone, as a pod that is asked to terminate
AFTER = 2.0  # seconds of requests without it
SETTLED = 0.5  # seconds after the removal from which on the removed backend must get nothing new
TICK = 0.05
BATCH = 6  # requests at a time, through each of the ways


def service(name: str, address: str, port: int, *, node_port: int = 0, affinity: bool = False) -> dict[str, object]:
    """A Service of namespace `shop`."""
    ports: dict[str, object] = {"port": port, "targetPort": 8080, "protocol": "TCP"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {
            "clusterIP": address,
            "clusterIPs": [address],
            "type": "NodePort" if node_port else "ClusterIP",
            "ports": [ports | ({"nodePort": node_port} if node_port else {})],
            "sessionAffinity": "ClientIP" if affinity else "None",
            **({"sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10800}}} if affinity else {}),
        },
    }


def endpoint_slice(name: str, backends: dict[str, str]) -> dict[str, object]:
    """The EndpointSlice of a Service: its ready backends, name to address."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{name}-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "endpoints": [
            {"addresses": [address], "nodeName": NODE if address.startswith("10.244.0.") else "another-node"}
            for address in backends.values()
        ],
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
    }


def write_manifests(directory: Path, web: dict[str, str]) -> None:
    """(Re)write the manifests: each file is replaced in one step, so that no half of it is ever read."""
    files = {
        "web": [service("web", WEB, WEB_PORT, node_port=WEB_NODE_PORT), endpoint_slice("web", web)],
        "cart": [service("cart", CART, CART_PORT, affinity=True), endpoint_slice("cart", CART_BACKENDS)],
    }
    for name, objects in files.items():
        draft = directory / f".{name}.draft"
        draft.write_text(yaml.safe_dump_all(objects, sort_keys=False))
        draft.rename(directory / f"{name}.yaml")


def build(box: Sandbox) -> None:
    """Pods, clients and servers; a server's name is its backend's."""
    local = [address for address in (WEB_BACKENDS | CART_BACKENDS).values() if address.startswith("10.244.0.")]
    box.add_pods([[POD_CLIENT], CLIENTS, *([address] for address in local)])
    box.add_client(OUTSIDE_CLIENT)
    for name, address in (WEB_BACKENDS | CART_BACKENDS).items():
        box.serve(box.pods.get(address, box.outside), address, 8080, name=name)


@dataclass
class Traffic:
    """Requests sent all the time through a cluster IP and a node port, and what became of them."""

    box: Sandbox
    answers: dict[str, Counter[str]] = field(default_factory=lambda: {"pod": Counter(), "outside": Counter()})
    last: dict[str, float] = field(default_factory=dict)
    failures: list[Verdict] = field(default_factory=list)
    removed_at: float | None = None
    gone: bool = False

    def tick(self) -> None:
        """One batch of requests each way."""
        ways = {
            "pod": (self.box.pods[POD_CLIENT], Probe(WEB, WEB_PORT, source=POD_CLIENT)),
            "outside": (self.box.clients[OUTSIDE_CLIENT], Probe(NODE_IP, WEB_NODE_PORT, source=OUTSIDE_CLIENT)),
        }
        for way, (where, probe) in ways.items():
            begun = time.monotonic()
            for verdict in probe_many(where, [probe] * BATCH, timeout=PATIENT):
                if isinstance(verdict, Answered):
                    self.answers[way][verdict.name] += 1
                    self.last[verdict.name] = begun
                else:
                    self.failures.append(verdict)

    def total(self) -> int:
        """Requests sent so far."""
        return sum(counter.total() for counter in self.answers.values()) + len(self.failures)

    def late(self) -> float:
        """How long after the removal from the manifests the removed backend still got a new request, in seconds."""
        return 0.0 if self.removed_at is None else max(0.0, self.last.get(REMOVED, 0.0) - self.removed_at)

    def table(self, title: str) -> Table:
        """Answers for each backend, as they stand."""
        table = Table(title=title, title_justify="left", title_style="bold italic")
        for head, justify in (("backend", "left"), ("address", "left"), ("ClusterIP", "right"), ("NodePort", "right")):
            table.add_column(head, justify=justify)  # type: ignore[arg-type]
        table.add_column("share of all", no_wrap=True, min_width=20)
        whole = max(1, self.total())
        for name, address in WEB_BACKENDS.items():
            counts = [self.answers[way][name] for way in ("pod", "outside")]
            share = sum(counts) / whole
            bar = f"{'#' * round(share * 40):<15}{share:4.0%}"
            if name == REMOVED and self.removed_at is not None:
                bar = "server stopped" if self.gone else "out of the manifests"
                table.add_row(name, address, *map(str, counts), bar, style="dim")
            else:
                table.add_row(name, address, *map(str, counts), bar)
        table.add_section()
        failed = Text(f"{len(self.failures)} failed", style="bold red" if self.failures else "bold green")
        table.add_row("all", f"{self.total()} requests", *(str(c.total()) for c in self.answers.values()), failed)
        return table


def run_for(seconds: float, traffic: Traffic, show: Callable[[], None]) -> None:
    """Keep requests going for a while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        begun = time.monotonic()
        traffic.tick()
        show()
        time.sleep(max(0.0, TICK - (time.monotonic() - begun)))


@contextmanager
def display(console: Console, traffic: Traffic) -> Iterator[tuple[Callable[[], None], Callable[[str], None]]]:
    """Two ways to show the table: as it changes (on a terminal only), and at the end of a step (else)."""
    title = f"Service shop/web: ClusterIP {WEB}:{WEB_PORT}, NodePort {WEB_NODE_PORT}"
    if console.is_terminal:
        with Live(traffic.table(title), console=console, refresh_per_second=10) as live:
            yield (lambda: live.update(traffic.table(title))), live.console.print
            live.update(traffic.table(title), refresh=True)
    else:
        yield (lambda: None), lambda text: console.print(traffic.table(title), text, "", sep="\n")
        console.print(traffic.table(title))


def web_step(console: Console, box: Sandbox, manifests: Path) -> Traffic:
    """Requests through cluster IP and node port while a backend is taken away."""
    traffic = Traffic(box)
    address = WEB_BACKENDS[REMOVED]
    with display(console, traffic) as (show, step):
        run_for(STEADY, traffic, show)
        write_manifests(manifests, {name: where for name, where in WEB_BACKENDS.items() if name != REMOVED})
        traffic.removed_at = time.monotonic()
        step(f"[bold]{REMOVED} is taken out of web.yaml[/], requests go on")
        run_for(GRACE, traffic, show)
        box.servers.remove(box.pods[address], address, 8080)
        traffic.gone = True
        step(f"[bold]the server of {REMOVED} is stopped[/], requests go on")
        run_for(AFTER, traffic, show)
    return traffic


def affinity_step(console: Console, box: Sandbox) -> int:
    """Many clients, several requests each; returns how many clients did not keep to one backend."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    where = box.pods[CLIENTS[0]]
    for _ in range(REQUESTS_PER_CLIENT):
        verdicts = probe_many(where, [Probe(CART, CART_PORT, source=client) for client in CLIENTS], timeout=PATIENT)
        for client, verdict in zip(CLIENTS, verdicts, strict=True):
            seen[client][verdict.name if isinstance(verdict, Answered) else "failed"] += 1
    console.print(Text(f"Service shop/cart: ClusterIP {CART}:{CART_PORT}, session affinity ClientIP", style="bold italic"))
    table = Table()
    for head in ("backend", "address", "clients", "requests"):
        table.add_column(head, justify="right" if head in ("clients", "requests") else "left")
    kept = {client: next(iter(names)) for client, names in seen.items() if len(names) == 1 and "failed" not in names}
    for name, address in CART_BACKENDS.items():
        mine = [client for client, backend in kept.items() if backend == name]
        table.add_row(name, address, str(len(mine)), str(sum(seen[client][name] for client in mine)))
    console.print(table)
    style = "bold green" if len(kept) == len(CLIENTS) else "bold red"
    text = f"{len(kept)} of {len(CLIENTS)} clients were answered by one backend only, {REQUESTS_PER_CLIENT} times each"
    console.print(Text(text, style=style), "", sep="\n")
    return len(CLIENTS) - len(kept)


def rules_step(console: Console, box: Sandbox) -> None:
    """What the kernel has for Service shop/web."""
    words = [WEB, str(WEB_NODE_PORT), "shop/web", *(f"{address}:8080" for address in WEB_BACKENDS.values())]
    title, lines = excerpt(box.node, words)
    console.print(Text(title, style="bold italic"))
    for line in lines:
        console.print(
            Text("\n".join(textwrap.wrap(line, console.width - 1, subsequent_indent=" " * 8, break_on_hyphens=False)))
        )
    console.print()


def verdict(console: Console, traffic: Traffic, strayed: int, started: float) -> int:
    """The last lines, and the exit status."""
    late = traffic.late()
    lines = {
        f"{len(traffic.failures)} of {traffic.total()} requests failed": not traffic.failures,
        f"the last new request to {REMOVED} came {late * 1000:.0f} ms after it left the manifests": late < SETTLED,
        f"{len(CLIENTS) - strayed} of {len(CLIENTS)} clients of shop/cart kept to one backend": strayed == 0,
    }
    for line, good in lines.items():
        console.print(Text("ok    " if good else "WRONG ", style="bold green" if good else "bold red").append(line))
    for failure, count in Counter(map(str, traffic.failures)).most_common(5):
        console.print(f"      {count} x {failure}", style="red")
    console.print(f"All of it took {time.monotonic() - started:.1f} s; nothing is left on this machine.")
    return 0 if all(lines.values()) else 1


def demo(console: Console, command: Callable[[Path], Sequence[str]]) -> int:
    """The whole demonstration; returns the exit status."""
    started = time.monotonic()
    with Sandbox(node_addresses=[NODE_IP]) as box:
        build(box)
        console.print(
            f"A node ({NODE_IP}) with {len(box.pods.keys() - set(CLIENTS)) + 1} pods on its bridge, pods of another node,"
            f" and a client outside: {time.monotonic() - started:.2f} s"
        )
        manifests = box.directory / "manifests"
        manifests.mkdir()
        write_manifests(manifests, WEB_BACKENDS)
        arguments = list(command(manifests))
        console.print(Text(f"$ nodeproxy {' '.join(arguments[1:6])} …", style="bold"))
        agent = AgentProcess(box, arguments)
        agent.start()
        try:
            console.print(f"ready after {agent.wait_ready():.2f} s, both Services of {manifests} programmed\n")
            traffic = web_step(console, box, manifests)
            console.print()
            strayed = affinity_step(console, box)
            rules_step(console, box)
            if not agent.running():
                raise AgentError(f"the agent ended on the way\n{agent.log_tail()}")
        finally:
            agent.stop()
    return verdict(console, traffic, strayed, started)


def main() -> int:
    parser = argparse.ArgumentParser(prog="hack.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mode", default="iptables", choices=["iptables", "ipvs"])
    parser.add_argument("--iptables-variant", default=None, choices=["legacy", "nft"], help="default: as detected")
    options = parser.parse_args()
    flags = AgentFlags(hostname=NODE, mode=options.mode, cluster_cidr=POD_CIDR)
    console = Console(width=None if sys.stdout.isatty() else 110)
    try:
        return demo(console, lambda path: nodeproxy_command(flags, manifests=path, variant=options.iptables_variant))
    except AgentError as error:
        console.print(Text(f"nodeproxy did not start or did not stay up: {error}", style="red"))
    except (NamespaceError, PermissionError) as error:
        console.print(Text(f"no sandbox (network namespaces need root): {error}", style="red"))
    except KeyboardInterrupt:
        console.print("interrupted; everything is cleaned up")
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
