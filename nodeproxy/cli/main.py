"""Owns the console script `nodeproxy` and its commands."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from nodeproxy.agent.config import AgentConfig, ConfigError, Mode, check
from nodeproxy.cli.logging import configure_logging
from nodeproxy.cli.types import Duration, StringList, normalise, split_lists
from nodeproxy.programmer.base import DetectLocalMode
from nodeproxy.programmer.ipvs.settings import SCHEDULERS

_LOG_OPTIONS = (
    click.option("-v", "verbosity", type=int, default=2, show_default=True, help="Verbosity; from 4 on, debug lines."),
    click.option("--logging-format", "log_format", type=click.Choice(["text", "json"]), default="text", show_default=True),
)


def _boolean(name: str, default: bool, text: str, variable: str | None = None) -> Callable[[Any], Any]:
    """A boolean flag as Go writes it: `--name`, `--name=true` or `--name=false`."""
    names = [name, variable] if variable else [name]
    return click.option(*names, type=bool, is_flag=False, flag_value=True, default=default, show_default=True, help=text)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(version("nodeproxy"), "--version", message="nodeproxy %(version)s")
def main_group() -> None:
    """A kube-proxy replacement for Linux nodes."""


@main_group.command()
@click.option(
    "--mode", "--proxy-mode", "mode", type=click.Choice([str(mode) for mode in Mode]), default="iptables", show_default=True,
    help="Mechanism of the kernel that carries Services.",
)  # fmt: skip
@click.option(
    "--fallback", type=click.Choice([str(mode) for mode in Mode]),
    help="Mode to take where the kernel lacks what --mode needs. Default: end with a message that says what is missing.",
)  # fmt: skip
@click.option("--kubeconfig", type=click.Path(path_type=Path), help="Kubeconfig file. Without any source: in-cluster.")
@click.option("--master", help="URL of the API server; overrides the one in the kubeconfig file.")
@click.option(
    "--manifests", type=click.Path(path_type=Path), help="Directory of manifests (YAML, JSON) instead of an API server."
)
@click.option("--hostname-override", help="Name of this node's Node object. Default: the host name.")
@click.option("--service-proxy-name", help="Serve the Services that carry this label value, instead of those without.")
@click.option(
    "--cluster-cidr", "cluster_cidrs", type=StringList(), default="", help="CIDRs of pods, at most one for each IP family."
)
@click.option(
    "--detect-local-mode", type=click.Choice([str(mode) for mode in DetectLocalMode]), default="ClusterCIDR",
    help="How traffic of pods on this node is recognised.",
)  # fmt: skip
@click.option("--pod-bridge-interface", help="Bridge of the pods, for --detect-local-mode BridgeInterface.")
@click.option("--pod-interface-name-prefix", help="Prefix of pod interfaces, for --detect-local-mode InterfaceNamePrefix.")
@click.option(
    "--nodeport-addresses", "node_port_addresses", type=StringList(), multiple=True, callback=split_lists,
    help="CIDRs of local addresses that serve node ports, or 'primary'. Default: all.",
)  # fmt: skip
@click.option("--bind-address", help="Address of this node, where no Node object tells it.")
@_boolean("--iptables-localhost-nodeports", True, "Serve node ports on IPv4 loopback.", "localhost_node_ports")
@_boolean("--masquerade-all", False, "Masquerade everything that goes to a cluster IP.")
@click.option("--iptables-masquerade-bit", "masquerade_bit", type=int, default=14, show_default=True)
@click.option("--iptables-min-sync-period", "min_sync_period", type=Duration(), default="1s", show_default=True)
@click.option("--iptables-sync-period", "sync_period", type=Duration(), default="30s", show_default=True)
@click.option("--iptables-variant", type=click.Choice(["legacy", "nft"]), help="Default: what the node uses already.")
@click.option(
    "--ipvs-scheduler", type=click.Choice(SCHEDULERS), default="rr", show_default=True, metavar="NAME",
    help="Scheduler of all virtual servers: " + ", ".join(SCHEDULERS) + ".",
)  # fmt: skip
@_boolean("--ipvs-strict-arp", False, "Answer ARP for service addresses on no interface (arp_ignore, arp_announce).")
@click.option("--ipvs-exclude-cidrs", type=StringList(), default="", help="Never delete virtual servers at these addresses.")
@click.option("--ipvs-tcp-timeout", type=Duration(), default="0s", help="Idle TCP connections. 0s: the kernel's.")
@click.option("--ipvs-tcpfin-timeout", type=Duration(), default="0s", help="TCP connections after a FIN. 0s: the kernel's.")
@click.option("--ipvs-udp-timeout", type=Duration(), default="0s", help="Idle UDP flows. 0s: the kernel's.")
@click.option(
    "--ipvs-drain-timeout", type=Duration(), default="15m", show_default=True,
    help="How long an endpoint that goes keeps its established connections at most.",
)  # fmt: skip
@click.option("--ipvs-min-sync-period", type=Duration(), default="1s", show_default=True)
@click.option("--ipvs-sync-period", type=Duration(), default="30s", show_default=True)
@click.option("--conntrack-max-per-core", type=int, default=32768, show_default=True, help="0 leaves the limit alone.")
@click.option("--conntrack-min", type=int, default=131072, show_default=True)
@click.option("--conntrack-tcp-timeout-established", type=Duration())
@click.option("--conntrack-tcp-timeout-close-wait", type=Duration())
@_boolean("--conntrack-tcp-be-liberal", False, "Accept TCP packets that conntrack finds out of window.")
@click.option("--conntrack-udp-timeout", type=Duration())
@click.option("--conntrack-udp-timeout-stream", type=Duration())
@click.option("--healthz-bind-address", default="0.0.0.0:10256", show_default=True, help="Empty: not served.")
@click.option("--metrics-bind-address", default="127.0.0.1:10249", show_default=True, help="Empty: not served.")
@_LOG_OPTIONS[0]
@_LOG_OPTIONS[1]
def run(hostname_override: str | None, verbosity: int, log_format: str, **options: Any) -> None:
    """Run the agent. Flags have kube-proxy's names and meanings."""
    configure_logging(verbosity, log_format)
    options["mode"] = Mode(options["mode"])
    options["fallback"] = Mode(options["fallback"]) if options["fallback"] else None
    options["detect_local_mode"] = DetectLocalMode(options["detect_local_mode"])
    node_name = (hostname_override or socket.gethostname()).strip().lower()
    config = AgentConfig(node_name=node_name, **options)
    try:
        check(config)
    except ConfigError as error:
        _fail(*error.complaints)
    _need_root()
    from nodeproxy.agent.agent import Agent, StartError  # noqa: PLC0415 - only an agent that starts needs all of it

    try:
        asyncio.run(Agent(config).run())
    except StartError as error:
        _fail(str(error))


@main_group.command()
@click.option("--iptables-variant", type=click.Choice(["legacy", "nft"]), multiple=True, help="Default: both.")
@_LOG_OPTIONS[0]
@_LOG_OPTIONS[1]
def cleanup(iptables_variant: tuple[str, ...], verbosity: int, log_format: str) -> None:
    """Remove everything that nodeproxy programmed on this node, and nothing else."""
    from nodeproxy.agent.cleanup import clean_up  # noqa: PLC0415
    from nodeproxy.programmer.base import ProgrammingError  # noqa: PLC0415

    configure_logging(verbosity, log_format)
    _need_root()
    try:
        asyncio.run(clean_up(iptables_variant or None))
    except ProgrammingError as error:
        _fail(str(error))


def _need_root() -> None:
    if os.geteuid() != 0:
        _fail("needs root, or the capabilities NET_ADMIN and NET_RAW in the user namespace of the network namespace")


def _fail(*complaints: str) -> None:
    for complaint in complaints:
        click.echo(f"nodeproxy: {complaint}", err=True)
    sys.exit(1)


def main() -> None:
    """Entry point of the console script."""
    main_group(args=normalise(sys.argv[1:]), prog_name="nodeproxy")


if __name__ == "__main__":
    main()
