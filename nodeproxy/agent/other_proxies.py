"""Owns knowing whether another service proxy, kube-proxy or a second nodeproxy, runs on this node now.

"On this node" means in this network namespace, for that is what proxies program. What a proxy that has ended left behind is
no evidence. Evidence is

- the answers on the ports that kube-proxy and we both serve: a wrong address costs nothing, and they tell the mode. A port
  that something else answers on is no proxy (the HTTP server says that it is in use);
- processes called kube-proxy in the same network namespace. It takes `hostPID: true` to see them from a pod;
- for another nodeproxy, who holds the name `@nodeproxy` (`NodeClaim`): an HTTP answer does not tell whether it is our own.
"""

from __future__ import annotations

import asyncio
import http.client
import ipaddress
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import structlog
from msgspec import Struct

from nodeproxy.agent.node_claim import NodeClaim
from nodeproxy.configuration.addresses import parse_host_port
from nodeproxy.configuration.agent_config import WhileAnotherRuns

_log = structlog.get_logger(__name__)

_USUAL_ADDRESSES: Final = ("127.0.0.1:10249", "127.0.0.1:10256")
_TIMEOUT_SECONDS: Final = 1.0
_LONGEST_ANSWER: Final = 4096
_MODES: Final = ("iptables", "ipvs", "nftables", "kernelspace")
_KUBE_PROXY, _NODEPROXY = "kube-proxy", "nodeproxy"


class RunningProxy(Struct, frozen=True):
    """Another service proxy that runs on this node. `how` it is known, in a few words; `mode` where it tells."""

    name: str
    mode: str | None
    how: str

    def __str__(self) -> str:
        mode = (f"mode {self.mode}",) if self.mode else ()
        return f"{self.name} runs on this node ({', '.join((self.how, *mode))})"


class AnotherProxyRuns(Exception):
    """The agent was told to refuse while another proxy runs; the message is one line that says what to do."""


class Answer(NamedTuple):
    """What answered at an address: which proxy, and its mode where it tells."""

    address: str
    name: str
    mode: str | None


def ask(address: str) -> Answer | None:
    """Which proxy answers at `host:port`; None where none does. Blocking, for a few seconds at most.

    `/proxyMode` is on one of kube-proxy's addresses, `/healthz` on the other; which is which does not matter.
    """
    where = parse_host_port(address)
    if where is None:
        return None
    host = ipaddress.ip_address(where[0])
    if host.is_unspecified:
        host = ipaddress.ip_address("127.0.0.1" if host.version == 4 else "::1")
    shown = f"[{host}]:{where[1]}" if host.version == 6 else f"{host}:{where[1]}"
    for path in ("/proxyMode", "/healthz"):
        try:
            server, body = _get(str(host), where[1], path)
        except (OSError, http.client.HTTPException):
            return None  # nobody there, or nothing that speaks HTTP
        mode = body.decode(errors="replace").strip() if path == "/proxyMode" else ""
        known_mode = mode if mode in _MODES else None
        if server.partition("/")[0] == _NODEPROXY:
            return Answer(shown, _NODEPROXY, known_mode)
        if known_mode or (path == "/healthz" and _is_health(body)):
            return Answer(shown, _KUBE_PROXY, known_mode)
    return None


def _get(host: str, port: int, path: str) -> tuple[str, bytes]:
    """The Server header and the beginning of the body, whatever the status (/healthz has a body with 503, too)."""
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_SECONDS)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.getheader("Server", ""), response.read(_LONGEST_ANSWER)
    finally:
        connection.close()


class _Health(Struct, rename="camel"):
    last_updated: str
    current_time: str


def _is_health(body: bytes) -> bool:
    """Whether it is the body of kube-proxy's /healthz. Others that take its place (Cilium) answer alike."""
    try:
        msgspec.json.decode(body, type=_Health)
    except msgspec.DecodeError:
        return False
    return True


def processes(proc: Path = Path("/proc")) -> list[int]:
    """Process ids of every kube-proxy in the network namespace of this thread, but not ourselves or our children.

    A process that we may not look into (no CAP_SYS_PTRACE) is passed over: it may be in another namespace. Blocking.
    """
    try:
        here = (proc / "thread-self/ns/net").stat()
    except OSError:
        return []
    return sorted(pid for pid in _named_kube_proxy(proc) if _is_in(proc / str(pid) / "ns/net", here))


