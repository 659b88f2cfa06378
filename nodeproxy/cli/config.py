"""Owns `nodeproxy config`: what a configuration file comes to, without running anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nodeproxy.cli.command_line import command_line, fail
from nodeproxy.cli.options import AGENT_OPTIONS, EPILOG, options
from nodeproxy.configuration.agent_config import AgentConfig, ConfigError
from nodeproxy.configuration.effective import as_document, honoured
from nodeproxy.configuration.read import read_document
from nodeproxy.configuration.resolve import resolve


@click.group()
def config() -> None:
    """Look at a configuration without running anything."""


@config.command()
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> None:
    """Say what of a KubeProxyConfiguration FILE is honoured, what is ignored, and what is wrong (exit status 1)."""
    try:
        resolved = resolve(file)
        document = read_document(file).document
    except ConfigError as error:
        fail(*error.complaints)
    wrong = [line.removeprefix(f"{file}: ") for line in resolved.complaints]
    at_fault = {line.partition(":")[0].partition("[")[0] for line in wrong}
    set_to = {path: value for path, value in honoured(document).items() if path not in at_fault}
    _section("Honoured (all else has kube-proxy's defaults)", [f"{path}: {_shown(value)}" for path, value in set_to.items()])
    _section("Ignored", [f"{', '.join(remark.names)}: {remark.text}".lstrip(": ") for remark in resolved.remarks])
    _section("Not on this machine", [line.removeprefix(f"{file}: ") for line in resolved.absent])
    _section("Wrong", wrong)
    if wrong:
        raise SystemExit(1)
    click.echo(f"{file}: can be used")


@config.command(epilog=EPILOG)
@options(AGENT_OPTIONS)
@click.pass_context
def show(context: click.Context, /, **_: Any) -> None:
    """Print the configuration that `nodeproxy run` would use with these flags, as a KubeProxyConfiguration."""
    from nodeproxy.cli.run import resolved_or_fail  # noqa: PLC0415

    click.echo(as_yaml(resolved_or_fail(command_line(context)).config), nl=False)


def as_yaml(config: AgentConfig) -> str:
    """The KubeProxyConfiguration that is in force, as text."""
    import yaml  # noqa: PLC0415 - `nodeproxy run` does without

    return str(yaml.safe_dump(as_document(config), sort_keys=True))


def _section(title: str, lines: list[str]) -> None:
    if lines:
        click.echo(f"{title}:")
        for line in lines:
            click.echo(f"  {line}")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
