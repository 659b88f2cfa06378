"""The API server source against a real API server: after whatever happens, what was delivered adds up to what is there."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import aiohttp
import pytest
import structlog

from hack.controlplane import Cluster, ControlPlane
from hack.controlplane.load import Load, Shape, node
from nodeproxy.api.objects import TYPE_OF_KIND, ApiObject, Kind, ObjectKey
from nodeproxy.sandbox.namespace import Namespace, unique_stem
from nodeproxy.source.apiserver import ApiServerSource, Credentials
from nodeproxy.source.apiserver.connection import Cancel, Connection
from nodeproxy.source.apiserver.wire import Present, Resource, list_all
from nodeproxy.source.decoding import Selection, read_builtins
from tests.source.agent_probe import digest
from tests.source.fake_apiserver import FakeApiServer
from tests.source.manifest_objects import endpoint_slice
from tests.source.replay import Replay
from tests.source.test_apiserver import Counts

pytestmark = pytest.mark.controlplane

SELECTION = Selection("node-1")
SERVICES = "/api/v1/namespaces/load/services"
SLICES = "/apis/discovery.k8s.io/v1/namespaces/load/endpointslices"


@pytest.fixture(scope="module")
def big() -> Iterator[ControlPlane]:
    """2,000 Services with a slice each, and two nodes."""
    with ControlPlane() as cluster:
        cluster.seed(Shape(services=2000, endpoints=3))
        for name in ("node-1", "node-2"):
            cluster.request("POST", "/api/v1/nodes", node(name, ["192.168.0.1"], ["10.244.0.0/24"]))
        yield cluster


@pytest.fixture(scope="module")
def uncached() -> Iterator[ControlPlane]:
    """An API server without watch cache: versions stay good over its restarts, until they are compacted."""
    with ControlPlane(watch_cache=False) as cluster:
        cluster.seed(Shape(services=50, endpoints=3))
        yield cluster


class Run:
    """A source that is running, on its way perhaps through a proxy."""

    def __init__(self, cluster: Cluster, credentials: Credentials, streamed: bool) -> None:
        self.cluster = cluster
        self.replay = Replay()
        self.counts = Counts()
        source = ApiServerSource(credentials, SELECTION.node_name, observer=self.counts, streamed_list=streamed)
        self.task = asyncio.create_task(source.run(self.replay))

    async def in_step(self, seconds: float = 20) -> None:
        """Wait until what was delivered equals a fresh list, and nothing was delivered twice."""
        deadline = time.monotonic() + seconds
        while self.replay.objects != (fresh := await asyncio.to_thread(fresh_list, self.cluster)):
            assert time.monotonic() < deadline, differences(self.replay.objects, fresh)
            await asyncio.sleep(0.1)
        assert not self.replay.redundant
        assert not self.replay.refused


@asynccontextmanager
async def running(
    cluster: Cluster, directory: Path, *, master: str | None = None, streamed: bool = True
) -> AsyncIterator[Run]:
    path = directory / "kubeconfig"
    cluster.write_kubeconfig(path)
    run = Run(cluster, Credentials(path, master), streamed)
    try:
        await run.replay.synced(30)
        yield run
        assert not run.task.done(), run.task
        assert run.replay.complete == dict.fromkeys(Kind, 1)
    finally:
        run.task.cancel()
        with suppress(asyncio.CancelledError):
            await run.task


def fresh_list(cluster: Cluster) -> dict[ObjectKey, ApiObject]:
    """What the API server has now, by plain requests."""
    found: dict[ObjectKey, ApiObject] = {}
    for kind in Kind:
        resource = Resource(kind, SELECTION)
        answer = cluster.request("GET", f"{resource.path}?{urlencode(resource.query())}")
        for item in answer["items"]:
            obj = read_builtins(item, TYPE_OF_KIND[kind])
            found[obj.key] = obj
    return found


def differences(found: dict[ObjectKey, ApiObject], expected: dict[ObjectKey, ApiObject]) -> str:
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    changed = [key for key in expected.keys() & found.keys() if found[key] != expected[key]]
    return f"missing {sorted(missing)[:5]}, extra {sorted(extra)[:5]}, different {sorted(changed)[:5]}"


async def request(cluster: Cluster, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    content_type = "application/merge-patch+json" if method == "PATCH" else "application/json"
    return await asyncio.to_thread(cluster.request, method, path, body, content_type=content_type)


async def eventually(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until the condition holds. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while True:
            if condition():
                return
            await asyncio.sleep(0.05)


class TcpProxy:
    """Stands between the source and the API server; can break all connections and take no more."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname or "", parts.port or 443)
        self._open = True
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> TcpProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"https://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
        self._server.close()

    def close(self) -> None:
        """Break connections, refuse new ones."""
        self._open = False
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def open(self) -> None:
        """Take connections again."""
        self._open = True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._open:
            writer.transport.abort()
            return
        other_reader, other_writer = await asyncio.open_connection(*self._target)
        self._writers |= {writer, other_writer}
        async with asyncio.TaskGroup() as group:
            group.create_task(self._copy(reader, other_writer))
            group.create_task(self._copy(other_reader, writer))

    @staticmethod
    async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "paged"])
