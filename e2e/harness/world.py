"""Owns what a test is given: the stage, objects that go with the test, and the few sentences that tests are made of."""

from __future__ import annotations

import functools
import ipaddress
import itertools
import os
import random
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

from e2e.harness import objects
from e2e.harness.api import Api
from e2e.harness.asking import BRIEF, PATIENT, name_of
from e2e.harness.flow import Kind, Lane, Requests
from e2e.harness.objects import OWNED, Object
from e2e.harness.places import Place
from e2e.harness.stage import ALL, Node, Stage
from e2e.harness.waiting import WITHIN, eventually
from nodeproxy.sandbox.client import Answered, Dropped, Rejected, Verdict

DROPPED: Final = frozenset({str(Dropped())})
REJECTED: Final = frozenset({str(Rejected())})
_WORKERS: Final = 16  # processes of pytest that may run at the same time
_START: Final = random.randrange(1000)


@dataclass(frozen=True)
class Service:
    """A Service as the API server made it."""

    name: str
    addresses: tuple[str, ...]
    node_ports: Mapping[str, int]
    health_check_node_port: int

    @property
    def address(self) -> str:
        """Its (first) cluster IP."""
        return self.addresses[0]

    @property
    def node_port(self) -> int:
        """The node port of its first port."""
        return next(iter(self.node_ports.values()))


