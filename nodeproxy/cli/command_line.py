"""Owns what a command line says: from click's parameters to an `AgentConfig`, again each time that its file changes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn

import click
import structlog
from click.core import ParameterSource
from msgspec import Struct

from nodeproxy.cli.options import unsupported_parameter
from nodeproxy.cluster.findings import printable_lines
from nodeproxy.configuration.addresses import with_port
from nodeproxy.configuration.agent_config import AgentConfig, LogFormat, Mode, WhileAnotherRuns
from nodeproxy.configuration.resolve import Remark, Resolved, resolve
from nodeproxy.configuration.settings import BY_FIELD, UNSUPPORTED_FLAGS
from nodeproxy.programmer.base import DetectLocalMode

_log = structlog.get_logger(__name__)

_TYPES: dict[str, Callable[[str], StrEnum]] = {
    "mode": Mode,
    "fallback": Mode,
    "detect_local_mode": DetectLocalMode,
    "log_format": LogFormat,
    "while_another_runs": WhileAnotherRuns,
}
_EMPTY_MEANS_NOT_SERVED = {"healthz_bind_address": "0.0.0.0", "metrics_bind_address": "127.0.0.1"}
_PORTS = {"healthz_port": "healthz_bind_address", "metrics_port": "metrics_bind_address"}


class CommandLine(Struct, frozen=True):
    """The configuration file, the flags by field of `AgentConfig`, and flags without such a field."""

    file: Path | None
    flags: dict[str, Any]
    others: tuple[str, ...] = ()

    def resolve(self) -> Resolved:
        """Read the file and join it with the flags. Raises `ConfigError` where it cannot be read."""
        return resolve(self.file, self.flags, self.others)


class Reload:
    """Reads the configuration of a command line again: the `reload` of an agent. Remarks are logged when they change."""

    def __init__(self, command_line: CommandLine, remarks: tuple[Remark, ...]) -> None:
        self._command_line = command_line
        self._remarks = remarks

    def __call__(self) -> AgentConfig:
        """The configuration as it is now. Raises `ConfigError` with every complaint."""
        resolved = self._command_line.resolve()
        config = resolved.usable()
        if resolved.remarks != self._remarks:
            log_remarks(resolved.remarks)
            self._remarks = resolved.remarks
        return config


def command_line(context: click.Context) -> CommandLine:
    """What was given on the command line of a command with `AGENT_OPTIONS`. Empty text counts as not given."""
    parameters = {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    file = parameters.get("config_file")
    file = None if file is None or _is_empty(file) else file
    flags = {
        name: _TYPES[name](value) if name in _TYPES else value
        for name, value in parameters.items()
        if name in BY_FIELD and (not _is_empty(value) or name in _EMPTY_MEANS_NOT_SERVED)
    }
    others = [flag for flag in UNSUPPORTED_FLAGS if unsupported_parameter(flag) in parameters]
    ports = {name: parameters[name] for name in _PORTS if parameters.get(name) is not None}
    if file is None:
        flags.update(_addresses_with(ports, flags))
    else:
        others += [f"--{name.replace('_', '-')}" for name in ports]
    return CommandLine(file, flags, tuple(others))


def _addresses_with(ports: Mapping[str, int], flags: Mapping[str, Any]) -> dict[str, str]:
    """kube-proxy's deprecated port flags: 0 serves nothing; another counts where the address has no port of its own."""
    addresses = {}
    for name, port in ports.items():
        field = _PORTS[name]
        given = flags.get(field) or _EMPTY_MEANS_NOT_SERVED[field]
        addresses[field] = with_port(given, port) if port else ""
    return addresses


def _is_empty(value: Any) -> bool:
    return value in ("", ()) or value == Path()


def log_remarks(remarks: tuple[Remark, ...]) -> None:
    """One warning for each remark."""
    for remark in remarks:
        _log.warning(remark.text, **({"names": ", ".join(remark.names)} if remark.names else {}))


def fail(*complaints: str) -> NoReturn:
    """End with a line on standard error for each complaint. Lines in one stay lines."""
    for complaint in complaints:
        click.echo(printable_lines(f"nodeproxy: {complaint}"), err=True)
    sys.exit(1)