async def test_two_thousand_services(big: ControlPlane, tmp_path: Path, streamed: bool) -> None:
    async with running(big, tmp_path, streamed=streamed) as run:
        await run.in_step()
        assert sum(key.kind is Kind.SERVICE for key in run.replay.objects) >= 2000
        assert sum(key.kind is Kind.ENDPOINT_SLICE for key in run.replay.objects) >= 2000
        assert run.replay.names(Kind.NODE) == {"node-1"}
        assert set(run.replay.upserts.values()) == {1}
        async with Load(big.access, Shape(services=2000, endpoints=3)) as load:
            await asyncio.gather(*(load.update_slice(service) for service in range(50)))
        await request(big, "DELETE", f"{SERVICES}/service-{1990 + streamed}")
        await run.in_step()
        assert run.replay.deletes.total() == 1


async def test_server_without_streamed_lists(tmp_path: Path) -> None:
    with ControlPlane(apiserver_flags=["--feature-gates=WatchList=false"]) as cluster:
        cluster.seed(Shape(services=20, endpoints=2))
        with structlog.testing.capture_logs() as logs:
            async with running(cluster, tmp_path) as run:
                await run.in_step()
                await request(cluster, "DELETE", f"{SERVICES}/service-7")
                await run.in_step()
                assert run.counts.lists == dict.fromkeys(Kind, 1)
        said = [entry for entry in logs if entry["event"] == "server does not stream lists: listing in pages"]
        assert sorted(entry["kind"] for entry in said) == sorted(Kind)
        assert not [entry for entry in logs if entry["log_level"] == "warning"]


async def test_selectors_are_applied_by_the_server(big: ControlPlane, tmp_path: Path) -> None:
    headless = {"service.kubernetes.io/headless": ""}
    other = {"service.kubernetes.io/service-proxy-name": "other"}
    shape = Shape(services=4, endpoints=1, prefix="selected", first=5000)
    for number, labels in zip(shape.numbers, ({}, headless, other, {**headless, **other}), strict=True):
        service, (endpoints,) = shape.service(number), shape.slices(number)
        service["metadata"]["labels"] = labels
        endpoints["metadata"]["labels"] |= labels
        await request(big, "POST", SERVICES, service)
        await request(big, "POST", SLICES, endpoints)
    assert await selected(big, tmp_path, None) == {"selected-5000", "selected-5000-ipv4-0"}
    assert await selected(big, tmp_path, "other") == {"selected-5002", "selected-5002-ipv4-0"}
    async with running(big, tmp_path) as run:
        await run.in_step()
        path = f"{SERVICES}/selected-5000"
        await request(big, "PATCH", path, {"metadata": {"labels": headless}})
        await run.replay.until(lambda: run.replay.deletes.total() == 1)
        await run.in_step()
        await request(big, "PATCH", path, {"metadata": {"labels": {"service.kubernetes.io/headless": None}}})
        await run.replay.until(lambda: "selected-5000" in run.replay.names())
        await request(big, "DELETE", "/api/v1/nodes/node-2")
        await request(big, "PATCH", "/api/v1/nodes/node-1", {"metadata": {"labels": {"topology.kubernetes.io/zone": "a"}}})
        await run.in_step()
        assert run.replay.upserts[ObjectKey(Kind.NODE, "", "node-1")] == 2
        assert run.replay.deletes.total() == 1


async def selected(cluster: ControlPlane, directory: Path, proxy_name: str | None) -> set[str]:
    """Names that come over the wire, before anything on our side could leave some out."""
    cluster.write_kubeconfig(directory / "kubeconfig")

    def names() -> set[str]:
        connection = Connection(Credentials(directory / "kubeconfig"))
        connection.connect()
        found: set[str] = set()
        for kind in (Kind.SERVICE, Kind.ENDPOINT_SLICE):
            for item in list_all(connection, Resource(kind, Selection("node-1", proxy_name)), Cancel()):
                if isinstance(item, Present) and item.key.name.startswith("selected-"):
                    found.add(item.key.name)
        return found

    return await asyncio.to_thread(names)


