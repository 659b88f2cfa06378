"""What an agent answers to its ProxyNode, when, and how often: against an object in memory, with a real sync loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from nodeproxy.agent import proxy_node
from nodeproxy.agent.events import NoEvents
from nodeproxy.agent.health import Health
from nodeproxy.agent.metrics import Metrics
from nodeproxy.agent.proxy_node import ProxyNodeFollower
from nodeproxy.agent.sync import SyncLoop
from nodeproxy.api.proxy_node import ObjectMeta, ProxyNode, ProxyNodeSpec, ProxyNodeStatus
from nodeproxy.cluster.state import ClusterState
from nodeproxy.forwarding.node import NodeFacts
from nodeproxy.forwarding.table import Family
from nodeproxy.forwarding.tracker import ForwardingTracker
from nodeproxy.programmer.base import ProgrammingError
from nodeproxy.source.apiserver.connection import RequestError, StatusError

from .test_sync import COMPLETE, Recorder, service, until


class Audited(Recorder):
    """A programmer whose audit finds what it is told to find."""

    def __init__(self) -> None:
        super().__init__()
        self.finds: Sequence[str] = ()
        self.whole = 0

    async def audit(self, *, whole: bool = False) -> Sequence[str]:
        if not whole:
            return ()
        self.whole += 1
        found, self.finds = self.finds, ()
        if found == ("error",):
            raise ProgrammingError("cannot be read")
        return found


class Object:
    """The API server's side of one ProxyNode."""

    def __init__(self) -> None:
        self.node: ProxyNode | None = None
        self.errors: list[Exception] = []
        self.writes: list[dict[str, Any]] = []
        self._changed = asyncio.Event()

    def tell(self, **spec: Any) -> None:
        """The operator writes a spec."""
        before = self.node or ProxyNode(metadata=ObjectMeta(name="n", uid="1"))
        metadata = replace(before.metadata, generation=before.metadata.generation + 1)
        self.node = replace(before, metadata=metadata, spec=ProxyNodeSpec(**spec))
        self._changed.set()

    def remove(self) -> None:
        self.node = None
        self._changed.set()

    @property
    def status(self) -> ProxyNodeStatus:
        return self.node.status if self.node is not None else ProxyNodeStatus()

    async def follow(self, deliver: Callable[[ProxyNode | None], None]) -> None:
        while True:
            self._changed.clear()
            deliver(self.node)
            await self._changed.wait()

    async def write_status(self, status: dict[str, Any]) -> ProxyNode:
        if self.errors:
            raise self.errors.pop()
        if self.node is None:
            raise StatusError(404, "not found")
        self.writes.append(status)
        present = {name: value for name, value in status.items() if value is not None}
        self.node = replace(self.node, status=msgspec.convert(present, ProxyNodeStatus))
        self._changed.set()
        return self.node


class Agent:
    """A sync loop, a follower, and what they are told."""

    def __init__(self) -> None:
        self.object = Object()
        self.programmer = Audited()
        self.mode = "iptables"
        self.why_not = ""
        self.specs: list[ProxyNodeSpec] = []
        metrics = Metrics()
        self.loop = SyncLoop(
            state=ClusterState("n"),
            tracker=ForwardingTracker(NodeFacts(name="n", families=(Family.IPV4,))),
            programmer=self.programmer,
            health=Health(sync_period=30),
            metrics=metrics,
            min_sync_period=0.0,
            on_node_change=lambda: None,
            events=NoEvents(),
        )
        self.follower = ProxyNodeFollower(self.object, self.loop, metrics, obey=self.obey, mode=lambda: self.mode)

    async def obey(self, spec: ProxyNodeSpec) -> str:
        self.specs.append(spec)
        return self.why_not

    async def answered(self, verification: str) -> ProxyNodeStatus:
        def done() -> bool:
            answer = self.object.status.verification
            return answer is not None and answer.id == verification

        await until(done)
        return self.object.status


