"""Knowing another service proxy on the node: real sockets and processes in network namespaces of their own."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import pytest
from structlog.testing import capture_logs

from nodeproxy.agent.node_claim import Holder, NodeClaim
from nodeproxy.agent.other_proxies import AnotherProxyRuns, RunningProxy, ask, find_others, processes, wait_until_alone
from nodeproxy.configuration.agent_config import WhileAnotherRuns
from nodeproxy.sandbox.namespace import Namespace, unique_stem

pytestmark = pytest.mark.kernel

T = TypeVar("T")
HEALTH = (
    b'{"lastUpdated": "2026-01-01 00:00:00 +0000 UTC","currentTime": "2026-01-01 00:00:01 +0000 UTC", "nodeEligible": true}'
)
KUBE_PROXY_METRICS = {"/proxyMode": b"ipvs", "/metrics": b"# HELP ..."}


@pytest.fixture
def node() -> Iterator[Namespace]:
    with Namespace(f"{unique_stem()}-alone") as made:
        made.ip(["link set lo up"])
        yield made


def run(node: Namespace, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """On an event loop inside the node."""
    return node.run(lambda: asyncio.run(work()))


def found(node: Namespace, *addresses: str) -> list[RunningProxy]:
    """What an agent that starts in the node now would find."""

    async def find() -> list[RunningProxy]:
        with NodeClaim() as claim:
            return await find_others(claim, addresses)

    return run(node, find)


@contextmanager
def serving(node: Namespace, address: tuple[str, int], pages: Mapping[str, bytes], server: str = "") -> Iterator[None]:
    """An HTTP server in the node; with `server` it says what it is."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = pages.get(self.path)
            self.send_response_only(200 if body is not None else 404)
            if server:
                self.send_header("Server", server)
            self.end_headers()
            self.wfile.write(body or b"404 page not found\n")

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET

    made = node.run(lambda: Server(address, Handler))
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


@contextmanager
def orphan(node: Namespace, directory: Path, name: str = "kube-proxy", *arguments: str) -> Iterator[int]:
    """A sleeping process of that name in the node that is no child of ours; yields its process id."""
    program = directory / name
    program.symlink_to("/usr/bin/sleep")
    words = " ".join([str(program), *arguments, "60"])
    pid = int(node.command(["sh", "-c", f"{words} >/dev/null 2>&1 & echo $!"]).stdout)
    comm = Path(f"/proc/{pid}/comm")
    deadline = time.monotonic() + 10
    while comm.read_text().strip() != name[:15] and time.monotonic() < deadline:
        time.sleep(0.001)
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError):
            end = os.pidfd_open(pid)
            os.kill(pid, signal.SIGKILL)
            select.select([end], [], [], 10)  # killed is not yet dead
            os.close(end)


def test_nobody(node: Namespace) -> None:
    assert found(node) == []


def test_kube_proxy_by_its_answers(node: Namespace) -> None:
    with serving(node, ("127.0.0.1", 10249), KUBE_PROXY_METRICS), serving(node, ("127.0.0.1", 10256), {"/healthz": HEALTH}):
        [other] = found(node)
    assert str(other) == "kube-proxy runs on this node (answers on 127.0.0.1:10249 and 127.0.0.1:10256, mode ipvs)"


@pytest.mark.parametrize(
    ("listens", "configured", "shown"),
    [
        (("127.0.0.1", 10999), "127.0.0.1:10999", "127.0.0.1:10999"),
        (("0.0.0.0", 10999), "0.0.0.0:10999", "127.0.0.1:10999"),
        (("::1", 10999), "[::]:10999", "[::1]:10999"),
    ],
)
def test_a_configured_address_is_asked_as_well(
    node: Namespace, listens: tuple[str, int], configured: str, shown: str
) -> None:
    with serving(node, listens, {"/healthz": HEALTH}):
        assert found(node) == []
        assert [str(one) for one in found(node, configured)] == [f"kube-proxy runs on this node (answers on {shown})"]