def _named_kube_proxy(proc: Path) -> Iterator[int]:
    ours = os.getpid()
    for directory in proc.iterdir():
        if not directory.name.isdecimal():
            continue
        pid = int(directory.name)
        try:
            if (directory / "comm").read_text() == f"{_KUBE_PROXY}\n" or _runs_kube_proxy(directory):
                state, parent = (directory / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z" and ours not in (pid, int(parent)):
                    yield pid
        except OSError:
            continue  # it ended while we looked


def _runs_kube_proxy(directory: Path) -> bool:
    """Whether the command line is kube-proxy's, also where it is one program with others (`hyperkube kube-proxy`)."""
    words = (directory / "cmdline").read_bytes().split(b"\0")
    program = words[0].rpartition(b"/")[2]
    return program == b"kube-proxy" or (program == b"hyperkube" and words[1:2] in ([b"kube-proxy"], [b"proxy"]))


def _is_in(namespace: Path, here: os.stat_result) -> bool:
    try:
        return os.path.samestat(namespace.stat(), here)
    except OSError:
        return False


async def find_others(claim: NodeClaim, addresses: Iterable[str] = ()) -> list[RunningProxy]:
    """The other proxies that run on this node now. `addresses` (`host:port`) are asked beside kube-proxy's usual ones.

    The claim is taken on the way where nobody else has it: from then on an answer of a nodeproxy is taken for our own.
    """
    holder = await asyncio.to_thread(claim.take)
    claim.answer()
    asked = dict.fromkeys((*_USUAL_ADDRESSES, *addresses))
    answers = [found for found in await asyncio.gather(*(asyncio.to_thread(ask, one) for one in asked)) if found]
    pids = await asyncio.to_thread(processes)
    others = []
    if pids or any(answer.name == _KUBE_PROXY for answer in answers):
        others.append(_described(_KUBE_PROXY, answers, pids))
    if holder is not None:
        others.append(_described(_NODEPROXY, answers, [holder.pid] if holder.pid else []))
    return others


def kube_proxies(addresses: Iterable[str] = ()) -> list[RunningProxy]:
    """Every kube-proxy that runs on this node now; nobody's claim is looked at. Blocking, for some seconds at most."""
    asked = dict.fromkeys((*_USUAL_ADDRESSES, *addresses))
    answers = [found for one in asked if (found := ask(one)) is not None and found.name == _KUBE_PROXY]
    pids = processes()
    return [_described(_KUBE_PROXY, answers, pids)] if answers or pids else []


def _described(name: str, answers: Sequence[Answer], pids: Sequence[int]) -> RunningProxy:
    mine = [answer for answer in answers if answer.name == name]
    places = [answer.address for answer in mine]
    how = [f"answers on {' and '.join(dict.fromkeys(places))}"] if places else []
    how += [f"pid {' and '.join(str(pid) for pid in pids)}"] if pids else []
    mode = next((answer.mode for answer in mine if answer.mode), None)
    return RunningProxy(name, mode, ", ".join(how) or "holds the name @nodeproxy")


async def wait_until_alone(
    policy: WhileAnotherRuns,
    claim: NodeClaim,
    addresses: Iterable[str] = (),
    *,
    tell: Callable[[str], None] = lambda note: None,
    poll_seconds: float = 1.0,
    remind_seconds: float = 30.0,
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Return once this agent may program the node. Call it before anything in the kernel is changed.

    - wait: looks every `poll_seconds`, and says what it waits for when that changes and every `remind_seconds`, in the log
      and to `tell`;
    - refuse: raises `AnotherProxyRuns`;
    - proceed: warns.
    """
    asked = tuple(addresses)
    said: list[str] = []
    say_at = 0.0
    while others := await find_others(claim, asked):
        names = [str(other) for other in others]
        if policy is WhileAnotherRuns.REFUSE:
            raise AnotherProxyRuns(
                f"{'; '.join(names)}. Stop it first, or keep it off this node, or choose --while-another-runs=wait"
            )
        if policy is WhileAnotherRuns.PROCEED:
            _log.warning("another service proxy runs on this node; both will undo each other's rules", others=names)
            return
        if names != said or now() >= say_at:
            _log.warning("waiting for another service proxy to end; nothing is programmed before that", others=names)
            tell(f"nodeproxy programs nothing before it has ended: {'; '.join(names)}")
            said, say_at = names, now() + remind_seconds
        await asyncio.sleep(poll_seconds)
    if said:
        _log.info("the other service proxy has ended")