@pytest.fixture
async def agent(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Agent]:
    monkeypatch.setattr(proxy_node, "_LOOK_SECONDS", 0.2)
    for name in ("_AGAIN_SECONDS", "_WRITE_AGAIN_SECONDS"):
        monkeypatch.setattr(proxy_node, name, (0.1, 0.2))
    made = Agent()
    tasks = [asyncio.create_task(made.loop.run()), asyncio.create_task(made.follower.run())]
    yield made
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_a_verification_waits_for_the_first_sync_and_for_what_is_wanted(agent: Agent) -> None:
    agent.object.tell(mode="iptables", verification="one")
    await until(lambda: bool(agent.specs))
    await asyncio.sleep(0.1)
    assert agent.programmer.whole == 0
    agent.loop.deliver([service(1), *COMPLETE])
    status = await agent.answered("one")
    assert (status.observed_generation, status.in_sync, status.mode, status.message) == (1, True, "iptables", None)
    assert status.audit is not None
    assert (status.audit.clean, status.audit.differs) == (True, None)
    agent.loop.deliver([service(2)])
    agent.object.tell(mode="iptables", verification="two")
    await agent.answered("two")
    assert len(agent.programmer.programmed) == 2
    assert [spec.mode for spec in agent.specs if spec.mode] == ["iptables"]  # nothing else was wanted


async def test_what_differs_is_told_and_put_right(agent: Agent) -> None:
    agent.loop.deliver([service(1), *COMPLETE])
    await until(lambda: agent.loop.in_sync)
    calls = len(agent.programmer.calls)
    agent.programmer.finds = ["rules of IPv4"]
    agent.object.tell(verification="one")
    status = await agent.answered("one")
    assert status.audit is not None
    assert (status.audit.clean, status.audit.differs) == (False, ["rules of IPv4"])
    assert status.verification is not None
    assert status.verification.drift_repairs == 1
    assert len(agent.programmer.calls) == calls + 1
    agent.programmer.finds = ("error",)
    agent.object.tell(verification="two")
    status = await agent.answered("two")
    assert status.audit is not None
    assert (status.audit.clean, status.audit.differs) == (False, ["cannot be read"])


async def test_sync_errors_are_told(agent: Agent) -> None:
    agent.loop.deliver([service(1), *COMPLETE])
    await until(lambda: agent.loop.in_sync)
    agent.programmer.failures = 1
    agent.loop.deliver([service(2)])
    await until(lambda: not agent.programmer.failures)
    agent.object.tell(verification="one")
    status = await agent.answered("one")
    assert status.verification is not None
    assert status.verification.sync_errors == 1
    assert status.verification.sync_p50_seconds is not None


async def test_an_agent_that_nothing_happens_to_writes_nothing(agent: Agent) -> None:
    agent.loop.deliver([service(1), *COMPLETE])
    agent.object.tell(verification="one")
    await agent.answered("one")
    await asyncio.sleep(0.7)
    writes = len(agent.object.writes)
    agent.loop.deliver([service(2)])
    await asyncio.sleep(0.7)
    assert len(agent.object.writes) == writes
    agent.mode = "ipvs"  # its own configuration may do that
    await until(lambda: agent.object.status.mode == "ipvs")
    assert len(agent.object.writes) == writes + 1


async def test_what_cannot_be_is_told_and_tried_again(agent: Agent) -> None:
    agent.loop.deliver([service(1), *COMPLETE])
    agent.why_not = "the kernel has no IPVS"
    agent.object.tell(mode="ipvs", verification="one")
    status = await agent.answered("one")
    assert (status.message, status.observed_generation) == ("the kernel has no IPVS", 1)
    await until(lambda: len(agent.specs) >= 2)
    agent.why_not = ""
    await until(lambda: agent.object.status.message is None)


async def test_a_write_that_fails_is_tried_again(agent: Agent) -> None:
    agent.object.errors = [RequestError("away"), StatusError(409, "conflict"), StatusError(403, "forbidden")]
    agent.loop.deliver([service(1), *COMPLETE])
    agent.object.tell(verification="one")
    await agent.answered("one")
    assert agent.object.errors == []


async def test_an_object_that_goes_leaves_the_own_configuration(agent: Agent) -> None:
    agent.loop.deliver([service(1), *COMPLETE])
    agent.object.tell(mode="ipvs")
    await until(lambda: bool(agent.object.writes))
    agent.object.remove()
    await until(lambda: agent.specs[-1] == ProxyNodeSpec())
    writes = len(agent.object.writes)
    await asyncio.sleep(0.5)
    assert len(agent.object.writes) == writes


async def test_without_an_object_the_own_configuration_counts(agent: Agent) -> None:
    """Also where there was one when the agent was about to start, and it went before it was followed."""
    await until(lambda: agent.specs == [ProxyNodeSpec()])
    assert agent.object.writes == []
