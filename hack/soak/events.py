"""Owns what happens to a node under load, event by event. Each function does its event so many times and spreads that out.

A planned event is one that an operator does or must reckon with: nobody may notice it. The others are faults.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from hack.soak import agents
from hack.soak.field import Field, FieldError
from nodeproxy.kernel.ipvs import IPVS
from nodeproxy.sandbox.agent import AgentProcess
from nodeproxy.sandbox.pace import scaled

SWITCH_TIMEOUT: Final = 20.0
_STOP_TIMEOUT: Final = 10.0
_OUTAGE: Final = 2.0


class Event(NamedTuple):
    """An event: how it is done, how often in the long and in the short form, and where it makes sense.

    `planned`: nothing may fail. Otherwise, failures of what was sent until `gap` seconds after each time are borne with.
    `keeps_affinity`: a sticky client must keep to its server until that terminates. `api`: needs an API server.
    """

    name: str
    title: str
    do: Callable[[Field, int, float], None]
    times: int
    short_times: int
    planned: bool = True
    gap: float = 0.0
    api: bool = False
    keeps_affinity: bool = True
    modes: Sequence[str] = ("iptables", "ipvs")
    needs_kube_proxy: bool = False
    bystanders: int = 20


def _spread(times: int, seconds: float) -> Callable[[int], None]:
    """A function that waits until the turn of the n-th time, counted from 0."""
    start = time.monotonic()

    def wait(number: int) -> None:
        time.sleep(max(0.0, start + number * seconds / max(times, 1) - time.monotonic()))

    return wait


def nothing(field: Field, times: int, seconds: float) -> None:
    """No event: what fails then is the fault of the load itself."""
    field.mark("nothing happens")


def rolling_replacement(field: Field, times: int, seconds: float) -> None:
    """All backends are replaced, the local and the remote ones in two waves each."""
    turn = _spread(times, seconds)
    for number in range(times):
        turn(number)
        everyone = list(field.pods)
        for wave in (everyone[::2], everyone[1::2]):
            field.replace(wave)


def killed(field: Field, times: int, seconds: float) -> None:
    """The agent is killed and started again; every other time while it is about to program a change."""
    turn = _spread(times, seconds)

    def kill_and_start() -> None:
        field.agent.kill()
        field.mark("killed")
        time.sleep(field.random.uniform(0, 0.3))
        field.agent.start()
        took = field.agent.wait_ready()
        field.mark(f"ready again, {took:.2f} s after its start")

    def kill_soon() -> None:
        time.sleep(field.random.uniform(0, 0.06))
        kill_and_start()

    for number in range(times):
        turn(number)
        if number % 2:
            field.replace([field.random.choice(list(field.pods))], interrupt=kill_soon)
        else:
            kill_and_start()


def mode_switched(field: Field, times: int, seconds: float) -> None:
    """The mode in the agent's configuration file is changed, to the other and back; a backend is replaced in between."""
    file = field.box.directory / "config.yaml"
    _stop(field.agent)
    agents.write_config(file, field.mode)
    agent = field.use(agents.configured_nodeproxy(field.box, field.feed, file, field.variant))
    agent.start()
    agent.wait_ready()
    turn = _spread(times, seconds)
    for number in range(times):
        turn(number)
        wanted = "iptables" if field.mode == "ipvs" else "ipvs"
        field.mark(f"configuration says {wanted}")
        agents.write_config(file, wanted)
        took = agents.wait_mode(agent, wanted, SWITCH_TIMEOUT)
        field.mode = wanted
        field.mark(f"in mode {wanted} after {took:.2f} s")
        if number % 3 == 2:
            field.replace([field.random.choice(list(field.pods))])


def flushed(field: Field, times: int, seconds: float) -> None:
    """`iptables -t nat -F`."""
    turn = _spread(times, seconds)
    for number in range(times):
        turn(number)
        field.mark("flush")
        field.box.node.command([f"iptables-{field.variant}", "-w", "5", "-t", "nat", "-F"])


def virtual_servers_gone(field: Field, times: int, seconds: float) -> None:
    """`ipvsadm -C`."""
    turn = _spread(times, seconds)
    for number in range(times):
        turn(number)
        field.mark("flush")
        field.box.node.run(_clear_ipvs)