async def test_api_server_killed_and_restarted_under_the_watch(big: ControlPlane, tmp_path: Path) -> None:
    async with running(big, tmp_path) as run:
        await run.in_step()
        async with Load(big.access, Shape(services=2000, endpoints=3)) as load:
            await load.update_slice(100)
            await asyncio.to_thread(big.kill_apiserver)
            await asyncio.to_thread(big.start_apiserver)
            await load.update_slice(101)
        await request(big, "DELETE", f"{SERVICES}/service-1980")
        await run.in_step(60)
        assert all(run.counts.ended[kind] for kind in Kind)
        unchanged = [key for key, count in run.replay.upserts.items() if count == 1]
        assert len(unchanged) >= 3990, "a relist delivers only what differs"


async def test_no_relist_while_the_version_is_good(uncached: ControlPlane, tmp_path: Path) -> None:
    async with running(uncached, tmp_path) as run:
        await run.in_step()
        for number in range(2):
            await asyncio.sleep(1.0)
            await asyncio.to_thread(uncached.kill_apiserver)
            await asyncio.to_thread(uncached.start_apiserver)
            async with Load(uncached.access, Shape(services=50, endpoints=3)) as load:
                await load.update_slice(number)
            await run.in_step(60)
        assert run.counts.lists == dict.fromkeys(Kind, 1)
        assert run.counts.watches[Kind.ENDPOINT_SLICE] >= 3
        assert sorted(run.replay.upserts.values())[-3:] == [1, 2, 2]
        assert not run.replay.deletes


async def test_compaction_leads_to_a_relist_of_what_differs(uncached: ControlPlane, tmp_path: Path) -> None:
    async with TcpProxy(uncached.url) as proxy, running(uncached, tmp_path, master=proxy.url) as run:
        await run.in_step()
        events = run.replay.events
        proxy.close()
        async with Load(uncached.access, Shape(services=50, endpoints=3)) as load:
            await load.update_slice(20)
            await load.delete_one(21)
            await load.create_one(21)
            await load.delete_one(22)
        await asyncio.to_thread(uncached.compact)
        proxy.open()
        await run.replay.until(lambda: ObjectKey(Kind.SERVICE, "load", "service-22") not in run.replay.objects, 60)
        await run.in_step(60)
        assert run.counts.lists[Kind.SERVICE] == run.counts.lists[Kind.ENDPOINT_SLICE] == 2
        # One slice changed; a Service and a slice were made anew, a Service and a slice are gone.
        assert run.replay.events - events == 5


async def test_connection_cut_silently(tmp_path: Path) -> None:
    stem = unique_stem()
    with Namespace(f"{stem}-api") as api, Namespace(f"{stem}-agent") as agent:
        api.ip(
            [
                "link set lo up",
                f"link add to-agent type veth peer name to-api netns {agent.name}",
                "addr add 10.99.0.1/24 dev to-agent",
                "link set to-agent up",
            ]
        )
        agent.ip(["link set lo up", "addr add 10.99.0.2/24 dev to-api", "link set to-api up"])
        with ControlPlane(netns=api.name, bind_address="10.99.0.1") as cluster:
            cluster.seed(Shape(services=20, endpoints=2))
            cluster.write_kubeconfig(tmp_path / "kubeconfig")
            # The thread of the namespace, and all threads that come from it, are inside.
            outcome = agent.submit(asyncio.run, cut_silently(cluster, api, tmp_path))
            noticed, caught_up = await asyncio.wrap_future(outcome)
            print(f"noticed after {noticed:.1f} s, caught up {caught_up:.1f} s after the link was back")


async def cut_silently(cluster: ControlPlane, api: Namespace, directory: Path) -> tuple[float, float]:
    async with running(cluster, directory) as run:
        await run.in_step()
        await asyncio.to_thread(api.ip, ["link set to-agent down"])
        cut = time.monotonic()
        # The address went with the link as far as the server's kernel is concerned; changes go over loopback.
        async with Load(cluster.access, Shape(services=20, endpoints=2)) as load:
            await load.update_slice(3)
            await load.delete_one(4)
        await eventually(lambda: len(run.counts.ended) == len(Kind), 40)
        noticed = time.monotonic() - cut
        assert 5 < noticed < 32, "noticed by keep-alive, not by an error of the link itself"
        await asyncio.to_thread(api.ip, ["link set to-agent up"])
        back = time.monotonic()
        async with Load(cluster.access, Shape(services=20, endpoints=2)) as load:
            await load.update_slice(5)
        await run.in_step(60)
        return noticed, time.monotonic() - back


