"""Owns the options by which a command is told of cluster state and a node, and the snapshot that they come to."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import click
import structlog
from msgspec.structs import replace

from nodeproxy.cli.command_line import CommandLine, command_line, fail, log_remarks
from nodeproxy.cli.logging import configure_logging
from nodeproxy.cli.options import AGENT_OPTIONS, LOG_OPTIONS
from nodeproxy.cli.run import resolved_or_fail
from nodeproxy.cluster.findings import printable
from nodeproxy.configuration.agent_config import AgentConfig
from nodeproxy.configuration.check import check_values
from nodeproxy.snapshot.model import Snapshot, SnapshotError, left_out

_Decorator = Callable[[Any], Any]

_SOURCES: Final = ("config_file", "kubeconfig", "master", "manifests")
_NODE_FIELDS: Final = (
    "mode",
    "node_name",
    "cluster_cidrs",
    "detect_local_mode",
    "pod_bridge_interface",
    "pod_interface_name_prefix",
    "node_port_addresses",
    "bind_address",
    "localhost_node_ports",
    "masquerade_all",
    "masquerade_bit",
    "iptables_variant",
    "ipvs_scheduler",
    "ipvs_strict_arp",
    "ipvs_exclude_cidrs",
)
_WANTED: Final = frozenset({*_SOURCES, "service_proxy_name", *_NODE_FIELDS})

STATE_EPILOG: Final = (
    "Without --snapshot, --manifests, --config, --kubeconfig and --master, the agent that runs in this network namespace is "
    "asked how it is configured, and its source is read. All other flags have the meaning of those of nodeproxy run, and "
    "count before what a snapshot or the agent says."
)


def _of_agent() -> Iterator[_Decorator]:
    """Those options of `nodeproxy run` that decide which state is seen and how it is forwarded."""
    for option in AGENT_OPTIONS:
        (parameter,) = option(lambda: None).__click_params__
        if parameter.name in _WANTED:
            yield option


STATE_OPTIONS: tuple[_Decorator, ...] = (
    click.option(
        "--snapshot", "snapshot_path", type=click.Path(path_type=Path), metavar="PATH",
        help="A snapshot that nodeproxy snapshot wrote: directory or .tar.gz.",
    ),
    *_of_agent(),
    *LOG_OPTIONS,
)  # fmt: skip


def snapshot_of(context: click.Context) -> Snapshot:
    """The state that a command with `STATE_OPTIONS` is told of; what of it cannot be read is named on standard error.

    Ends the program with one clear line where there is none.
    """
    _log_warnings_only(context)
    snapshot = _snapshot(context)
    for refused in snapshot.refused:
        click.echo(printable(f"left out: {left_out(refused)}"), err=True)
    return snapshot


def _snapshot(context: click.Context) -> Snapshot:
    line = command_line(context)
    path = context.params.get("snapshot_path")
    given = [name for name in (*_SOURCES, "service_proxy_name") if name in line.flags or (name == _SOURCES[0] and line.file)]
    try:
        if path is not None and path != Path():
            if given:
                flags = ", ".join(f"--{'config' if name == 'config_file' else name.replace('_', '-')}" for name in given)
                raise click.UsageError(f"--snapshot cannot be used together with {flags}", context)
            from nodeproxy.snapshot.take import load  # noqa: PLC0415 - imports the agent

            return _adjusted(load(path, line.flags.get("node_name")), line)
        if not given or given == ["service_proxy_name"]:
            return _adjusted(_of_running_agent(line), line)
        return _taken(line)
    except SnapshotError as error:
        fail(str(error))


def _taken(line: CommandLine) -> Snapshot:
    """Of the source that flags or the configuration file name."""
    from nodeproxy.snapshot.take import take  # noqa: PLC0415

    resolved = resolved_or_fail(line)
    log_remarks(resolved.remarks)
    if resolved.absent:
        fail(*resolved.absent)
    return asyncio.run(take(resolved.config))


def _of_running_agent(line: CommandLine) -> Snapshot:
    """Of the source of the agent here, which knows its node best."""
    from nodeproxy.snapshot.agent_socket import AgentNotRunning, ask_in_force  # noqa: PLC0415
    from nodeproxy.snapshot.take import take  # noqa: PLC0415

    try:
        told = ask_in_force()
    except AgentNotRunning as error:
        fail(f"{error}; give --snapshot, --manifests, --kubeconfig or --master")
    config = replace(told.config, iptables_variant=told.variant or told.config.iptables_variant)
    if "service_proxy_name" in line.flags:
        config = replace(config, service_proxy_name=line.flags["service_proxy_name"])
    taken = asyncio.run(take(config))
    return replace(
        taken,
        node_addresses=told.node_addresses,
        families=told.families,
        origin=f"{taken.origin}, as the agent of node {config.node_name} sees it",
    )


def _adjusted(snapshot: Snapshot, line: CommandLine) -> Snapshot:
    """With the flags of the command line in place of what the snapshot's configuration says."""
    flags = {field: value for field, value in line.flags.items() if field in _NODE_FIELDS}
    if not flags:
        return snapshot
    config: AgentConfig = replace(snapshot.config, **flags)
    if complaints := check_values(config):
        fail(*complaints)
    return replace(snapshot, config=config)


def _log_warnings_only(context: click.Context) -> None:
    """On standard error; with -v all that an agent logs, too."""
    verbosity = context.params.get("verbosity") or 0
    configure_logging(verbosity, context.params.get("log_format") or "text")
    if not verbosity:
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
