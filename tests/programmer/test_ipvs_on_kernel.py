"""The IPVS programmer on a real kernel: what a change costs does not depend on how many Services there are."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress

import pytest

from nodeproxy.forwarding.table import (
    Action,
    Backend,
    BackendSet,
    Delta,
    Family,
    ForwardingTable,
    Frontend,
    FrontendKind,
    IPProtocol,
    Masquerade,
    RowChange,
    ServicePort,
    ServicePortKey,
    ServicePortName,
)
from nodeproxy.kernel.ipvs import IPVS, VirtualServer
from nodeproxy.kernel.netlink import Message, NetlinkSocket
from nodeproxy.kernel.xtables_tools import Variant
from nodeproxy.programmer.base import LocalDetector, NodePortAddresses, ProgrammerConfig
from nodeproxy.programmer.ipvs.programmer import IpvsProgrammer
from nodeproxy.programmer.ipvs.settings import SCHEDULERS, IpvsSettings
from nodeproxy.sandbox.namespace import Namespace, unique_stem
from nodeproxy.sandbox.pace import scaled
from tests.ways import needs_ipvs

pytestmark = pytest.mark.kernel

CONFIG = ProgrammerConfig((Family.IPV4,), LocalDetector(), {Family.IPV4: NodePortAddresses()})
NOTHING = Delta(rows={}, health_checks={})


def row(number: int, *backends: str) -> ServicePort:
    """A Service with a cluster IP and a node port."""
    key = ServicePortKey(Family.IPV4, ServicePortName("ns", f"svc{number}", ""), IPProtocol.TCP)
    action = Action.FORWARD if backends else Action.REJECT
    frontends = (
        Frontend(
            FrontendKind.CLUSTER_IP,
            f"10.96.{number // 250}.{number % 250 + 1}",
            80,
            action,
            BackendSet.CLUSTER,
            Masquerade.NOT_LOCAL_PODS,
        ),
        Frontend(FrontendKind.NODE_PORT, None, 20000 + number, action, BackendSet.CLUSTER, Masquerade.ALWAYS),
    )
    return ServicePort(key, frontends, tuple(sorted(Backend(one, 8080, False) for one in backends)), ())


class Recorder:
    """Counts what is sent to the kernel: messages of batches by their type and command, and listings."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: Counter[str] = Counter()
        batch, dump = NetlinkSocket.batch, NetlinkSocket.dump_in_place

        def counted_batch(
            socket: NetlinkSocket, messages: Sequence[Message], request: str = ""
        ) -> dict[int, tuple[int, str]]:
            self.sent.update(f"{kind}.{body[0]}" for kind, _, body in messages)
            return batch(socket, messages, request)

        def counted_dump(
            socket: NetlinkSocket, kind: int, body: bytes, flags: int = 0x300, request: str = ""
        ) -> Iterator[tuple[bytes, int, int]]:
            self.sent[f"listing: {request}"] += 1
            return dump(socket, kind, body, flags, request)

        monkeypatch.setattr(NetlinkSocket, "batch", counted_batch)
        monkeypatch.setattr(NetlinkSocket, "dump_in_place", counted_dump)


def cost_of_a_change(namespace: Namespace, services: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What is sent when one endpoint of one of so many Services is exchanged."""

    async def run() -> Counter[str]:
        programmer = IpvsProgrammer(CONFIG, IpvsSettings(), Variant.NFT)
        await programmer.prepare()
        rows = [row(number, "10.1.0.1", "10.1.0.2") for number in range(services)]
        table = ForwardingTable({one.key: one for one in rows}, {})
        assert (await programmer.apply(table, NOTHING)).refused == {}
        after = row(7, "10.1.0.1", "10.1.0.3")
        table.rows[after.key] = after
        recorder = Recorder(monkeypatch)
        result = await programmer.apply(table, Delta({after.key: RowChange(rows[7], after)}, {}))
        assert (result.refused, result.full) == ({}, False)
        sent = recorder.sent.copy()
        monkeypatch.undo()
        assert not await programmer.audit()
        await programmer.cleanup()
        return sent

    found = namespace.run(lambda: asyncio.run(run()))
    assert namespace.run(lambda: IPVS().virtual_servers()) == {}
    return found


@needs_ipvs
def test_a_change_lists_nothing_and_sends_the_same_among_few_and_many(monkeypatch: pytest.MonkeyPatch) -> None:
    with Namespace(f"{unique_stem()}-ipvs") as namespace:
        namespace.ip(["link set lo up", "addr add 192.0.2.1/24 dev lo"])
        few = cost_of_a_change(namespace, 10, monkeypatch)
        many = cost_of_a_change(namespace, 500, monkeypatch)
    assert few == many
    assert not [what for what in few if what.startswith("listing")], few
    assert few.total() == 4, few  # one real server added and one drained, in two virtual servers


@needs_ipvs
def test_more_addresses_than_fit_one_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart among many Services finds everything in its place and changes nothing."""

    async def run() -> Counter[str]:
        rows = [row(number, "10.1.0.1", "10.1.0.2") for number in range(300)]
        table = ForwardingTable({one.key: one for one in rows}, {})
        first = IpvsProgrammer(CONFIG, IpvsSettings(), Variant.NFT)
        await first.prepare()
        await first.apply(table, NOTHING)
        second = IpvsProgrammer(CONFIG, IpvsSettings(), Variant.NFT)
        await second.prepare()
        recorder = Recorder(monkeypatch)
        await second.apply(table, NOTHING)
        return recorder.sent

    with Namespace(f"{unique_stem()}-ipvs") as namespace:
        namespace.ip(["link set lo up", "addr add 192.0.2.1/24 dev lo"])
        sent = namespace.run(lambda: asyncio.run(run()))
        servers = namespace.run(lambda: IPVS().virtual_servers())
    assert VirtualServer(4, "tcp", "192.0.2.1", 20299) in servers
    changes = Counter({what: count for what, count in sent.items() if not what.startswith("listing")})
    assert changes.total() <= 24, changes  # sets and the interface are asked for by making them


@needs_ipvs
def test_every_scheduler_forwards() -> None:
    """Each on its own, with connections to a service on the node itself."""

    def connect() -> bytes:
        with socket.create_connection(("10.96.0.1", 80), timeout=scaled(2)) as connection:
            return connection.recv(10)

    async def run(scheduler: str) -> str:
        programmer = IpvsProgrammer(CONFIG, IpvsSettings(scheduler=scheduler), Variant.NFT)
        await programmer.prepare()
        one = row(0, "192.0.2.1")
        assert (await programmer.apply(ForwardingTable({one.key: one}, {}), NOTHING)).refused == {}
        with IPVS() as ipvs:
            found = ipvs.virtual_servers()[VirtualServer(4, "tcp", "10.96.0.1", 80)].scheduler
        assert await asyncio.to_thread(connect) == b"here"
        assert not await programmer.audit()
        return found

    with Namespace(f"{unique_stem()}-ipvs") as namespace:
        namespace.ip(["link set lo up", "addr add 192.0.2.1/24 dev lo"])
        with namespace.run(socket.create_server, ("192.0.2.1", 8080)) as listener:
            threading.Thread(target=answer_all, args=(listener,), daemon=True).start()
            for scheduler in SCHEDULERS:
                assert namespace.run(lambda: asyncio.run(run(scheduler))) == scheduler  # noqa: B023 - run at once


def answer_all(listener: socket.socket) -> None:
    """Say "here" to everybody, until the listener is closed."""
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            connection.sendall(b"here")
            connection.close()