class Probe:
    """A source in its own process."""

    def __init__(self, target: str) -> None:
        command = [sys.executable, "-m", "tests.source.agent_probe", target, SELECTION.node_name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    async def stats(self) -> dict[str, Any]:
        """What was delivered so far, and the memory now."""
        return await asyncio.to_thread(self._ask)

    def _ask(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        while not (line := self._process.stdout.readline()).startswith("{"):
            assert line, "the probe ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def until(self, upserts: int, seconds: float = 30) -> dict[str, Any]:
        """The stats once so many upserts were delivered."""
        return await self.that(lambda stats: stats["upserts"] >= upserts and stats["complete"] == len(Kind), seconds)

    async def that(self, condition: Callable[[dict[str, Any]], bool], seconds: float = 30) -> dict[str, Any]:
        """The stats once the condition holds for them."""
        async with asyncio.timeout(seconds):
            while True:
                stats = await self.stats()
                if condition(stats):
                    return stats
                await asyncio.sleep(0.2)


UPDATES = 50_000
REAL_SECONDS = 45.0
WARM_UP = 2_000
MAX_GROWTH = 8 * 1024 * 1024


async def test_memory_is_flat_over_fifty_thousand_updates(big: ControlPlane, tmp_path: Path) -> None:
    """As many as fit in 45 s through the real API server, the others from the fake one, each to a source of its own."""
    big.write_kubeconfig(tmp_path / "kubeconfig")
    with Probe(str(tmp_path / "kubeconfig")) as probe:
        await probe.until(1)
        warm_up = await patch_slices(big, WARM_UP, 60)
        before = await probe.until(warm_up)
        real = await patch_slices(big, UPDATES, REAL_SECONDS)
        expected = digest((await asyncio.to_thread(fresh_list, big)).values())
        after = await probe.that(lambda stats: stats["digest"] == expected)
        growth = after["rss"] - before["rss"]
        print(f"real: {real} updates, memory {after['rss'] >> 20} MiB, grew by {growth >> 10} KiB")
        # A watch may leave out no version: each one that was written is delivered.
        assert after["upserts"] - before["upserts"] == real
        assert after["redundant"] == 0
        assert growth < MAX_GROWTH
    async with FakeApiServer().serving() as server:
        with Probe(server.url) as probe:
            await update_fake(server, WARM_UP)
            before = await probe.until(100)
            remaining = max(UPDATES - real, 10_000)
            await update_fake(server, remaining)
            after = await probe.until(before["upserts"] + remaining - WARM_UP, 60)
            growth = after["rss"] - before["rss"]
            print(f"fake: {remaining} updates, memory {after['rss'] >> 20} MiB, grew by {growth >> 10} KiB")
            assert growth < MAX_GROWTH


async def patch_slices(cluster: Cluster, count: int, seconds: float) -> int:
    """Patch slices from 16 sides at once; ends after so many or so long and returns how many it were."""
    numbers = itertools.count()
    deadline = time.monotonic() + seconds
    done = 0

    async def work(session: aiohttp.ClientSession) -> None:
        nonlocal done
        while time.monotonic() < deadline and (number := next(numbers)) < count:
            path = f"{cluster.url}{SLICES}/service-{number % 1900}-ipv4-0"
            stamp = f"{time.time_ns()}-{number}"
            body = {"metadata": {"annotations": {"endpoints.kubernetes.io/last-change-trigger-time": stamp}}}
            async with session.patch(path, data=json.dumps(body)) as response:
                assert response.status == 200, await response.text()
                await response.read()
            done += 1

    headers = {**cluster.access.headers, "Content-Type": "application/merge-patch+json"}
    connector = aiohttp.TCPConnector(ssl=cluster.access.ssl_context())
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session, asyncio.TaskGroup() as group:
        for _ in range(16):
            group.create_task(work(session))
    return done


async def update_fake(server: FakeApiServer, count: int) -> None:
    for number in range(count):
        server.put(endpoint_slice(f"slice-{number % 500}", [f"10.0.{number >> 8 & 255}.{number & 255}"] * 3))
        if number % 50 == 0:
            await asyncio.sleep(0)
