"""What a node may lack or forbid: one clear line, no stack trace, and a working agent wherever that is possible."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Sequence

import pytest

from nodeproxy.sandbox.agent import AgentProcess, http_get
from nodeproxy.sandbox.pace import scaled
from nodeproxy.sandbox.topology import Sandbox
from tests.ways import IPVS_NFT, LEGACY, NFT, Way, ipvs

from .conftest import POD_A
from .world import CLUSTER_IP, World, ask, endpoint_slice, names, service

pytestmark = pytest.mark.kernel

WAYS = pytest.mark.parametrize("way", [LEGACY, NFT, ipvs(IPVS_NFT)], ids=str)
WITHOUT_NET_ADMIN = ("setpriv", "--bounding-set=-net_admin", "--")
READ_ONLY_SYSCTLS = ("unshare", "--mount", "sh", "-c", 'mount -o bind,ro /proc/sys /proc/sys && exec "$@"', "sh")


def wrapped(box: Sandbox, way: Way, wrapper: Sequence[str], flags: Sequence[str] = ()) -> World:
    """A world whose agent is started by another program, with a Service that is served by pod A."""
    world = World(box, way, flags=flags)
    world.agent = AgentProcess(box, [*wrapper, *world.agent.command])
    world.put("web", service(), endpoint_slice([POD_A]))
    return world


@WAYS
def test_without_the_capability_it_ends_with_one_line_that_names_it(box: Sandbox, way: Way) -> None:
    world = wrapped(box, way, WITHOUT_NET_ADMIN)
    process = box.node.run(
        subprocess.run, world.agent.command, capture_output=True, text=True, timeout=scaled(30), check=False
    )
    assert process.returncode == 1
    complaints = [line for line in process.stderr.splitlines() if line.startswith("nodeproxy: ")]
    assert len(complaints) == 1, process.stderr
    assert "NET_ADMIN" in complaints[0]
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("way", [LEGACY, NFT], ids=str)
def test_sysctls_that_are_read_only_are_said_once_and_services_work(box: Sandbox, way: Way) -> None:
    world = wrapped(box, way, READ_ONLY_SYSCTLS, ["--conntrack-tcp-timeout-close-wait", "17m"])
    with world.agent:
        assert names(ask(box.outside, CLUSTER_IP, 80, 5)) == {"a"}
        text = world.agent.log_text()
    said = [line for line in text.splitlines() if "sysctl not set" in line and "close_wait" in line]
    assert len(said) == 1, text
    assert "Traceback" not in text


@pytest.mark.parametrize("way", [ipvs(IPVS_NFT)], ids=str)
def test_ipvs_mode_is_not_to_be_had_without_the_one_sysctl_it_cannot_do_without(box: Sandbox, way: Way) -> None:
    world = wrapped(box, way, READ_ONLY_SYSCTLS)
    process = box.node.run(
        subprocess.run, world.agent.command, capture_output=True, text=True, timeout=scaled(30), check=False
    )
    assert process.returncode == 1
    assert "net.ipv4.vs.conntrack is 0 and cannot be set" in process.stderr
    assert "Traceback" not in process.stderr
    world.agent.command += ["--fallback", "iptables"]
    with world.agent:
        assert names(ask(box.outside, CLUSTER_IP, 80, 5)) == {"a"}


@WAYS
def test_a_port_in_use_is_said_once_and_taken_when_it_is_free(box: Sandbox, way: Way) -> None:
    world = wrapped(box, way, ())
    with box.node.run(lambda: socket.create_server(("127.0.0.1", 10249))):
        world.agent.start()
        world.agent.wait_ready()
        assert names(ask(box.outside, CLUSTER_IP, 80, 5)) == {"a"}
        world.settle(lambda: "cannot listen" in world.agent.log_text(), "it is said")
    world.settle(lambda: _serves_metrics(world), "the port is taken", 20)
    assert world.agent.log_text().count("cannot listen") == 1
    world.agent.stop()


def _serves_metrics(world: World) -> bool:
    try:
        return http_get(world.box.node, "http://127.0.0.1:10249/metrics")[0] == 200
    except OSError:
        return False
