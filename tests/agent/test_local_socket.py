"""The local socket: it answers root and its own user, and nobody else; a name that is taken is waited for."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from nodeproxy.agent.http_server import TEXT, Answer
from nodeproxy.agent.local_socket import NAME, answering
from nodeproxy.sandbox.namespace import Namespace
from nodeproxy.snapshot.agent_socket import AgentNotRunning, ask, ask_status

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces (needs root)")

ROUTES = {"/status": lambda: Answer(200, TEXT, b"well"), "/slow": lambda: lambda: Answer(200, TEXT, b"x" * 500_000)}


@pytest.fixture
def own_namespace() -> Iterator[Namespace]:
    """Abstract names are those of a network namespace; the machine's may be in use."""
    with Namespace("socket") as made:
        yield made


async def serve_while(work: Callable[[], object]) -> object:
    async with answering(ROUTES):
        await asyncio.sleep(0.05)
        return await asyncio.to_thread(work)


def in_namespace(where: Namespace, work: Callable[[], object]) -> object:
    """Serve in a namespace, and do some work there meanwhile."""
    return where.run(lambda: asyncio.run(serve_while(work)))


def test_it_answers(own_namespace: Namespace) -> None:
    assert in_namespace(own_namespace, lambda: ask("/status")) == b"well"
    assert in_namespace(own_namespace, lambda: len(ask("/slow"))) == 500_000


def test_what_it_does_not_know_and_what_is_of_another_version_is_told(own_namespace: Namespace) -> None:
    def unknown() -> str:
        with pytest.raises(AgentNotRunning) as told:
            ask("/nothing")
        with pytest.raises(AgentNotRunning, match="of another version"):
            ask_status()
        return str(told.value)

    assert in_namespace(own_namespace, unknown) == "the agent at @nodeproxy-status answers 404 to /nothing"


def test_nobody_there(own_namespace: Namespace) -> None:
    def nobody() -> None:
        with pytest.raises(AgentNotRunning, match="no nodeproxy agent runs in this network namespace"):
            ask("/status")

    own_namespace.run(nobody)


ASK = f"""
import os, socket, sys
os.setuid(int(sys.argv[1]))
with socket.socket(socket.AF_UNIX) as it:
    it.settimeout(5)
    it.connect({NAME!r})
    try:
        it.sendall(b"GET /status HTTP/1.0\\r\\n\\r\\n")
        print(it.recv(1000))
    except ConnectionError:
        print(b"")
"""
HOLD = f"""
import os, socket, sys
os.setuid(65534)
it = socket.socket(socket.AF_UNIX)
it.bind({NAME!r})
it.listen()
print(1, flush=True)
sys.stdin.read()
"""


def test_another_user_is_not_answered(own_namespace: Namespace) -> None:
    def ask_as(user: int) -> str:
        command = [sys.executable, "-c", ASK, str(user)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert in_namespace(own_namespace, lambda: ask_as(65534)) == "b''"
    assert "well" in str(in_namespace(own_namespace, lambda: ask_as(0)))


def test_an_answer_of_another_user_does_not_count(own_namespace: Namespace) -> None:
    def hold() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    with own_namespace.run(hold) as process:
        assert process.stdout is not None and process.stdout.readline()
        try:
            with pytest.raises(AgentNotRunning, match="held by user 65534, who is not trusted"):
                own_namespace.run(lambda: ask("/status"))
        finally:
            process.kill()


def test_a_name_that_is_taken_is_waited_for(own_namespace: Namespace) -> None:
    async def wait() -> bytes:
        with socket.socket(socket.AF_UNIX) as holder:
            holder.bind(NAME)
            holder.listen()
            async with answering(ROUTES):
                await asyncio.sleep(0.1)
                holder.close()
                for _ in range(200):
                    try:
                        return await asyncio.to_thread(ask, "/status")
                    except AgentNotRunning:
                        await asyncio.sleep(0.1)
        raise AssertionError("nobody answers")

    assert own_namespace.run(lambda: asyncio.run(wait())) == b"well"
