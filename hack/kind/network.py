"""Owns the pods' network: CNI configuration and routes in each node, and this machine's routes to pods.

A node keeps its routes over restarts (node/network/node-routes). This machine's routes let pods speak with it, and with
all that it may speak for; they need root and an engine on this machine, and are left out with a word elsewhere.
"""

from __future__ import annotations

import contextlib
import io
import ipaddress
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from hack.kind import config, parts
from hack.kind.command import run, succeeds
from hack.kind.places import HERE, KindError
from hack.kind.progress import say

_FILES: Final = HERE / "node" / "network"
_BRIDGE: Final = "/opt/cni/bin/bridge"
_PREFERENCE: Final = "1000"  # of our rules, before the main table's
_CONFLIST: Final = "etc/cni/net.d/10-pods.conflist"


def source() -> str:
    """What is installed in nodes, as text: it is part of what makes a cluster what it is."""
    return "".join(path.read_text() for path in sorted(_FILES.iterdir())) + config.cni_config(["SUBNET"])


def install(pod_subnets: Mapping[str, Sequence[str]]) -> None:
    """Give the nodes (by name, with the subnets of their pods) CNI configuration and routes, all at once."""
    with ThreadPoolExecutor(len(pod_subnets)) as pool:
        list(pool.map(lambda node: _install(node, pod_subnets), pod_subnets))


def host_routes(addresses: Mapping[str, Sequence[str]], pod_subnets: Mapping[str, Sequence[str]]) -> None:
    """Routes of this machine to the pods, by the nodes' addresses."""
    for node, subnets in pod_subnets.items():
        for subnet in subnets:
            gateway = next((one for one in addresses[node] if (":" in one) == (":" in subnet)), None)
            if gateway and not _route("replace", subnet, "via", gateway):
                say("this machine gets no routes to pods (no root, or the engine is elsewhere): pods cannot speak with it")
                return


def forget_host_routes(pod_subnets: Sequence[str]) -> None:
    """Remove this machine's routes to any pods of a cluster."""
    if os.geteuid() != 0:
        return
    for subnet in pod_subnets:
        for family in ("-4", "-6"):
            with contextlib.suppress(KindError):
                for line in run(["ip", family, "route", "show", "root", subnet]).splitlines():
                    _route("delete", line.split()[0])


def keep_services_in(docker_network: str, service_subnets: Sequence[str]) -> None:
    """Refuse what nodes of this Docker network send to Service addresses that no service proxy in them has taken.

    It would leave this machine, and something there may answer for any address (a transparent HTTP proxy): a Service that
    has to be dead would seem alive. As `host_routes`, it needs root and an engine on this machine.
    """
    forget_services(docker_network)
    bridge = _bridge(docker_network)
    for subnet in service_subnets if bridge else ():
        _rule("add", subnet, bridge)


def forget_services(docker_network: str) -> None:
    """Undo `keep_services_in`."""
    bridge = _bridge(docker_network)
    for family in ("-4", "-6") if bridge else ():
        with contextlib.suppress(KindError):
            for rule in json.loads(run(["ip", "-json", family, "rule", "show", "pref", _PREFERENCE])):
                if rule.get("iif") == bridge:
                    _rule("delete", f"{rule['dst']}/{rule['dstlen']}", bridge)


def _bridge(docker_network: str) -> str:
    """The device of a Docker network; empty where it is not on this machine, or is not ours to change."""
    if os.geteuid() != 0:
        return ""
    with contextlib.suppress(KindError):
        network_id = run(["docker", "network", "inspect", "--format", "{{.Id}}", docker_network]).strip()
        bridge = f"br-{network_id[:12]}"
        return bridge if Path("/sys/class/net", bridge).exists() else ""
    return ""


def _rule(verb: str, subnet: str, bridge: str) -> bool:
    family = f"-{ipaddress.ip_network(subnet).version}"
    return succeeds(["ip", family, "rule", verb, "pref", _PREFERENCE, "iif", bridge, "to", subnet, "unreachable"])


def _route(verb: str, subnet: str, *how: str) -> bool:
    family = f"-{ipaddress.ip_network(subnet).version}"
    return os.geteuid() == 0 and succeeds(["ip", family, "route", verb, subnet, *how])


def _install(node: str, pod_subnets: Mapping[str, Sequence[str]]) -> None:
    files = {
        "kind/routes": (config.routes(node, pod_subnets).encode(), 0o644),
        "usr/local/libexec/node-routes": ((_FILES / "node-routes").read_bytes(), 0o755),
        "etc/systemd/system/node-routes.service": ((_FILES / "node-routes.service").read_bytes(), 0o644),
        _CONFLIST: (config.cni_config(pod_subnets[node]).encode(), 0o644),
    }
    if not succeeds(["docker", "exec", node, "test", "-x", _BRIDGE]):  # kindest/node has other plugins
        files[_BRIDGE.removeprefix("/")] = ((parts.CNI_PART.build() / "bridge").read_bytes(), 0o755)
    run(["docker", "cp", "-", f"{node}:/"], input=_archive(files))
    run(["docker", "exec", node, "systemctl", "enable", "--now", "--quiet", "node-routes.service"])


def _archive(files: Mapping[str, tuple[bytes, int]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, (content, mode) in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
