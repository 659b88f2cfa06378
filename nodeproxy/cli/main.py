"""Owns the console script `nodeproxy` and its commands."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path
from traceback import walk_tb
from typing import Final

import click

from nodeproxy.cli.command_line import fail
from nodeproxy.cli.compare import compare
from nodeproxy.cli.config import config
from nodeproxy.cli.logging import configure_logging
from nodeproxy.cli.operator import operator, probe, probe_server
from nodeproxy.cli.options import LOG_OPTIONS, options
from nodeproxy.cli.rollout import rollout
from nodeproxy.cli.run import clean_up_node, run
from nodeproxy.cli.snapshot import snapshot
from nodeproxy.cli.status import status
from nodeproxy.cli.trace import trace
from nodeproxy.cli.types import Duration, normalise

_PRINTERS: Final = ("click.utils", "rich.console")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(version("nodeproxy"), "--version", message="nodeproxy %(version)s")
def main_group() -> None:
    """A kube-proxy replacement for Linux nodes."""


@main_group.command()
@click.option("--iptables-variant", type=click.Choice(["legacy", "nft"]), multiple=True, help="Default: both.")
@click.option(
    "--ipvs-drain-timeout", type=Duration(), default="15m", show_default=True,
    help="Where kube-proxy serves already: how long connections through our virtual servers are waited for at most.",
)  # fmt: skip
@options(LOG_OPTIONS)
def cleanup(iptables_variant: tuple[str, ...], ipvs_drain_timeout: float, verbosity: int, log_format: str) -> None:
    """Remove everything that nodeproxy programmed on this node, and nothing else.

    An agent that runs here has to end first: it would put everything back. What a kube-proxy that has taken the node over
    serves with stays, though it has the same names.
    """
    configure_logging(verbosity, log_format)
    clean_up_node(iptables_variant, ipvs_drain_timeout)


main_group.add_command(run)
main_group.add_command(compare)
main_group.add_command(config)
main_group.add_command(operator)
main_group.add_command(probe)
main_group.add_command(probe_server)
main_group.add_command(rollout)
main_group.add_command(snapshot)
main_group.add_command(status)
main_group.add_command(trace)


def main() -> None:
    """Entry point of the console script."""
    try:
        main_group(args=normalise(sys.argv[1:]), prog_name="nodeproxy")
    except OSError as error:  # of a pipe that nobody reads any more click takes care
        modules = {frame.f_globals.get("__name__") for frame, _ in walk_tb(error.__traceback__)}
        if modules.isdisjoint(_PRINTERS):
            raise
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # Python writes what is left as it ends
        fail(f"the output cannot be written: {error.strerror}")


if __name__ == "__main__":
    main()