def _clear_ipvs() -> None:
    with IPVS() as ipvs:
        ipvs.flush()


def api_server_gone(field: Field, times: int, seconds: float) -> None:
    """The API server dies, or hangs, and comes back with a change to be made."""
    turn = _spread(times, seconds)
    for number in range(times):
        turn(number)
        hangs = bool(number % 2)
        field.mark("the API server hangs" if hangs else "the API server dies")
        if hangs:
            field.api.freeze(True)
        else:
            field.api.kill()
        time.sleep(_OUTAGE)
        if hangs:
            field.api.freeze(False)
        else:
            field.api.start()
        field.mark("it is back")
        field.replace([field.random.choice(list(field.pods))])


def taken_over(field: Field, times: int, seconds: float) -> None:
    """kube-proxy serves, nodeproxy takes over, kube-proxy takes back, and `nodeproxy cleanup` leaves it what is its."""
    peer, ours = field.agent, agents.nodeproxy(field.box, field.feed, field.mode, field.variant)
    turn = _spread(times, seconds)
    for number in range(times):
        turn(number)
        field.replace([field.random.choice(list(field.pods))])
        field.mark("kube-proxy stops")
        _stop(peer)
        field.use(ours).start()
        field.mark(f"nodeproxy is ready after {ours.wait_ready():.2f} s")
        field.replace([field.random.choice(list(field.pods))])
        field.mark("nodeproxy stops")
        _stop(ours)
        start_kube_proxy(field.use(peer))
        field.mark("kube-proxy is ready")
        done = field.box.node.command([ours.command[0], "cleanup"], check=False, timeout=scaled(30))
        field.mark(f"nodeproxy cleanup: exit {done.returncode}")
        if done.returncode != 0:
            raise FieldError(f"nodeproxy cleanup: exit {done.returncode}: {done.stderr}")
        time.sleep(0.5)


def _stop(agent: AgentProcess) -> None:
    """SIGTERM must end it in time. One that hangs is made to say where (SIGABRT, with Python's fault handler)."""
    process = agent.process
    assert process is not None
    process.terminate()
    try:
        status = process.wait(scaled(_STOP_TIMEOUT))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        process.wait(scaled(_STOP_TIMEOUT))
        raise FieldError(f"{agent.command[0]} did not stop in {_STOP_TIMEOUT:g} s\n{agent.log_tail(80)}") from None
    if status not in (0, -signal.SIGTERM):  # kube-proxy has no handler for it
        raise FieldError(f"{agent.command[0]} ended with {status} when it was told to stop\n{agent.log_tail()}")


def prepare_kube_proxy(field: Field, binary: Path) -> None:
    """kube-proxy instead of nodeproxy on a node that is new."""
    field.programming_timeout = 60.0
    start_kube_proxy(field.use(agents.kube_proxy(field.box, field.feed, binary, field.mode, field.variant)))


def start_kube_proxy(peer: AgentProcess) -> None:
    """Start it and wait until both families are programmed."""
    peer.start()
    peer.wait_ready(60)
    peer.wait_metric(agents.KUBE_PROXY_SYNCED, series=2, timeout=60)


EVENTS: Final = {
    event.name: event
    for event in (
        Event("control", "no event", nothing, 1, 1),
        Event("rolling", "rolling replacement of all backends", rolling_replacement, 6, 1),
        Event("kill", "agent killed (-9) and started", killed, 10, 3),
        Event("switch", "mode switched live", mode_switched, 10, 3, keeps_affinity=False, modes=("ipvs",)),
        Event("flush", "iptables -t nat -F", flushed, 5, 1, planned=False, gap=2.0),
        Event(
            "flush-ipvs",
            "ipvsadm -C",
            virtual_servers_gone,
            5,
            1,
            planned=False,
            gap=2.0,
            keeps_affinity=False,
            modes=("ipvs",),
        ),
        Event("api", "API server gone and back", api_server_gone, 5, 2, api=True),
        Event(
            "takeover",
            "kube-proxy to nodeproxy and back, cleanup",
            taken_over,
            3,
            1,
            api=True,
            keeps_affinity=False,
            needs_kube_proxy=True,
            bystanders=4,  # in IPVS mode, kube-proxy starts a process for each entry of an ipset
        ),
    )
}
