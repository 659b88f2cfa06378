"""Owns `nodeproxy run`: the agent, and what kube-proxy does instead of running (clean up, write its configuration)."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import structlog

from nodeproxy.cli.command_line import CommandLine, Reload, command_line, fail, log_remarks
from nodeproxy.cli.logging import configure_logging
from nodeproxy.cli.options import AGENT_OPTIONS, EPILOG, boolean, options
from nodeproxy.configuration.agent_config import AgentConfig, ConfigError
from nodeproxy.configuration.resolve import Resolved

_log = structlog.get_logger(__name__)

_INSTEAD = (
    boolean("--cleanup", False, "Remove everything that nodeproxy programmed on this node, and end."),
    boolean("--init-only", False, "Set what needs full privileges (sysctls), and end."),
    click.option("--write-config-to", type=click.Path(path_type=Path), help="Write the configuration there, and end."),
)


@click.command(epilog=EPILOG)
@options(AGENT_OPTIONS, _INSTEAD)
@click.version_option(version("nodeproxy"), "--version", message="nodeproxy %(version)s")
@click.pass_context
def run(context: click.Context, /, cleanup: bool, init_only: bool, write_config_to: Path | None, **_: Any) -> None:
    """Run the agent. Flags have kube-proxy's names and meanings."""
    line = command_line(context)
    if cleanup:
        _clean_up(context, line)
        return
    resolved = resolved_or_fail(line)
    config = resolved.config
    configure_logging(config.verbosity, config.log_format, for_good=True)
    log_remarks(resolved.remarks)
    if write_config_to is not None and write_config_to != Path():
        _write(config, resolved, write_config_to)
        return
    if resolved.absent:
        fail(*resolved.absent)
    need_privileges()
    if init_only:
        _set_what_needs_privileges(config)
        return
    adjust_oom_score(config.oom_score_adj)
    from nodeproxy.agent.agent import Agent  # noqa: PLC0415 - only an agent that starts needs all of it
    from nodeproxy.agent.outside import StartError  # noqa: PLC0415

    try:
        asyncio.run(Agent(config, reload=Reload(line, resolved.remarks), config_path=line.file).run())
    except StartError as error:
        fail(str(error))


def resolved_or_fail(line: CommandLine) -> Resolved:
    """The configuration. Ends the program with every complaint where it makes no sense."""
    try:
        resolved = line.resolve()
    except ConfigError as error:
        fail(*error.complaints)
    if resolved.complaints:
        fail(*resolved.absent, *resolved.complaints)
    return resolved


def clean_up_node(variants: tuple[str, ...], drain_seconds: float) -> None:
    """Remove everything of ours; of both variants of iptables if none is named. See `clean_up`."""
    from nodeproxy.agent.cleanup import clean_up  # noqa: PLC0415
    from nodeproxy.programmer.base import ProgrammingError  # noqa: PLC0415

    need_privileges()
    _need_no_agent()
    try:
        asyncio.run(clean_up(variants or None, drain_seconds))
    except ProgrammingError as error:
        fail(str(error))


def need_privileges() -> None:
    """End the program where it lacks a capability that every mode needs (linux/capability.h)."""
    status = Path("/proc/self/status").read_text()
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    missing = [name for name, bit in (("NET_ADMIN", 12), ("NET_RAW", 13)) if not effective >> bit & 1]
    if missing:
        fail(f"lacks {' and '.join(missing)}: run it as root, or with these capabilities over its network namespace")


def _need_no_agent() -> None:
    """End the program beside an agent that runs: Services would fail until that has put back all that was removed."""
    from nodeproxy.snapshot.agent_socket import AgentNotRunning, ask  # noqa: PLC0415

    try:
        ask("/status")
    except AgentNotRunning:
        return
    fail("an agent runs on this node and would put back what is removed: stop it first, or take its pod off the node")


def adjust_oom_score(score: int) -> None:
    """Tell the kernel how readily to kill this process, and those it starts, when memory is short; as kube-proxy does."""
    try:
        Path("/proc/self/oom_score_adj").write_text(f"{score}\n")
    except OSError as error:
        _log.info("oom_score_adj not set; going on without", value=score, error=error.strerror)


def _clean_up(context: click.Context, line: CommandLine) -> None:
    """As kube-proxy's --cleanup. The configuration file is not read: a broken one must not be in the way."""
    if "mode" in line.flags:
        fail("--cleanup: removes what every mode left; cannot be used together with --mode")
    configure_logging(context.params["verbosity"], context.params["log_format"])
    variant = line.flags.get("iptables_variant")
    clean_up_node((variant,) if variant else (), context.params["ipvs_drain_timeout"])


def _write(config: AgentConfig, resolved: Resolved, path: Path) -> None:
    from nodeproxy.cli.config import as_yaml  # noqa: PLC0415

    try:
        path.write_text(as_yaml(config))
    except OSError as error:
        fail(f"--write-config-to: {path}: {error.strerror or error}")
    _log.info("configuration written", file=str(path))


def _set_what_needs_privileges(config: AgentConfig) -> None:
    from nodeproxy.agent.modes import prepare_kernel  # noqa: PLC0415
    from nodeproxy.agent.node import available_families, programmer_config  # noqa: PLC0415
    from nodeproxy.agent.system import apply_settings  # noqa: PLC0415
    from nodeproxy.programmer.base import ProgrammingError  # noqa: PLC0415

    apply_settings(config, programmer_config(config, config.mode, available_families(), None))
    try:
        prepare_kernel(config)
    except ProgrammingError as error:
        fail(str(error))