class World:
    """One test's view of the cluster. What it makes is removed when it is closed."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.api: Api = stage.api
        self._undo = ExitStack()

    def close(self) -> None:
        """Remove what the test made."""
        self._undo.close()

    # objects

    def make(self, body: Object) -> Object:
        """Put an object into the cluster until the end of the test."""
        made = self.api.create(body)
        kind, name = body["kind"], body["metadata"]["name"]
        self._undo.callback(self.api.delete, kind, name, at_once=kind == "Pod")
        return made

    def unique(self, stem: str) -> str:
        """A name that no other test has."""
        return f"{stem}-{secrets.token_hex(3)}"

    def service(
        self,
        stem: str = "web",
        *,
        ports: Sequence[Object] | None = None,
        selector: Mapping[str, str] | None = ALL,
        labels: Mapping[str, str] | None = None,
        **spec: Any,
    ) -> Service:
        """A Service of all servers, or of those that `selector` chooses; port 80 by HTTP unless told otherwise."""
        name = self.unique(stem)
        body = objects.service(name, ports=ports or [objects.port()], selector=selector, labels=labels or {}, **spec)
        return as_service(self.make(body))

    def change(self, service: Service, **spec: Any) -> Service:
        """Change the spec of a Service."""
        return as_service(self.api.patch("Service", service.name, {"spec": spec}))

    def label(self, service: Service, labels: Mapping[str, str | None]) -> None:
        """Change labels of a Service; None removes one."""
        self.api.patch("Service", service.name, {"metadata": {"labels": dict(labels)}})

    def load_balancer(self, service: Service, *addresses: str, mode: str | None = None) -> None:
        """What a cloud's controller does: tell the addresses of the load balancer in the status."""
        ingress = [{"ip": address, **({"ipMode": mode} if mode else {})} for address in addresses]
        self.api.patch("Service", service.name, {"status": {"loadBalancer": {"ingress": ingress}}}, status=True)

    def slice(self, service: Service, endpoints: Sequence[Object], **more: Any) -> str:
        """Endpoints of a Service without a selector, made by hand. Returns the name of the slice."""
        name = self.unique(service.name)
        self.make(objects.endpoint_slice(name, service.name, endpoints, **more))
        return name

    def endpoint(self, pod: str, **more: Any) -> Object:
        """A server of the stage (or any pod that runs) as an endpoint; `more` as for `objects.endpoint`."""
        found = self.api.get("Pod", pod)
        return objects.endpoint(found["status"]["podIP"], found["spec"]["nodeName"], **more)

    def server(self, stem: str, node: Node, labels: Mapping[str, str], **more: Any) -> str:
        """A server of the test's own, ready; `more` as for `objects.server_pod`. Returns its name."""
        return self.servers([(stem, node)], labels, **more)[0]

    def servers(self, where: Iterable[tuple[str, Node]], labels: Mapping[str, str], **more: Any) -> list[str]:
        """Several of them, ready."""
        names = []
        for stem, node in where:
            name = self.unique(stem)
            self.make(objects.server_pod(name, node.name, {OWNED: "", **labels}, **more))
            names.append(name)
        self.stage.wait_ready(*names)
        return names

    def address_at(self, node: Node) -> str:
        """A fresh address for a load balancer, or an external IP, which the client outside sends to this node."""
        return str(next(_addresses(self.stage.outer_addresses[0 if node is self.stage.a else 1])))

    def dns(self) -> str:
        """The cluster IP of CoreDNS."""
        address: str = self.api.get("Service", "kube-dns", "kube-system")["spec"]["clusterIP"]
        return address

    # what is expected

    def answers(
        self,
        place: Place,
        address: str,
        port: int,
        wanted: Iterable[str],
        *,
        count: int | None = None,
        within: float = WITHIN,
        **options: Any,
    ) -> list[Answered]:
        """Requests from a place come to be answered by all of these servers and by no other. Returns the answers.

        `count`: how many requests have to be; enough by default that chance passes over no server.
        """
        names = frozenset(wanted)
        number = count or max(16, 14 * len(names))

        def all_of_them() -> list[Answered]:
            found: list[Answered] = []
            for _ in range(number):  # one by one: a wrong answer now is no reason to send all
                (verdict,) = place.ask(address, port, **options)
                assert name_of(verdict) in names, f"answered by {name_of(verdict)}"
                assert isinstance(verdict, Answered)
                found.append(verdict)
            assert verdicts(found) == names, f"answered by {sorted(verdicts(found))}"
            return found

        return eventually(
            all_of_them, f"{place} -> {address}:{port} {options or ''} answered by {sorted(names)}", within=within
        )

    def never(
        self, place: Place, address: str, port: int, verdict: Iterable[str], *, count: int = 2, **options: Any
    ) -> None:
        """Requests come to end in this verdict, and go on to: `DROPPED` or `REJECTED`.

        The kernel sends one source only so many ICMP errors in a second, so a REJECT may need a second packet.
        """
        wanted = frozenset(verdict)
        options = {"timeout": BRIEF if wanted == DROPPED else PATIENT, **options}

        def ended() -> bool:
            seen = {name_of(one) for one in place.ask(address, port, **options)}
            assert seen == wanted, f"seen {sorted(seen)}"
            return True

        target = f"{place} -> {address}:{port} {options}"
        eventually(ended, f"{target} ends in {sorted(wanted)}")
        seen = {name_of(one) for one in place.ask(address, port, count, **options)}
        assert seen == wanted, f"{target}: wanted {sorted(wanted)}, seen {sorted(seen)}"

    def gone(self, place: Place, address: str, port: int, **options: Any) -> None:
        """Requests come to end in anything but an answer: nobody is there any more."""

        def silent() -> bool:
            (verdict,) = place.ask(address, port, **{"timeout": BRIEF, **options})
            assert not isinstance(verdict, Answered), f"still answered by {verdict.name}"
            return True

        eventually(silent, f"{place} -> {address}:{port} is answered no more")

    def requests(self, *lanes: Lane) -> Requests:
        """Requests without end."""
        return Requests(lanes)

    def lanes(self, places: Iterable[Place], address: str, port: int, *kinds: Kind, pause: float = 0.02) -> list[Lane]:
        """Lanes from each of several places, of each kind."""
        return [Lane(place, address, port, kind, pause) for place in places for kind in kinds]


def as_service(made: Object) -> Service:
    """From the object."""
    spec = made["spec"]
    return Service(
        made["metadata"]["name"],
        tuple(address for address in spec.get("clusterIPs") or [] if address != "None"),
        {port["name"]: port["nodePort"] for port in spec["ports"] if port.get("nodePort")},
        spec.get("healthCheckNodePort", 0),
    )


def verdicts(found: Iterable[Verdict]) -> set[str]:
    """As a set of names."""
    return {name_of(one) for one in found}


@functools.cache
def _addresses(network: ipaddress.IPv4Network) -> Iterator[ipaddress.IPv4Address]:
    """Those of this process of pytest, again and again: no two tests that run at the same time have the same."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    hosts = list(network.hosts())
    each = len(hosts) // _WORKERS
    mine = hosts[worker % _WORKERS * each :][:each]
    return itertools.cycle(mine[_START % each :] + mine[: _START % each])