@pytest.mark.parametrize("address", ["", "not an address", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:99999"])
def test_an_address_that_is_none_is_not_asked(node: Namespace, address: str) -> None:
    assert node.run(ask, address) is None


@pytest.mark.parametrize(
    "pages",
    [
        {},
        {"/proxyMode": b"<html>welcome</html>", "/healthz": b"ok"},
        {"/healthz": b'{"status": "fine"}'},
        {"/healthz": b"[]"},
        {"/proxyMode": b"\xff\xfe", "/healthz": b"\x00" * 100_000},
    ],
    ids=["nothing", "a web site", "other JSON", "a list", "binary"],
)
def test_something_else_that_answers_is_no_proxy(node: Namespace, pages: Mapping[str, bytes]) -> None:
    with serving(node, ("127.0.0.1", 10249), pages):
        assert found(node) == []


def test_something_that_speaks_no_http_is_no_proxy(node: Namespace) -> None:
    def listen() -> socket.socket:
        return socket.create_server(("127.0.0.1", 10249))

    with node.run(listen) as silent:
        thread = threading.Thread(target=_say_and_close, args=(silent,))
        thread.start()
        assert found(node) == []
        thread.join()


def _say_and_close(listening: socket.socket) -> None:
    with listening.accept()[0] as connection:
        connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")


def test_our_own_answers_are_no_other_proxy(node: Namespace) -> None:
    with serving(node, ("127.0.0.1", 10249), {"/proxyMode": b"iptables"}, server="nodeproxy"):
        assert found(node) == []


def test_kube_proxy_by_its_process(node: Namespace, tmp_path: Path) -> None:
    with orphan(node, tmp_path) as pid:
        assert [str(other) for other in found(node)] == [f"kube-proxy runs on this node (pid {pid})"]
        with serving(node, ("127.0.0.1", 10249), KUBE_PROXY_METRICS):
            [other] = found(node)
            how = f"answers on 127.0.0.1:10249, pid {pid}"
            assert other == RunningProxy("kube-proxy", "ipvs", how)
            assert str(other) == f"kube-proxy runs on this node ({how}, mode ipvs)"
    assert found(node) == []


def test_a_process_of_another_namespace_is_not_on_this_node(node: Namespace, tmp_path: Path) -> None:
    with Namespace(f"{unique_stem()}-other") as other, orphan(other, tmp_path) as pid:
        assert other.run(processes) == [pid]
        assert node.run(processes) == []


def test_our_children_do_not_count(node: Namespace, tmp_path: Path) -> None:
    program = tmp_path / "kube-proxy"
    program.symlink_to("/usr/bin/sleep")
    child = node.run(subprocess.Popen, [program, "60"])
    try:
        assert node.run(processes) == []
    finally:
        child.kill()
        child.wait()


def test_kube_proxy_in_one_program_with_others(node: Namespace, tmp_path: Path) -> None:
    """By its command line; something else that only speaks of kube-proxy is none."""
    code = "import time; time.sleep(60)"
    line = f"exec -a /bin/hyperkube {sys.executable} kube-proxy.py >/dev/null 2>&1 & echo $!"
    script = tmp_path / "kube-proxy"
    script.write_text(code)
    pid = int(node.command(["bash", "-c", f"cd {tmp_path}; {line.replace('kube-proxy.py', 'kube-proxy')}"]).stdout)
    edited = int(node.command(["bash", "-c", f"{sys.executable} {script} >/dev/null 2>&1 & echo $!"]).stdout)
    try:
        deadline = time.monotonic() + 10
        while not Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"/bin/hyperkube") and time.monotonic() < deadline:
            time.sleep(0.001)
        assert node.run(processes) == [pid]
    finally:
        for one in (pid, edited):
            os.kill(one, signal.SIGKILL)


HOLDING = """
import asyncio, sys
from nodeproxy.agent.node_claim import NodeClaim
async def hold():
    claim = NodeClaim()
    assert claim.take() is None
    claim.answer()
    print("held", flush=True)
    await asyncio.sleep(60)
asyncio.run(hold())
"""


@contextmanager
def another_agent(node: Namespace, *, user: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A process in the node that holds the claim as an agent does."""
    as_user = ["setpriv", f"--reuid={user}", "--clear-groups"] if user else []
    process = node.run(
        subprocess.Popen, [*as_user, sys.executable, "-c", HOLDING], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert process.stdout
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_another_nodeproxy_by_its_claim(node: Namespace) -> None:
    with another_agent(node) as agent:
        [other] = found(node)
        assert other == RunningProxy("nodeproxy", None, f"pid {agent.pid}")
        with serving(node, ("127.0.0.1", 10249), {"/proxyMode": b"iptables"}, server="nodeproxy"):
            said = f"nodeproxy runs on this node (answers on 127.0.0.1:10249, pid {agent.pid}, mode iptables)"
            assert [str(one) for one in found(node)] == [said]
    assert found(node) == []


def test_a_killed_agent_leaves_no_claim(node: Namespace) -> None:
    with another_agent(node) as agent, NodeClaim() as claim:
        assert node.run(claim.take) == Holder(agent.pid, 0)
        agent.kill()
        agent.wait()
        assert node.run(claim.take) is None
        with NodeClaim() as second:
            assert node.run(second.take) == Holder(os.getpid(), 0)


def test_the_claim_is_of_one_network_namespace(node: Namespace) -> None:
    with Namespace(f"{unique_stem()}-other") as other, NodeClaim() as here, NodeClaim() as there:
        assert node.run(here.take) is None
        assert other.run(there.take) is None
        assert node.run(here.take) is None, "what is ours stays ours"


def test_any_number_may_ask_who_holds_the_claim(node: Namespace) -> None:
    with another_agent(node) as agent, NodeClaim() as claim:
        assert [node.run(claim.take) for _ in range(500)] == [Holder(agent.pid, 0)] * 500


def test_another_user_cannot_keep_an_agent_off(node: Namespace) -> None:
    with another_agent(node, user=65534) as process, capture_logs() as logs:
        assert found(node) == []
    assert {"uid": 65534, "pid": process.pid}.items() <= logs[0].items()


def test_one_of_many_that_start_at_once_gets_the_claim(node: Namespace) -> None:
    claims = [NodeClaim() for _ in range(20)]
    held: list[Holder | None] = []
    start = threading.Barrier(len(claims))

    def take(claim: NodeClaim) -> None:
        start.wait()
        held.append(claim.take())

    def all_at_once() -> None:
        threads = [threading.Thread(target=take, args=(claim,)) for claim in claims]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    node.run(all_at_once)
    for claim in claims:
        claim.close()
    assert held.count(None) == 1
    assert held.count(Holder(os.getpid(), 0)) == len(claims) - 1


def waiting(
    node: Namespace,
    policy: WhileAnotherRuns,
    *,
    before: float | None = None,
    remind: float = 30.0,
    tell: Callable[[str], None] = lambda note: None,
) -> tuple[list[str], bool]:
    """Wait as an agent does, for so many seconds at most; what it logged, and whether it may go on."""

    async def wait() -> bool:
        with NodeClaim() as claim:
            try:
                await asyncio.wait_for(
                    wait_until_alone(policy, claim, tell=tell, poll_seconds=0.02, remind_seconds=remind), before or 20
                )
            except TimeoutError:
                return False
            return True

    with capture_logs() as logs:
        done = run(node, wait)
    return [str(log["event"]) for log in logs], done


def test_alone_at_once(node: Namespace) -> None:
    for policy in WhileAnotherRuns:
        assert waiting(node, policy) == ([], True)


def test_wait_says_once_what_it_waits_for(node: Namespace, tmp_path: Path) -> None:
    told: list[str] = []
    with orphan(node, tmp_path) as pid:
        said, done = waiting(node, WhileAnotherRuns.WAIT, before=0.5, tell=told.append)
        assert not done
        assert told == [f"nodeproxy programs nothing before it has ended: kube-proxy runs on this node (pid {pid})"]
        assert said == ["waiting for another service proxy to end; nothing is programmed before that"]
        said, _ = waiting(node, WhileAnotherRuns.WAIT, before=0.5, remind=0.05)
        assert len(said) > 2


def test_wait_goes_on_when_the_other_has_died(node: Namespace, tmp_path: Path) -> None:
    with orphan(node, tmp_path) as pid:
        killer = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
        killer.start()
        said, done = waiting(node, WhileAnotherRuns.WAIT)
        killer.join()
    assert done
    assert said[-1] == "the other service proxy has ended"


def test_refuse_says_what_to_do_in_one_line(node: Namespace, tmp_path: Path) -> None:
    with orphan(node, tmp_path) as pid, pytest.raises(AnotherProxyRuns) as refused:
        waiting(node, WhileAnotherRuns.REFUSE)
    said = str(refused.value)
    assert said.startswith(f"kube-proxy runs on this node (pid {pid}). Stop it first")
    assert "\n" not in said


def test_proceed_warns(node: Namespace, tmp_path: Path) -> None:
    with orphan(node, tmp_path):
        said, done = waiting(node, WhileAnotherRuns.PROCEED)
    assert done
    assert said == ["another service proxy runs on this node; both will undo each other's rules"]
