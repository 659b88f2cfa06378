"""Owns `nodeproxy snapshot`: the cluster state that a node sees, written down so that it can be looked at elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from nodeproxy.cli.command_line import fail
from nodeproxy.cli.options import options
from nodeproxy.cli.state_options import STATE_EPILOG, STATE_OPTIONS, snapshot_of


@click.command(epilog=STATE_EPILOG)
@click.argument("target", type=click.Path(path_type=Path), metavar="DIR|FILE.tar.gz|-")
@click.option("--anonymise", is_flag=True, help="Replace names and addresses, so that forwarding stays the same.")
@options(STATE_OPTIONS)
@click.pass_context
def snapshot(context: click.Context, /, target: Path, anonymise: bool, **_: Any) -> None:
    """Write the cluster state that a node sees as manifests, with a configuration, that reproduce what is programmed.

    `nodeproxy run --manifests DIR --config DIR/config.conf` programs the same rules; compare and trace take it
    by --snapshot. Only fields that decide forwarding are written. A single - writes a .tar.gz to standard output, for a pod
    that can write nowhere.

    With --anonymise, names of namespaces, Services, ports, nodes and zones are replaced under a random secret that is kept
    nowhere, and addresses so that whatever lay in one CIDR does so afterwards. Port numbers, interface names and the order
    of ages stay.
    """
    to_stdout = str(target) == "-"
    if to_stdout and sys.stdout.isatty():
        fail("a snapshot is not written to a terminal; redirect it to a file, as in: nodeproxy snapshot - > state.tar.gz")
    taken = snapshot_of(context)
    from nodeproxy.snapshot.anonymise import anonymise as anonymised  # noqa: PLC0415
    from nodeproxy.snapshot.directory import write_archive  # noqa: PLC0415
    from nodeproxy.snapshot.model import SnapshotError  # noqa: PLC0415
    from nodeproxy.snapshot.take import save  # noqa: PLC0415

    try:
        written = anonymised(taken) if anonymise else taken
        if to_stdout:
            write_archive(written, sys.stdout.buffer)
        else:
            save(written, target)
    except SnapshotError as error:
        fail(str(error))
    except OSError as error:
        fail(f"standard output: {error.strerror or error}")
    missing = f"; {len(taken.refused)} refused, not written" if taken.refused else ""
    kinds = [one.key.kind for one in written.objects]
    counts = ", ".join(f"{kinds.count(kind)} {kind}s" for kind in dict.fromkeys(kinds))
    how = "anonymised under a secret that is kept nowhere; " if anonymise else ""
    click.echo(f"{target}: {how}{counts or 'no objects'}{missing}", err=to_stdout)
